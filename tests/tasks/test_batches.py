import pytest

from kdnas.tasks.batches import GLUEDataModule, LengthGroupedSampler
from kdnas.tasks.tasks import LoadedTask, load_task
from tests.conftest import make_tokenizer, write_task


@pytest.fixture
def data(tmp_path) -> GLUEDataModule:
    loaded = load_task(str(write_task(tmp_path / "some", labels=range(5), num_rows=203)))
    module = GLUEDataModule(loaded, make_tokenizer(), batch_size=16, max_length=10, seed=1)
    module.setup()
    return module


def test_training_batches_hold_every_row_once_and_rows_of_similar_length(data):
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [16] * 12 + [11]
    assert sorted(label for batch in batches for label in batch["labels"].tolist()) == sorted(
        data.task.train["label"]
    )
    assert sum(batch["attention_mask"].numel() for batch in batches) < 1.1 * sum(
        int(batch["attention_mask"].sum()) for batch in batches
    )
    lengths = [batch["attention_mask"].sum(1).float().mean().item() for batch in batches[:-1]]
    assert lengths != sorted(lengths)


def test_validation_batches_hold_every_row_once_sorted_by_length(data):
    (loader,) = data.val_dataloader()
    batches = list(loader)
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths) and len(lengths) == 203
    assert sorted(label for b in batches for label in b["labels"].tolist()) == sorted(
        data.task.validation["label"]
    )


def test_padding_is_dynamic_masked_and_the_tokenizers_own(data):
    widths = set()
    for batch in data.val_dataloader()[0]:
        padding = batch["attention_mask"] == 0
        assert batch["input_ids"][padding].eq(3).all() and batch["input_ids"][~padding].ne(3).all()
        widths.add(batch["input_ids"].shape[1])
    assert max(widths) == 10 and len(widths) > 1


def test_rows_are_tokenised_once(data):
    rows = data.rows
    data.setup("validate")
    assert data.rows is rows


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(list(range(5, 105)), batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(100))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_loaded_task_does_not_print_its_rows(data):
    assert isinstance(data.task, LoadedTask) and len(repr(data.task)) < 400

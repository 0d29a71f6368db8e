import numpy as np
import pytest

from kdnas.data.masking import Draw, Masker, row_generator

MASK, SPECIAL = 4, [1, 2, 3, 4]
ROWS = np.random.default_rng(0).integers(
    1000, 2000, size=(400, 50)
)  # no id that a random token can be


def masked(
    probability: float = 0.15, seed: int = 0, variant: int = 0, vocab_size: int = 1000
) -> np.ndarray:
    masker = Masker(MASK, vocab_size, SPECIAL, probability, seed)
    return np.stack([masker(row, sample_id, variant) for sample_id, row in enumerate(ROWS)])


@pytest.mark.parametrize("probability", [0.15, 0.5, 1.0])
def test_of_the_chosen_tokens_80_percent_are_masked_10_random_and_10_stay(probability):
    found = masked(probability)
    changed = found != ROWS
    shares = {
        0.8 * probability: found == MASK,
        0.1 * probability: changed & (found != MASK),
        1 - 0.9 * probability: ~changed,
    }
    for share, where in shares.items():
        assert where.mean() == pytest.approx(
            share, abs=4 * (share * (1 - share) / ROWS.size) ** 0.5
        )


def test_random_tokens_are_any_of_the_vocabulary():
    found = masked(probability=1.0, vocab_size=20)
    random_ids, counts = np.unique(found[(found != ROWS) & (found != MASK)], return_counts=True)
    assert random_ids.tolist() == [i for i in range(20) if i != MASK]
    assert counts.min() > 60 and counts.max() < 150  # 100 each


def test_special_tokens_are_never_chosen():
    row = np.array([1, 500, 2, 500, 2, 3, 3, 4])
    special = np.isin(row, SPECIAL)
    masker = Masker(MASK, 1000, SPECIAL, probability=1.0)
    found = np.stack([masker(row, sample_id) for sample_id in range(200)])
    assert (found[:, special] == row[special]).all()
    assert (found[:, ~special] == MASK).any(0).all()


def test_a_mask_depends_on_no_order_and_no_other_row():
    forwards = masked()
    masker = Masker(MASK, 1000, SPECIAL)
    for sample_id in (399, 7, 0, 7):
        assert (masker(ROWS[sample_id], sample_id) == forwards[sample_id]).all()


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**31 + 1, 2**32 - 1])
def test_another_seed_variant_or_sample_has_another_mask(seed):
    row = ROWS.reshape(-1)

    def mask(seed: int, variant: int, sample_id: int) -> bytes:
        return (Masker(MASK, 1000, SPECIAL, seed=seed)(row, sample_id, variant) == MASK).tobytes()

    places = [
        (seed, 0, 5),
        (seed ^ 2, 0, 5),
        (seed, 1, 5),
        (seed, 2, 5),
        (seed, 0, 6),
        (seed, 1, 6),
        (seed, 5, 0),
    ]
    assert len({mask(*place) for place in places}) == len(places)
    assert mask(*places[0]) == mask(*places[0])


def test_each_kind_of_draw_has_random_numbers_of_its_own():
    places = [
        (seed, row, variant) for seed in (0, 2**32 - 1) for row in (0, 2**40) for variant in (0, 1)
    ]
    numbers = [row_generator(draw, *place).random() for draw in Draw for place in places]
    assert len(set(numbers)) == len(Draw) * len(places) == 24
    assert numbers == [row_generator(draw, *place).random() for draw in Draw for place in places]


def test_the_masks_of_a_seed_stay_what_they_are():
    # With other masks no cache of a teacher's states would be used again.
    found = np.flatnonzero(Masker(MASK, 1000, SPECIAL)(ROWS[0], 7, 1) != ROWS[0])
    assert found.tolist() == [1, 2, 7, 16, 18, 26, 28]


def test_a_row_is_not_changed_in_place():
    row = ROWS[0].copy()
    Masker(MASK, 1000, SPECIAL, probability=1.0)(row, 0)
    assert (row == ROWS[0]).all()


def test_probability_0_changes_nothing():
    assert (masked(probability=0.0) == ROWS).all()

import numpy as np
import pytest
import torch

from kdnas.distillation.metrics import RidgeProbe, TermErrors


def make_batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (N, 3) and targets (N, 2) that are nearly linear in them, with means that are not 0."""
    generator = torch.Generator().manual_seed(0)
    weight, constant = torch.randn(3, 2, generator=generator), torch.tensor([5.0, -3.0])
    batches = []
    for size in sizes:
        inputs = torch.randn(size, 3, generator=generator) * torch.tensor([1.0, 0.1, 3.0]) + 2
        noise = 0.2 * torch.randn(size, 2, generator=generator)
        batches.append((inputs, inputs @ weight + constant + noise))
    return batches


def oracle(
    batches: list[tuple[torch.Tensor, torch.Tensor]], strength: float
) -> tuple[float, float]:
    """Least squares on the first half with rows for the shrinkage, and what is left on the second half."""
    middle = len(batches[0][0]) // 2
    (x, y), others = batches[0], batches[1:]
    halves = [[(x[:middle], y[:middle])], [(x[middle:], y[middle:])]]
    for number, batch in enumerate(others, 1):
        halves[number % 2].append(batch)
    fit_x, fit_y, test_x, test_y = (
        np.concatenate([b[i] for b in half]).astype(float) for half in halves for i in (0, 1)
    )
    ridge = strength * (fit_x**2).sum(0).mean()
    shrink = np.concatenate([np.sqrt(ridge) * np.eye(3), np.zeros((3, 1))], 1)
    ones = np.ones((len(fit_x), 1))
    rows = np.concatenate([np.concatenate([fit_x, ones], 1), shrink])
    weight = np.linalg.lstsq(rows, np.concatenate([fit_y, np.zeros((3, 2))]), rcond=None)[0]
    error = test_x @ weight[:3] + weight[3] - test_y
    return float((error**2).mean()), float(test_y.var(0).mean())


@pytest.mark.parametrize("sizes", [(40,), (41, 30), (7, 20, 33, 5, 18)])
@pytest.mark.parametrize("strength", [1e-3, 0.1])
def test_a_probe_is_fitted_on_one_half_and_measured_on_the_other(sizes, strength):
    batches = make_batches(*sizes)
    probe = RidgeProbe(3, 2, strength)
    for batch in batches:
        probe.update(*batch)
    assert [float(value) for value in probe.compute()] == pytest.approx(
        oracle(batches, strength), rel=1e-3
    )


def test_a_single_batch_is_not_taken_for_a_perfect_student():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, 400, 3, generator=generator)  # unrelated
    probe = RidgeProbe(3, 3)
    probe.update(inputs, targets)
    mse, variance = probe.compute()
    assert 0.95 < mse / variance < 1.15


def test_a_probe_of_almost_nothing_is_finite():
    for size in (0, 1, 2):
        probe = RidgeProbe(3, 2)
        probe.update(*make_batches(size)[0])
        assert all(torch.isfinite(value) for value in probe.compute())


def test_what_inference_mode_left_can_be_added_to():
    probe, errors = RidgeProbe(3, 2), TermErrors(1)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            for batch in make_batches(20, 20):
                probe.update(*batch)
            errors.update(torch.ones(1), torch.ones(1))
            assert errors.compute().tolist() == [[1.0], [1.0]] and probe.compute()[0].isfinite()
            probe.reset()
            errors.reset()


def test_a_reset_probe_has_forgotten_everything():
    batches = make_batches(10, 20, 30)
    probe = RidgeProbe(3, 2)
    probe.update(*batches[0])
    probe.reset()
    assert probe.num_batches == 0 and not probe.xx.any() and not probe.yy.any()
    for batch in batches[1:]:
        probe.update(*batch)
    assert [float(value) for value in probe.compute()] == pytest.approx(
        oracle(batches[1:], 1e-3), rel=1e-3
    )


def test_a_probe_takes_half_precision():
    (inputs, targets) = make_batches(60)[0]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        probe = RidgeProbe(3, 2)
        probe.update(inputs.to(dtype), targets.to(dtype))
        found.append([float(value) for value in probe.compute()])
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_a_probe_is_exact_under_autocast():
    batches = make_batches(60, 40)
    probe = RidgeProbe(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in batches:
            probe.update(*batch)
    assert [float(value) for value in probe.compute()] == pytest.approx(
        oracle(batches, 1e-3), rel=1e-3
    )


def test_the_error_of_a_term_is_a_mean_over_everything_whatever_the_batches():
    errors = TermErrors(3)
    errors.update(torch.tensor([6.0, 1.0, 0.0]), torch.tensor([3.0, 1.0, 0.0]))
    errors.update(torch.tensor([4.0, 0.0, 0.0], requires_grad=True), torch.tensor([1.0, 0.0, 0.0]))
    # (6 + 4) / (3 + 1), 1 / 1, and nothing to compare
    assert errors.compute().tolist() == [[2.5, 1.0, 0.0], [4.0, 1.0, 0.0]]
    assert not errors.compute().requires_grad
    errors.reset()
    assert errors.compute().tolist() == [[0.0, 0.0, 0.0]] * 2


def test_sums_of_errors_do_not_stop_growing():
    errors = TermErrors(1)
    errors.update(torch.tensor([2.0**25]), torch.tensor([2.0**25]))
    for _ in range(4):
        errors.update(torch.tensor([1.0]), torch.tensor([0.0]))
    assert errors.sums.item() == 2.0**25 + 4

"""Fitted weights and scales against the float64 solutions of the same least-squares problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbitcore import fit, ops
from lowbitcore.fit import dequantized, fit_low_rank, fit_scales, fit_weight


def problem(
    bits: int, group_size: int, act_order: bool, dead: bool = False
) -> tuple[torch.Tensor, torch.Tensor, ops.GptqResult]:
    generator = torch.Generator().manual_seed(bits + group_size)
    weight = torch.randn(64, 160, generator=generator)
    x = torch.randn(400, 160, generator=generator).cumsum(1) / 8
    if dead:
        x[:, 7] = 0
    hessian = torch.zeros(160, 160)
    ops.accumulate_hessian_(hessian, x)
    factor = ops.gptq_factorize(hessian, percdamp=0.01)
    result = ops.gptq_quantize(
        weight, factor, bits=bits, group_size=group_size, static_groups=not act_order
    )
    return weight, hessian, result


def refit(
    weight: torch.Tensor, hessian: torch.Tensor, result: ops.GptqResult, size: int
) -> torch.Tensor:
    return fit_scales(
        weight,
        hessian,
        result.codes,
        result.scales,
        result.zeros,
        group_size=size,
        g_idx=result.g_idx,
        percdamp=0.01,
    )


def row_problem(
    weight: torch.Tensor, hessian: torch.Tensor, result: ops.GptqResult, size: int, row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(H damped, w, the matrix [K, G] whose product with the scales is the quantized row)."""
    k = weight.shape[1]
    groups = np.arange(k) // (k if size == -1 else size)
    if result.g_idx is not None:
        groups = result.g_idx.numpy()
    h = hessian.double().numpy().copy()
    live = np.diag(h) > 0
    h[np.diag_indices(k)] += 0.01 * np.diag(h)[live].mean()
    w = np.where(live, weight[row].double().numpy(), 0.0)
    steps = result.codes[row].double().numpy() - result.zeros.double().numpy()[groups, row]
    matrix = np.zeros((k, result.scales.shape[0]))
    matrix[np.arange(k), groups] = steps
    return h, w, matrix


def test_rows_are_solved_for_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, result = problem(3, 32, False)
    wanted = refit(weight, hessian, result, 32)
    monkeypatch.setattr(fit, "_SYSTEM_ELEMENTS", 7 * 5**2)  # 7 of 64 rows
    solved = []
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: solved.append(len(a)) or solve(a, b))
    found = refit(weight, hessian, result, 32)
    assert solved == [7] * 9 + [1]
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 96, -1])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_is_the_minimum(bits: int, group_size: int, act_order: bool) -> None:
    weight, hessian, result = problem(bits, group_size, act_order)
    scales = refit(weight, hessian, result, group_size)
    assert torch.equal(scales, scales.half().float())
    changed = 0
    for row in range(weight.shape[0]):
        h, w, matrix = row_problem(weight, hessian, result, group_size, row)
        best = np.linalg.solve(matrix.T @ h @ matrix, matrix.T @ h @ w)

        def loss(
            s: np.ndarray, h: np.ndarray = h, w: np.ndarray = w, m: np.ndarray = matrix
        ) -> float:
            return float((w - m @ s) @ h @ (w - m @ s))

        got, old = scales[:, row].double().numpy(), result.scales[:, row].double().numpy()
        # The core of the computation is float32, which sees differences down to this.
        assert loss(got) <= loss(old) + 1e-6 * float(w @ h @ w)
        if not np.array_equal(got, old):
            changed += 1
            assert (np.abs(got - best) <= 1e-3 * np.abs(best) + 1e-6).all()
    # At 8 bits most old scales are already as good as fp16 can say.
    assert changed > (0.8 * weight.shape[0] if bits < 8 else 0)


def test_dead_columns_do_not_count() -> None:
    weight, hessian, result = problem(3, 32, act_order=False, dead=True)
    scales = refit(weight, hessian, result, 32)
    weight[:, 7] = 1e4
    assert torch.equal(scales, refit(weight, hessian, result, 32))


@pytest.mark.parametrize("silent", ["integers", "inputs"])
def test_a_silent_group_keeps_its_scale_alone(silent: str) -> None:
    """And the rest is fitted as if it were not there."""
    weight, hessian, _ = problem(2, 32, act_order=False)
    group = slice(32, 64)
    if silent == "inputs":
        hessian[group] = hessian[:, group] = 0
    factor = ops.gptq_factorize(hessian, percdamp=0.01)
    result = ops.gptq_quantize(weight, factor, bits=2, group_size=32)
    if silent == "integers":
        result.codes[:, group] = result.zeros[1][:, None]
    scales = refit(weight, hessian, result, 32)
    fitted = 0
    for row in range(64):
        assert scales[1, row] == result.scales[1, row]
        h, w, matrix = row_problem(weight, hessian, result, 32, row)
        others = np.delete(matrix, 1, axis=1)
        best = np.linalg.solve(others.T @ h @ others, others.T @ h @ w)
        found = np.delete(scales[:, row].double().numpy(), 1)
        if (best > 0).all():
            fitted += 1
            assert (np.abs(found - best) <= 2e-3 * np.abs(best)).all()
    assert fitted > 40


def test_a_row_of_zeros_keeps_its_scales() -> None:
    weight, hessian, _ = problem(4, 32, act_order=False)
    weight[5] = 0
    factor = ops.gptq_factorize(hessian, percdamp=0.01)
    result = ops.gptq_quantize(weight, factor, bits=4, group_size=32)
    scales = refit(weight, hessian, result, 32)
    assert torch.equal(scales[:, 5], result.scales[:, 5])
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_is_the_damped_least_squares_solution(act_order: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 96, generator=generator).to(dtype)
    x = torch.randn(400, 96, generator=generator).cumsum(1) / 8
    x[:, 11] = 0  # a dead column
    wanted = x + 0.1 * torch.randn(400, 96, generator=generator)
    hessian, cross = torch.zeros(2, 96, 96)
    ops.accumulate_hessian_(hessian, x)
    ops.accumulate_cross_(cross, wanted - x, x)
    factor = ops.gptq_factorize(hessian, percdamp=0.01, act_order=act_order)
    fitted = fit_weight(weight, cross, factor, tokens=400).double().numpy()

    w, x64 = weight.double().numpy(), x.double().numpy()
    h = x64.T @ x64
    live = np.diag(h) > 0
    ridge = 0.01 * np.diag(h)[live].mean()
    difference = (wanted - x).double().numpy() @ w.T
    solution = np.linalg.solve(h + ridge * np.eye(96), x64.T @ difference).T
    expected = w + 400 / (400 + 2 * 96) * solution
    assert np.abs(fitted - expected).max() < 1e-3 * np.abs(solution).max()
    assert np.array_equal(fitted[:, 11], w[:, 11])


def test_weight_stays_where_inputs_are_the_same() -> None:
    weight, hessian, _ = problem(4, 32, act_order=True)
    factor = ops.gptq_factorize(hessian)
    assert torch.equal(fit_weight(weight, torch.zeros(160, 160), factor, tokens=9), weight)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shape", [(64, 160), (160, 96)])
def test_low_rank_is_the_best_there_is(shape: tuple[int, int], act_order: bool) -> None:
    """What it leaves over is what the smallest singular values of E L say."""
    n, k = shape
    generator = torch.Generator().manual_seed(n)
    error = torch.randn(n, k, generator=generator)
    x = torch.randn(400, k, generator=generator).cumsum(1) / 8
    x[:, 7] = 0  # a dead column: whatever the error is there, it does not count
    hessian = torch.zeros(k, k)
    ops.accumulate_hessian_(hessian, x)
    factor = ops.gptq_factorize(hessian, percdamp=0.01, act_order=act_order)
    h = hessian.double().numpy()
    live = np.diag(h) > 0
    h[np.diag_indices(k)] += 0.01 * np.diag(h)[live].mean()
    e = np.where(live, error.double().numpy(), 0.0)
    singular = np.linalg.svd(e @ np.linalg.cholesky(h), compute_uv=False)
    for rank in (1, 5, 16):
        a, b = fit_low_rank(error, factor, rank=rank)
        assert a.shape == (rank, k) and b.shape == (n, rank) and a.dtype == b.dtype == torch.float32
        rest = e - b.double().numpy() @ a.double().numpy()
        left = np.trace(rest @ h @ rest.T)
        best = (singular[rank:] ** 2).sum()
        assert best * (1 - 1e-6) <= left <= best * 1.01
        lengths = a.float().norm(dim=1), b.float().norm(dim=0)
        torch.testing.assert_close(*lengths, rtol=1e-3, atol=0)
        assert (a[:, 7] == 0).all()
        # The same again, and nothing taken from the caller's random numbers.
        torch.manual_seed(3)
        again = fit_low_rank(error, factor, rank=rank)
        assert torch.equal(again[0], a) and torch.equal(again[1], b)
        drawn = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(1))


def test_low_rank_draws_no_random_numbers_of_others() -> None:
    weight, hessian, _ = problem(3, 32, act_order=False)
    factor = ops.gptq_factorize(hessian, percdamp=0.01)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    first = fit_low_rank(weight, factor, rank=4)
    assert torch.equal(torch.rand(3), wanted)
    torch.rand(5)
    for one, other in zip(first, fit_low_rank(weight, factor, rank=4), strict=True):
        assert torch.equal(one, other)


def test_low_rank_of_full_rank_leaves_nothing() -> None:
    weight, hessian, _ = problem(4, 32, act_order=True)
    factor = ops.gptq_factorize(hessian)
    a, b = fit_low_rank(weight, factor, rank=500)
    assert a.shape == (64, 160)
    torch.testing.assert_close(b @ a, weight, rtol=0, atol=1e-5)
    a, b = fit_low_rank(torch.zeros_like(weight), factor, rank=4)
    assert (b @ a == 0).all() and torch.isfinite(a).all()


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("act_order", [False, True])
def test_dequantized(group_size: int, act_order: bool) -> None:
    _, _, result = problem(3, group_size, act_order)
    packed = (
        ops.pack_qweight(result.codes, bits=3),
        ops.pack_qzeros(result.zeros, bits=3),
    )
    expected = ops.dequantize(
        ops.prepack(*packed, bits=3, group_size=group_size),
        result.scales,
        bits=3,
        group_size=group_size,
        g_idx=result.g_idx,
        in_features=160,
    )
    found = dequantized(
        result.codes, result.scales, result.zeros, group_size=group_size, g_idx=result.g_idx
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

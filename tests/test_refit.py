"""Refitted scales against the float64 solution of the same least-squares problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbitcore import ops
from lowbitcore.refit import refit_scales


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
    return refit_scales(
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


def test_a_row_of_zeros_keeps_its_scales() -> None:
    weight, hessian, _ = problem(4, 32, act_order=False)
    weight[5] = 0
    factor = ops.gptq_factorize(hessian, percdamp=0.01)
    result = ops.gptq_quantize(weight, factor, bits=4, group_size=32)
    scales = refit(weight, hessian, result, 32)
    assert torch.equal(scales[:, 5], result.scales[:, 5])
    assert torch.isfinite(scales).all()

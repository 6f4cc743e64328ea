"""Adapters' products and gradients, held against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.library import opcheck

import lowbitcore as lbc
import reference as ref
from lowbitcore import ops

SCALING = 0.75


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(
    seed: int, rows: int, k: int, n: int, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x, a, b."""
    return (
        randn(seed, rows, n, dtype=dtype),
        randn(seed + 1, rows, k, dtype=dtype),
        randn(seed + 2, rank, k),
        randn(seed + 3, n, rank),
    )


def assert_sum(
    found: Tensor, exact: NDArray[np.float64], magnitude: NDArray[np.float64], terms: int
) -> None:
    """`terms` products and sums in fp32, rounded once to the type of `found`."""
    bound = terms * ref.UNIT_FP32 * magnitude + ref.UNIT_ROUNDOFF[found.dtype] * np.abs(exact)
    ref.assert_close(found, exact, 1.01 * bound + ref.SMALLEST_SUBNORMAL[found.dtype])


# Rows: none, few, not a strip of any level, more than a task of any product takes.
rows = st.sampled_from([0, 1, 4, 5, 16, 17, 31, 49, 65, 100])
ranks = st.sampled_from([0, 1, 3, 4, 8, 15, 16, 28, 64])


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(rows=rows, k=ref.sizes, n=ref.sizes, rank=ranks, seed=ref.seeds)
def test_forward_and_gradients(
    isa: str, dtype: torch.dtype, rows: int, k: int, n: int, rank: int, seed: int
) -> None:
    y, x, a, b = inputs = [item.requires_grad_() for item in case(seed, rows, k, n, rank, dtype)]
    dy = randn(seed + 4, rows, n, dtype=dtype)
    found = ops.add_low_rank(y, x, a, b, scaling=SCALING)
    same, dx, da, db = torch.autograd.grad(found, inputs, dy)
    y64, x64, a64, b64, dy64 = map(ref.as_float64, (y, x, a, b, dy))
    sizes = [np.abs(item) for item in (y64, x64, a64, b64, dy64)]
    abs_y, abs_x, abs_a, abs_b, abs_dy = sizes
    low, abs_low = SCALING * x64 @ a64.T, SCALING * abs_x @ abs_a.T
    d_low, abs_d_low = SCALING * dy64 @ b64, SCALING * abs_dy @ abs_b
    assert found.dtype == dx.dtype == dtype
    assert_sum(found, y64 + low @ b64.T, abs_y + abs_low @ abs_b.T, k + rank + 8)
    assert torch.equal(same, dy)
    assert_sum(dx, d_low @ a64, abs_d_low @ abs_a, n + rank + 8)
    assert_sum(da, d_low.T @ x64, abs_d_low.T @ abs_x, n + rows + 8)
    assert_sum(db, dy64.T @ low, abs_dy.T @ abs_low, k + rows + 8)


@pytest.mark.parametrize("count", [2, 120])
def test_results_do_not_depend_on_threads(isa: str, count: int) -> None:
    """Wide, and of more columns than any product takes at a time."""
    tensors = case(0, count, 2048, 1056, 40, torch.bfloat16)
    dy = randn(9, count, 1056, dtype=torch.bfloat16)

    def run(threads: int) -> list[Tensor]:
        inputs = [item.detach().requires_grad_() for item in tensors]
        with ref.threads(threads):
            y = ops.add_low_rank(*inputs, scaling=2.0)
            return [y, *torch.autograd.grad(y, inputs, dy)]

    one = run(1)
    for threads in (2, 5):
        for got, want in zip(run(threads), one, strict=True):
            assert torch.equal(got, want)
    y, x, a, b = tensors
    torch.testing.assert_close(
        one[0].float(), y.float() + 2.0 * x.float() @ a.T @ b.T, rtol=0.005, atol=0.02
    )


@pytest.mark.parametrize("wanted", ["x", "a", "b", "y", "all"])
def test_only_what_is_asked_for(isa: str, wanted: str) -> None:
    """Inputs are kept for the gradient of `a` alone, and each is the one it is among all."""
    names = ("y", "x", "a", "b")
    tensors = dict(zip(names, case(3, 20, 64, 96, 8, torch.bfloat16), strict=True))
    dy = randn(7, 20, 96, dtype=torch.bfloat16)

    def gradients(chosen: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
        inputs = {k: v.detach().requires_grad_(k in chosen) for k, v in tensors.items()}
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = ops.add_low_rank(*inputs.values(), scaling=SCALING)
        return list(torch.autograd.grad(y, [inputs[name] for name in chosen], dy)), saved

    every, _ = gradients(names)
    chosen = names if wanted == "all" else (wanted,)
    found, saved = gradients(chosen)
    for name, gradient in zip(chosen, found, strict=True):
        assert torch.equal(gradient, every[names.index(name)])
    keeps_x = any(item.shape == tensors["x"].shape for item in saved)
    assert keeps_x == (wanted in ("a", "all"))


def test_any_layout(isa: str) -> None:
    """Leading dimensions, rows apart, factors that lie across."""
    y, x, a, b = case(5, 24, 64, 96, 8, torch.bfloat16)
    expected = ops.add_low_rank(y, x, a, b, scaling=SCALING)
    apart = torch.full((24, 80), torch.nan, dtype=torch.bfloat16)
    apart[:, :64] = x
    across = a.mT.contiguous().mT, b.mT.contiguous().mT
    found = ops.add_low_rank(
        y.view(2, 3, 4, 96), apart[:, :64].view(2, 3, 4, 64), *across, scaling=SCALING
    )
    assert found.shape == (2, 3, 4, 96)
    assert torch.equal(found.view(24, 96), expected)


def test_opcheck(isa: str) -> None:
    lib = torch.ops.lowbitcore
    y, x, a, b = (item.requires_grad_() for item in case(1, 6, 64, 96, 4, torch.bfloat16))
    opcheck(lib.add_low_rank.default, (y, x, a, b, SCALING))
    low = lib.add_low_rank(y, x, a, b, SCALING)[1].detach()
    dy, x, a, b = y.detach(), x.detach(), a.detach(), b.detach()
    opcheck(lib.add_low_rank_backward.default, (dy, x, low, a, b, SCALING, True))
    opcheck(lib.add_low_rank_backward.default, (dy, None, None, a, b, SCALING, True))
    opcheck(lib.add_low_rank_backward.default, (dy, x, None, a, b, SCALING, False))
    opcheck(lib.add_low_rank_backward.default, (dy, None, low, a, b, SCALING, False))


def test_caller_errors(isa: str) -> None:
    y, x, a, b = case(1, 6, 64, 96, 4, torch.bfloat16)
    wrong = {
        "y: expected a positive multiple of 32 columns": (y[:, :90], x, a, b[:90]),
        "x: expected a positive multiple of 32 columns": (y, x[:, :60], a[:, :60], b),
        r"a: expected shape \[4, 32\], got \[4, 64\]": (y, x[:, :32], a, b),
        r"x: expected shape \[6, 64\], got \[5, 64\]": (y, x[:5], a, b),
        r"x: expected shape \[2, 3, 64\], got \[6, 64\]": (y.view(2, 3, 96), x, a, b),
        r"x: expected shape \[6, 64\], got \[2, 3, 64\]": (y, x.view(2, 3, 64), a, b),
        r"x: expected the type of y \(bfloat16\), got float32": (y, x.float(), a, b),
        "a: expected float32": (y, x, a.bfloat16(), b),
        r"b: expected shape \[96, 4\], got \[96, 3\]": (y, x, a, b[:, :3]),
        r"a: expected 2 dimensions, got \(64,\)": (y, x, a[0], b),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=f"add_low_rank: {message}"):
            ops.add_low_rank(*arguments, scaling=1.0)
    with pytest.raises((ValueError, lbc.Error), match="add_low_rank"):
        ops.add_low_rank(y, x, a.to("meta"), b, scaling=1.0)

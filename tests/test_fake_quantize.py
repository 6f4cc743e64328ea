"""Weights in training: what they are, and what their gradients are, at every level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref
from lowbitcore import ops
from lowbitcore.ops import fake_quantization

Group = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def groups(seed: int, rows: int, columns: int, bits: int, layout: str = "contiguous") -> Group:
    """Latent values on the grid, halfway between its points, and beyond its ends."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(-3, 2**bits + 2, (rows, columns))
    halves = rng.integers(-4, 2 ** (bits + 1) + 4, (rows, columns)) / 2
    latent = ref.random_activations(seed, rows, columns, torch.float32, layout=layout)
    latent.copy_(torch.from_numpy(np.where(rng.random((rows, columns)) < 0.5, spread, halves)))
    scales = 0.1 * torch.from_numpy(rng.random((rows, 1))).float()
    return latent, scales, torch.from_numpy(rng.integers(0, 2**bits, (rows, 1))).float()


def steps(latent: torch.Tensor, zeros: torch.Tensor, bits: int) -> ref.F64:
    return np.clip(np.rint(ref.as_float64(latent)), 0, 2**bits - 1) - ref.as_float64(zeros)


draws = {
    "bits": st.sampled_from(ref.BITS),
    "rows": st.sampled_from(ref.ROWS),
    "columns": ref.sizes,
    "layout": st.sampled_from(ref.LAYOUTS),
    "seed": ref.seeds,
}


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(**draws)
def test_weights(
    isa: str, dtype: torch.dtype, bits: int, rows: int, columns: int, layout: str, seed: int
) -> None:
    latent, scales, zeros = groups(seed, rows, columns, bits, layout)
    base = ref.random_activations(seed, rows, columns, dtype)
    product = ref.as_float64(scales) * steps(latent, zeros, bits)
    expected = ref.as_float64(base) + product
    magnitude = np.abs(ref.as_float64(base)) + np.abs(product)
    ops.add_fake_quantized_(base, latent, scales, zeros, bits=bits)
    ref.assert_close(base, expected, ref.error_bound(magnitude, expected, terms=2, dtype=dtype))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(**draws)
def test_gradients(
    isa: str, dtype: torch.dtype, bits: int, rows: int, columns: int, layout: str, seed: int
) -> None:
    latent, scales, zeros = groups(seed, rows, columns, bits, layout)
    dw = ref.random_activations(seed, rows, columns, dtype, layout=layout)
    d_latent, d_scales = ops.fake_quantized_grads(dw, latent, scales, zeros, bits=bits)
    assert torch.equal(d_latent, dw.float() * scales)
    products = ref.as_float64(dw) * steps(latent, zeros, bits)
    expected = products.sum(1, keepdims=True)
    magnitude = np.abs(products).sum(1, keepdims=True)
    bound = ref.error_bound(magnitude, expected, terms=columns, dtype=torch.float32)
    ref.assert_close(d_scales, expected, bound)


def test_they_do_not_depend_on_threads(isa: str) -> None:
    group = groups(1, 300, 96, 3)
    dw = torch.randn(300, 96)
    found = []
    for count in (1, 2, 5):
        weight = torch.zeros(300, 96)
        with ref.threads(count):
            ops.add_fake_quantized_(weight, *group, bits=3)
            found.append((weight, *ops.fake_quantized_grads(dw, *group, bits=3)))
    for one, other in zip(found[0] * 2, found[1] + found[2], strict=True):
        assert torch.equal(one, other)


def test_weights_that_lie_apart(isa: str) -> None:
    storage = torch.full((40, 80), 7.0)
    weight = storage[:, :64]
    group = groups(2, 40, 64, 4)
    expected = torch.full((40, 64), 7.0)
    ops.add_fake_quantized_(expected, *group, bits=4)
    ops.add_fake_quantized_(weight, *group, bits=4)
    assert torch.equal(weight, expected) and (storage[:, 64:] == 7).all()


def test_more_dimensions(isa: str) -> None:
    latent, scales, zeros = groups(3, 12, 64, 2)
    flat, deep = torch.zeros(12, 64), torch.zeros(4, 3, 64)
    ops.add_fake_quantized_(flat, latent, scales, zeros, bits=2)
    group = latent.view(4, 3, 64), scales.view(4, 3, 1), zeros.view(4, 3, 1)
    ops.add_fake_quantized_(deep, *group, bits=2)
    assert torch.equal(deep.view(12, 64), flat)
    d_latent, d_scales = ops.fake_quantized_grads(deep, *group, bits=2)
    assert d_latent.shape == (4, 3, 64) and d_scales.shape == (4, 3, 1)


def test_what_is_not_a_number_stays_that(isa: str) -> None:
    latent, scales, zeros = groups(4, 2, 32, 4)
    latent[1, 5] = torch.nan
    weight = torch.zeros(2, 32)
    ops.add_fake_quantized_(weight, latent, scales, zeros, bits=4)
    assert weight.isnan().nonzero().tolist() == [[1, 5]]
    _, d_scales = ops.fake_quantized_grads(torch.ones(2, 32), latent, scales, zeros, bits=4)
    assert d_scales.isnan().nonzero().tolist() == [[1, 0]]


# ---- the same on CUDA, which is torch's: here on the CPU, where it can run as well ----


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_with_torch(dtype: torch.dtype) -> None:
    latent, scales, zeros = groups(5, 30, 96, 4)
    dw = ref.random_activations(5, 30, 96, dtype)
    weights = [dw.clone(), dw.clone()]
    ops.add_fake_quantized_(weights[0], latent, scales, zeros, bits=4)
    fake_quantization._add_with_torch(weights[1], latent, scales, zeros, 4)
    # Rounded twice or once before 16 bits: rarely another neighbour.
    torch.testing.assert_close(weights[0], weights[1])
    ours = ops.fake_quantized_grads(dw, latent, scales, zeros, bits=4)
    theirs = fake_quantization._grads_with_torch(dw, latent, scales, zeros, 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"latent": torch.zeros(3, 40)}, "latent: expected a positive multiple of 32 columns"),
        ({"latent": torch.zeros(3, 64).double()}, "latent: expected float32"),
        ({"scales": torch.zeros(3, 2)}, r"scales: expected shape \[3, 1\], got \[3, 2\]"),
        ({"zeros": torch.zeros(4, 1)}, r"zeros: expected shape \[3, 1\], got \[4, 1\]"),
        ({"out": torch.zeros(3, 32)}, r"(out|dw): expected shape \[3, 64\], got \[3, 32\]"),
        ({"out": torch.zeros(3, 64).int()}, "(out|dw): expected float32, bfloat16 or float16"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor], expected: str) -> None:
    fine = {
        "out": torch.zeros(3, 64),
        "latent": torch.zeros(3, 64),
        "scales": torch.zeros(3, 1),
        "zeros": torch.zeros(3, 1),
    }
    args = list((fine | change).values())
    calls: list[Callable[[], object]] = [
        lambda: ops.add_fake_quantized_(*args, bits=4),
        lambda: fake_quantization._add_with_torch(*args, 4),
        lambda: ops.fake_quantized_grads(*args, bits=4),
        lambda: fake_quantization._grads_with_torch(*args, 4),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=expected):
            call()

"""The float64 oracle: what every operation means, written from the mathematics and in plain numpy.

Nothing here knows how the core computes. Notation (N out_features, K in_features, G groups):

    codes [N, K], zeros [G, N], scales [G, N], group(k) = g_idx[k] or k // group_size
    w_hat[n, k] = scales[group(k), n] * (codes[n, k] - zeros[group(k), n])

Beside the oracle stand the a-priori error bound the kernels have to keep (`error_bound`), the
comparator (`assert_close`; tests/test_reference.py shows that it can fail) and the random problems
tests are run on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from lowbitcore import runtime

F64 = NDArray[np.float64]

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 65, 130)
GROUP_SIZES = (32, 64, 96, 128, -1)
G_IDX_KINDS = ("none", "trivial", "permuted", "ragged")

UNIT_FP32 = 2.0**-24
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_SUBNORMAL = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


# ------------------------------------------------------------------------------------------- format


def group_count(in_features: int, group_size: int) -> int:
    """Groups along K; the last one may be short, -1 is one group for the whole row."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def group_of_column(
    in_features: int, group_size: int, g_idx: NDArray[Any] | None = None
) -> NDArray[np.int64]:
    """Group of each input column, [K]."""
    if g_idx is not None:
        return np.asarray(g_idx, dtype=np.int64)
    size = in_features if group_size == -1 else group_size
    return np.arange(in_features) // size


def pack_stream(fields: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """LSB-first bit stream of `bits`-wide fields along the last axis, cut into 32-bit words.

    [..., F] -> [..., F * bits / 32]. Goes through single bits, so that 3-bit needs no special case.
    """
    single = (fields[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = single.reshape(*fields.shape[:-1], fields.shape[-1] * bits)
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def unpack_stream(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Inverse of `pack_stream`: [..., W] -> [..., W * 32 / bits]."""
    octets = np.ascontiguousarray(words).astype("<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    single = stream.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits, bits)
    return (single << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)


def pack_qweight(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """[N, K] -> GPTQ `qweight` [K * bits / 32, N]: a column holds one output's stream."""
    return np.ascontiguousarray(pack_stream(codes, bits).T)


def unpack_qweight(qweight: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """GPTQ `qweight` [K * bits / 32, N] -> codes [N, K]."""
    return unpack_stream(np.ascontiguousarray(qweight.T), bits)


def pack_qzeros(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """[G, N] -> GPTQ `qzeros` [G, N * bits / 32]: streams along N of z itself (`gptq_v2`)."""
    return pack_stream(zeros, bits)


def unpack_qzeros(qzeros: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """GPTQ `qzeros` [G, N * bits / 32] -> zeros [G, N]."""
    return unpack_stream(qzeros, bits)


# --------------------------------------------------------------------------------------- operations


def dequantize(
    codes: NDArray[np.uint8],
    scales: NDArray[Any],
    zeros: NDArray[np.uint8],
    *,
    group_size: int,
    g_idx: NDArray[Any] | None = None,
) -> F64:
    """w_hat [N, K] in float64: exact, a product of an fp32 and a 9-bit integer fits."""
    group = group_of_column(codes.shape[1], group_size, g_idx)
    integers = codes.astype(np.float64) - zeros.astype(np.float64)[group].T
    return scales.astype(np.float64)[group].T * integers


def qgemm_nt(x: F64, w_hat: F64, bias: F64 | None = None) -> F64:
    """Y[m, n] = sum_k X[m, k] w_hat[n, k] (+ bias[n]); [M, K], [N, K] -> [M, N]."""
    return x @ w_hat.T + (0.0 if bias is None else bias)


def qgemm_nn(dy: F64, w_hat: F64) -> F64:
    """dX[m, k] = sum_n dY[m, n] w_hat[n, k]; [M, N], [N, K] -> [M, K]."""
    return dy @ w_hat


def qgemm_grad_scales(
    dy: F64,
    x: F64,
    codes: NDArray[np.uint8],
    zeros: NDArray[np.uint8],
    *,
    group_size: int,
    g_idx: NDArray[Any] | None = None,
) -> F64:
    """dS[g, n] = sum over k in g of (codes[n, k] - zeros[g, n]) sum_m dY[m, n] X[m, k]."""
    integers = dequantize(codes, np.ones(zeros.shape), zeros, group_size=group_size, g_idx=g_idx)
    return _sum_groups(_dense_grad(dy, x) * integers, zeros.shape[0], group_size, g_idx)


def _dense_grad(dy: F64, x: F64) -> F64:
    return dy.T @ x


def _sum_groups(per_weight: F64, groups: int, group_size: int, g_idx: NDArray[Any] | None) -> F64:
    """[N, K] -> [G, N]."""
    out = np.zeros((groups, per_weight.shape[0]))
    np.add.at(out, group_of_column(per_weight.shape[1], group_size, g_idx), per_weight.T)
    return out


# ------------------------------------------------------------------------------------- quantization


def minmax_grid(
    weights: NDArray[Any], bits: int, sym: bool
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scale (fp32, exact in fp16) and zero point of each row of one group: [N, g] -> [N], [N].

    The scale is rounded to fp16 before any integer is chosen: it is what the file will hold.
    """
    weights = weights.astype(np.float32)
    top = np.float32(2**bits - 1)
    low = np.minimum(weights.min(axis=1), np.float32(0))
    high = np.maximum(weights.max(axis=1), np.float32(0))
    span = np.float32(2) * np.maximum(-low, high) if sym else high - low
    rounded = (span / top).astype(np.float16).astype(np.float32)
    # A span too small for fp16 gets the smallest scale there is, and one of zeros a harmless one.
    empty = span == 0
    scale = np.where(empty, np.float32(1), np.maximum(rounded, np.float32(2.0**-24)))
    zero = (
        np.full(low.shape, np.float32(2 ** (bits - 1)))
        if sym
        else np.clip(np.rint(-low / scale), 0, top)
    )
    if not sym:
        zero[empty] = 0
    return scale, zero.astype(np.uint8)


def nearest_codes(
    weights: NDArray[Any], scale: NDArray[np.float32], zero: NDArray[np.uint8], bits: int
) -> NDArray[np.uint8]:
    """Codes of weights [N, g], in their own precision, on a given grid; ties to even."""
    steps = np.rint(weights / scale[:, None].astype(weights.dtype))
    return np.clip(steps + zero[:, None], 0, 2**bits - 1).astype(np.uint8)


def quantize_rtn(
    weight: NDArray[np.float32], *, bits: int, group_size: int, sym: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Round to nearest on the min-max grid: [N, K] -> codes [N, K], scales [G, N], zeros [G, N]."""
    rows, columns = weight.shape
    groups = group_count(columns, group_size)
    codes = np.zeros((rows, columns), dtype=np.uint8)
    scales = np.zeros((groups, rows), dtype=np.float32)
    zeros = np.zeros((groups, rows), dtype=np.uint8)
    group = group_of_column(columns, group_size)
    for index in range(groups):
        members = group == index
        scales[index], zeros[index] = minmax_grid(weight[:, members], bits, sym)
        codes[:, members] = nearest_codes(weight[:, members], scales[index], zeros[index], bits)
    return codes, scales, zeros


@dataclass(frozen=True)
class GptqReference:
    """What `gptq` found; codes in original column order, `g_idx` None where it is trivial."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    g_idx: NDArray[np.int32] | None
    objective: float
    """sum over columns of ((w - w_hat) / U_jj)^2, which equals tr(E (H + damping) E^T)."""


def damped(hessian: F64, percdamp: float) -> F64:
    """H + percdamp * mean * I, the mean taken over the diagonal of columns that ever saw an input.

    The others (H_ii = 0) get the mean on their diagonal: any positive value gives the same codes,
    and this one keeps the result independent of the Hessian's unit.
    """
    out = np.array(hessian, dtype=np.float64)
    diagonal = np.diag_indices_from(out)
    alive = out[diagonal] != 0
    mean = out[diagonal][alive].mean() if alive.any() else 1.0
    out[diagonal] = np.where(alive, out[diagonal], mean) + percdamp * mean
    return out


def gptq(
    weight: NDArray[Any],
    hessian: NDArray[Any],
    *,
    bits: int,
    group_size: int,
    sym: bool = False,
    percdamp: float = 0.01,
    act_order: bool = True,
    static_groups: bool = True,
) -> GptqReference:
    """Textbook GPTQ (Frantar et al., 2210.17323, algorithm 1) in float64, one column at a time.

    The inverse Hessian is formed explicitly and its Cholesky factor taken, as the paper says; no
    blocks, no lazy updates. Grids come from `minmax_grid` in fp32: of the original weights
    (`static_groups`), or of the weights as updated when the first column of a group is reached.
    """
    rows, columns = np.shape(weight)
    diagonal = np.diag(hessian)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(columns)
    full = damped(np.asarray(hessian, dtype=np.float64), percdamp)[np.ix_(order, order)]
    factor = np.linalg.cholesky(np.linalg.inv(full)).T

    # From here to the return everything is in processing order.
    work = np.where(diagonal == 0, 0.0, np.asarray(weight, dtype=np.float64))[:, order]
    size = columns if group_size == -1 else group_size
    groups = group_count(columns, group_size)
    group = (order if static_groups else np.arange(columns)) // size
    scales = np.zeros((groups, rows), dtype=np.float32)
    zeros = np.zeros((groups, rows), dtype=np.uint8)
    if static_groups:
        for index in range(groups):
            scales[index], zeros[index] = minmax_grid(work[:, group == index], bits, sym)

    codes = np.zeros((rows, columns), dtype=np.uint8)
    objective = 0.0
    for j, index in enumerate(group):
        if not static_groups and j % size == 0:
            scales[index], zeros[index] = minmax_grid(work[:, group == index], bits, sym)
        codes[:, j] = nearest_codes(work[:, j : j + 1], scales[index], zeros[index], bits)[:, 0]
        kept = scales[index].astype(np.float64) * (codes[:, j].astype(np.float64) - zeros[index])
        error = (work[:, j] - kept) / factor[j, j]
        objective += float(error @ error)
        work[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :])

    original = np.argsort(order)
    permuted = (not static_groups) and act_order and groups > 1
    g_idx = group[original].astype(np.int32) if permuted else None
    return GptqReference(codes[:, original], scales, zeros, g_idx, objective)


def hessian_error(weight: NDArray[Any], w_hat: F64, hessian: NDArray[Any]) -> float:
    """tr(E H E^T) with E = weight - w_hat: what quantization costs in the layer's output."""
    error = np.asarray(weight, dtype=np.float64) - w_hat
    return float(((error @ np.asarray(hessian, dtype=np.float64)) * error).sum())


# --------------------------------------------------------------------------------------- comparator


def gamma(terms: int) -> float:
    """Higham's gamma_n for fp32: n u / (1 - n u)."""
    return terms * UNIT_FP32 / (1.0 - terms * UNIT_FP32)


# Levels that multiply bf16 activations in pairs: with weights rounded to bf16 but for `nt` of up
# to EXACT_ROWS rows, and with subnormals counted as zero.
PAIR_LEVELS = ("avx512_bf16", "amx", "amx_emulated")
EXACT_ROWS = 16


def multiplies_pairs(*operands: torch.Tensor) -> bool:
    return runtime.isa() in PAIR_LEVELS and all(item.dtype == torch.bfloat16 for item in operands)


def pair_error(
    *operands: torch.Tensor, terms: int, weights: float = 1.0, rounded: F64 | None = None
) -> F64 | float:
    """What multiplying in pairs adds to `error_bound`, 0 where these operands are not.

    Each of `terms` products, and each sum on the way, may lose a subnormal, times up to `weights`;
    `rounded`: the magnitude of sums over weights that are rounded to bf16.
    """
    if not multiplies_pairs(*operands):
        return 0.0
    largest = [
        float(item.detach().float().abs().amax()) if item.numel() else 0.0 for item in operands
    ]
    lost = terms * torch.finfo(torch.bfloat16).tiny * (1.0 + sum(largest)) * (1.0 + weights)
    return lost if rounded is None else lost + 1.01 * UNIT_ROUNDOFF[torch.bfloat16] * rounded


def error_bound(magnitude: F64, expected: F64, *, terms: int, dtype: torch.dtype) -> F64:
    """A-priori elementwise bound of `terms` products summed in fp32 and rounded once to `dtype`.

    `magnitude` is the same sum over absolute values (|X||W_hat|^T). Inputs of 16 bits are exact in
    fp32, so that only accumulation, gamma_terms * magnitude, and the rounding of the output,
    u * |expected|, count. The three extra terms are the products' own roundings; the last summand
    is underflow, in the sum (an integer of up to 8 bits may multiply what an underflowed product
    lost) and in the output.
    """
    accumulated = gamma(terms + 3) * magnitude
    underflow = (terms + 3) * 256 * SMALLEST_SUBNORMAL[torch.float32] + SMALLEST_SUBNORMAL[
        dtype
    ] / 2
    return accumulated + UNIT_ROUNDOFF[dtype] * (np.abs(expected) + accumulated) + underflow


def assert_close(got: torch.Tensor, expected: F64, tolerance: F64) -> None:
    """Every element within its own tolerance; NaN anywhere fails.

    Infinity is accepted only where the dtype of `got` cannot hold the expected value.
    """
    assert tuple(got.shape) == expected.shape, (
        f"shape: expected {expected.shape}, got {tuple(got.shape)}"
    )
    actual = as_float64(got)
    overflows = np.abs(expected) + tolerance >= torch.finfo(got.dtype).max
    excused = overflows & np.isinf(actual) & (np.sign(actual) == np.sign(expected))
    with np.errstate(invalid="ignore"):
        error = np.where(excused, 0.0, np.abs(actual - expected))
    within = error <= tolerance
    if not within.all():
        first = tuple(int(i) for i in np.argwhere(~within)[0])
        raise AssertionError(
            f"{(~within).sum()} of {within.size} elements out of bounds, first at {first}: "
            f"got {actual[first]!r}, expected {expected[first]!r}, tolerance {tolerance[first]:.3g}"
        )


def expect_nt(x: torch.Tensor, w_hat: F64, bias: torch.Tensor | None = None) -> tuple[F64, F64]:
    """Expected Y [M, N] and its tolerance for x [M, K] of any dtype."""
    x64 = as_float64(x)
    bias64 = None if bias is None else as_float64(bias)
    expected = qgemm_nt(x64, w_hat, bias64)
    magnitude = qgemm_nt(np.abs(x64), np.abs(w_hat), None if bias64 is None else np.abs(bias64))
    terms = w_hat.shape[1] + (bias is not None)
    rounded = magnitude if len(x) > EXACT_ROWS else None
    pairs = pair_error(x, terms=terms, weights=np.abs(w_hat).max(), rounded=rounded)
    return expected, error_bound(magnitude, expected, terms=terms, dtype=x.dtype) + pairs


def expect_nn(dy: torch.Tensor, w_hat: F64) -> tuple[F64, F64]:
    """Expected dX [M, K] and its tolerance for dy [M, N] of any dtype."""
    dy64 = as_float64(dy)
    expected = qgemm_nn(dy64, w_hat)
    magnitude = qgemm_nn(np.abs(dy64), np.abs(w_hat))
    terms = w_hat.shape[0]
    pairs = pair_error(dy, terms=terms, weights=np.abs(w_hat).max(), rounded=magnitude)
    return expected, error_bound(magnitude, expected, terms=terms, dtype=dy.dtype) + pairs


def expect_grad_scales(dy: torch.Tensor, x: torch.Tensor, problem: Problem) -> tuple[F64, F64]:
    """Expected dS [G, N] and its tolerance; a sum over M and over the columns of a group."""
    args = (problem.codes, problem.zeros)
    where = {"group_size": problem.group_size, "g_idx": problem.g_idx}
    dy64, x64 = as_float64(dy), as_float64(x)
    expected = qgemm_grad_scales(dy64, x64, *args, **where)
    absolute = np.abs(
        dequantize(problem.codes, np.ones(problem.zeros.shape), problem.zeros, **where)
    )
    products = _dense_grad(np.abs(dy64), np.abs(x64)) * absolute
    magnitude = _sum_groups(products, problem.zeros.shape[0], problem.group_size, problem.g_idx)
    terms = x.shape[0] + problem.in_features
    pairs = pair_error(dy, x, terms=x.shape[0], weights=255.0 * problem.in_features)
    return expected, error_bound(magnitude, expected, terms=terms, dtype=torch.float32) + pairs


def as_float64(values: torch.Tensor) -> F64:
    """Exact float64 copy of a tensor of any real dtype."""
    return values.detach().to(torch.float64).contiguous().numpy().copy()


# ----------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A quantized matrix in plain arrays; without `g_idx`, k is in group k // group_size."""

    bits: int
    group_size: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    g_idx: NDArray[np.int32] | None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @cached_property
    def w_hat(self) -> F64:
        """[N, K] in float64."""
        return dequantize(
            self.codes, self.scales, self.zeros, group_size=self.group_size, g_idx=self.g_idx
        )

    @property
    def group(self) -> NDArray[np.int64]:
        """Group of each column, [K]."""
        return group_of_column(self.in_features, self.group_size, self.g_idx)

    def qweight(self) -> torch.Tensor:
        return torch.from_numpy(pack_qweight(self.codes, self.bits))

    def qzeros(self) -> torch.Tensor:
        return torch.from_numpy(pack_qzeros(self.zeros, self.bits))

    def scales_tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.scales.copy())

    def g_idx_tensor(self) -> torch.Tensor | None:
        return None if self.g_idx is None else torch.from_numpy(self.g_idx.copy())


def random_problem(
    seed: int,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    sym: bool = False,
    g_idx: str = "none",
    values: str = "plain",
) -> Problem:
    """A random quantized matrix.

    `g_idx`: "none", "trivial" (given, but k // group_size), "permuted" (as act-order leaves it),
    "ragged" (any group for any column: some groups large, some perhaps empty). `values`: "plain"
    scales like a trained layer's, or "adversarial": zeros, subnormals, huge and negative ones.
    """
    rng = np.random.default_rng(seed)
    groups = group_count(in_features, group_size)
    top = 2**bits - 1
    codes = rng.integers(0, top + 1, (out_features, in_features), dtype=np.uint8)
    zeros = rng.integers(0, top + 1, (groups, out_features), dtype=np.uint8)
    if sym:
        zeros[:] = 2 ** (bits - 1)
    scales = (0.02 * np.exp(0.5 * rng.standard_normal((groups, out_features)))).astype(np.float32)
    if values == "adversarial":
        odd = np.array([0.0, 1e-40, -1e-3, 1e-30, 1e4, -3e2, 1.0, 2.0**-14], dtype=np.float32)
        scales = np.where(rng.random(scales.shape) < 0.7, rng.choice(odd, scales.shape), scales)
    trivial = group_of_column(in_features, group_size).astype(np.int32)
    index: NDArray[np.int32] | None = {
        "none": lambda: None,
        "trivial": lambda: trivial,
        "permuted": lambda: rng.permutation(trivial),
        "ragged": lambda: rng.integers(0, groups, in_features, dtype=np.int32),
    }[g_idx]()
    return Problem(bits, group_size, codes, scales, zeros, index)


def random_activations(
    seed: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    values: str = "plain",
    layout: str = "contiguous",
) -> torch.Tensor:
    """[rows, columns] with the given memory layout.

    `layout`: "contiguous", "strided" (rows lie further apart than they are long, NaN in the gap),
    "offset" (contiguous, but starting at an odd element of its storage), "transposed"
    (column-major).
    """
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((rows, columns))
    if values == "adversarial":
        odd = np.array([0.0, -0.0, 1e-42, 6e-8, -1e-6, 1e4, -3e3, 65504.0, 1.0])
        data = np.where(rng.random(data.shape) < 0.6, rng.choice(odd, data.shape), data)
    plain = torch.from_numpy(data).to(dtype)
    if layout == "strided":
        wide = torch.full((rows, columns + 7), torch.nan, dtype=dtype)
        wide[:, 3 : 3 + columns] = plain
        return wide[:, 3 : 3 + columns]
    if layout == "offset":
        storage = torch.full((rows * columns + 1,), torch.nan, dtype=dtype)
        storage[1:] = plain.flatten()
        return storage[1:].view(rows, columns)
    if layout == "transposed":
        return plain.t().contiguous().t()
    return plain


LAYOUTS = ("contiguous", "strided", "offset", "transposed")

sizes = st.integers(1, 9).map(lambda blocks: 32 * blocks)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def problems(draw: st.DrawFn, bits: int | None = None) -> Problem:
    """Any quantized matrix of up to 288 x 288, with any group size."""
    return random_problem(
        draw(seeds),
        bits=draw(st.sampled_from(BITS)) if bits is None else bits,
        group_size=draw(st.one_of(st.just(-1), st.integers(1, 10).map(lambda blocks: 32 * blocks))),
        out_features=draw(sizes),
        in_features=draw(sizes),
        sym=draw(st.booleans()),
        g_idx=draw(st.sampled_from(G_IDX_KINDS)),
        values=draw(st.sampled_from(("plain", "plain", "adversarial"))),
    )


@lru_cache
def correlated_hessian(seed: int, columns: int, *, samples: int | None = None) -> F64:
    """X^T X, exact in fp32, of inputs whose columns differ in size and are correlated.

    With the default number of samples, eight a column, it is well conditioned.
    """
    rng = np.random.default_rng(seed)
    samples = 8 * columns if samples is None else samples
    mixing = np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)) / np.sqrt(columns)
    x = (
        rng.standard_normal((samples, columns))
        @ mixing
        * np.exp(0.5 * rng.standard_normal(columns))
    )
    product = (x.T @ x).astype(np.float32).astype(np.float64)
    product = (product + product.T) / 2
    product.flags.writeable = False  # it is shared
    return product


# ------------------------------------------------------------------------------------- core's state


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run the core's kernels of one instruction set."""
    from lowbitcore import runtime

    previous = runtime.force_isa(name)
    try:
        assert runtime.isa() == name
        yield
    finally:
        runtime.force_isa(previous)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the core with `count` threads."""
    from lowbitcore import runtime

    previous = runtime.num_threads()
    runtime.set_num_threads(count)
    try:
        yield
    finally:
        runtime.set_num_threads(previous)

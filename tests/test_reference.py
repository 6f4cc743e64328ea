"""The oracle and the comparator are tested before anything is tested with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref

# --------------------------------------------------------------------------------------- comparator


def compared(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """A right answer, what is expected, and the bound: what the corruptions below start from."""
    problem = ref.random_problem(0, bits=4, group_size=64, out_features=64, in_features=160)
    x = ref.random_activations(1, 9, 160, dtype)
    expected, tolerance = ref.expect_nt(x, problem.w_hat)
    return torch.from_numpy(expected).to(dtype), expected, tolerance


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_comparator_accepts_the_rounded_truth(dtype: torch.dtype) -> None:
    ref.assert_close(*compared(dtype))


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_comparator_accepts_a_naive_fp32_sum(dtype: torch.dtype) -> None:
    problem = ref.random_problem(
        0, bits=3, group_size=96, out_features=32, in_features=288, g_idx="ragged"
    )
    x = ref.random_activations(1, 5, 288, dtype)
    expected, tolerance = ref.expect_nt(x, problem.w_hat)
    total = np.zeros(expected.shape, dtype=np.float32)
    for k in range(288):
        total += np.outer(ref.as_float64(x)[:, k], problem.w_hat[:, k]).astype(np.float32)
    ref.assert_close(torch.from_numpy(total).to(dtype), expected, tolerance)


def one_nan(y: torch.Tensor) -> torch.Tensor:
    y[3, 5] = torch.nan
    return y


def one_infinity(y: torch.Tensor) -> torch.Tensor:
    y[0, 0] = torch.inf
    return y


def one_sign(y: torch.Tensor) -> torch.Tensor:
    y[8, 63] = -y[8, 63]
    return y


def one_element(y: torch.Tensor) -> torch.Tensor:
    y[4, 4] *= 1.05
    return y


def one_zero(y: torch.Tensor) -> torch.Tensor:
    y[2, 7] = 0
    return y


def two_rows_swapped(y: torch.Tensor) -> torch.Tensor:
    return y[[1, 0, *range(2, 9)]]


def shifted_by_one_column(y: torch.Tensor) -> torch.Tensor:
    return y.roll(1, dims=1)


CORRUPTIONS = (
    one_nan,
    one_infinity,
    one_sign,
    one_element,
    one_zero,
    two_rows_swapped,
    shifted_by_one_column,
    torch.neg,
    torch.zeros_like,
)


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)
def test_comparator_rejects(corrupt, dtype: torch.dtype) -> None:
    right, expected, tolerance = compared(dtype)
    with pytest.raises(AssertionError, match="out of bounds"):
        ref.assert_close(corrupt(right), expected, tolerance)


def test_comparator_rejects_all_nan_and_wrong_shape() -> None:
    right, expected, tolerance = compared()
    with pytest.raises(AssertionError, match="576 of 576"):
        ref.assert_close(torch.full_like(right, torch.nan), expected, tolerance)
    with pytest.raises(AssertionError, match="shape"):
        ref.assert_close(right[:1], expected, tolerance)


def test_comparator_rejects_activations_rounded_to_bf16() -> None:
    """fp32 inputs silently rounded to bf16 are exactly the fault the fp32 bound has to see."""
    problem = ref.random_problem(0, bits=4, group_size=64, out_features=64, in_features=256)
    x = ref.random_activations(1, 16, 256, torch.float32)
    expected, tolerance = ref.expect_nt(x, problem.w_hat)
    rounded = ref.qgemm_nt(ref.as_float64(x.bfloat16()), problem.w_hat)
    with pytest.raises(AssertionError, match="out of bounds"):
        ref.assert_close(torch.from_numpy(rounded).float(), expected, tolerance)


@pytest.mark.parametrize(
    "fault", ["groups", "zero point", "one code", "g_idx ignored", "zeros off by one"]
)
def test_comparator_rejects_wrong_weights(fault: str) -> None:
    p = ref.random_problem(
        0, bits=4, group_size=32, out_features=32, in_features=96, g_idx="permuted"
    )
    x = ref.random_activations(1, 4, 96, torch.bfloat16)
    expected, tolerance = ref.expect_nt(x, p.w_hat)
    codes, scales, zeros, g_idx = p.codes.copy(), p.scales.copy(), p.zeros.copy(), p.g_idx
    if fault == "groups":
        scales = scales[[1, 0, 2]]
    elif fault == "zero point":
        zeros[1, 3] ^= 8
    elif fault == "one code":
        codes[7, 50] ^= 8
    elif fault == "g_idx ignored":
        g_idx = None
    else:
        zeros -= 1
    wrong = ref.dequantize(codes, scales, zeros, group_size=32, g_idx=g_idx)
    with pytest.raises(AssertionError, match="out of bounds"):
        ref.assert_close(
            torch.from_numpy(ref.qgemm_nt(ref.as_float64(x), wrong)).bfloat16(), expected, tolerance
        )


def test_comparator_takes_infinity_only_where_the_dtype_overflows() -> None:
    expected = np.array([1e6, -1e6, 60000.0])
    tolerance = ref.error_bound(np.abs(expected), expected, terms=32, dtype=torch.float16)
    inf = torch.inf
    ref.assert_close(torch.tensor([inf, -inf, 60000.0], dtype=torch.float16), expected, tolerance)
    for wrong in (
        [inf, inf, 60000.0],
        [inf, -inf, inf],
        [65504.0, -inf, 60000.0],
        [inf, torch.nan, 60000.0],
    ):
        with pytest.raises(AssertionError, match="1 of 3 elements"):
            ref.assert_close(torch.tensor(wrong, dtype=torch.float16), expected, tolerance)


# ------------------------------------------------------------------------------------------- oracle


@given(
    bits=st.sampled_from(ref.BITS), seed=ref.seeds, rows=st.integers(0, 5), blocks=st.integers(1, 5)
)
def test_streams_round_trip(bits: int, seed: int, rows: int, blocks: int) -> None:
    fields = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * blocks), dtype=np.uint8)
    words = ref.pack_stream(fields, bits)
    assert words.shape == (rows, blocks * bits)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(ref.unpack_stream(words, bits), fields)


def test_three_bit_words_follow_the_design() -> None:
    """w0 = v0..9, v10's low 2 bits; w1 = v10 >> 2, v11..20, v21's low bit; w2 = the rest."""
    v = [int(i) for i in np.random.default_rng(0).integers(0, 8, 32)]
    words = [
        sum(v[i] << 3 * i for i in range(10)) | (v[10] & 3) << 30,
        v[10] >> 2 | sum(v[i] << 3 * (i - 11) + 1 for i in range(11, 21)) | (v[21] & 1) << 31,
        v[21] >> 1 | sum(v[i] << 3 * (i - 22) + 2 for i in range(22, 32)),
    ]
    packed = ref.pack_stream(np.array(v, dtype=np.uint8), 3)
    assert [int(w) & 0xFFFFFFFF for w in packed] == words


@given(problem=ref.problems())
def test_oracle_agrees_with_the_definition(problem: ref.Problem) -> None:
    """One weight, one output, one gradient picked at random and computed with Python loops."""
    p = problem
    rng = np.random.default_rng(0)
    n, k = int(rng.integers(p.out_features)), int(rng.integers(p.in_features))
    size = p.in_features if p.group_size == -1 else p.group_size
    groups = [j // size if p.g_idx is None else int(p.g_idx[j]) for j in range(p.in_features)]

    def weight(row: int, column: int) -> float:
        g = groups[column]
        return float(p.scales[g, row]) * (int(p.codes[row, column]) - int(p.zeros[g, row]))

    assert p.w_hat[n, k] == weight(n, k)
    x, dy = rng.standard_normal((3, p.in_features)), rng.standard_normal((3, p.out_features))
    y = sum(x[2, j] * weight(n, j) for j in range(p.in_features))
    np.testing.assert_allclose(ref.qgemm_nt(x, p.w_hat)[2, n], y, rtol=1e-9, atol=1e-9)
    dx = sum(dy[1, i] * weight(i, k) for i in range(p.out_features))
    np.testing.assert_allclose(ref.qgemm_nn(dy, p.w_hat)[1, k], dx, rtol=1e-9, atol=1e-9)
    got = ref.qgemm_grad_scales(dy, x, p.codes, p.zeros, group_size=p.group_size, g_idx=p.g_idx)
    assert got.shape == p.scales.shape
    g = groups[k]
    want = sum(
        (int(p.codes[n, j]) - int(p.zeros[g, n])) * sum(dy[m, n] * x[m, j] for m in range(3))
        for j in range(p.in_features)
        if groups[j] == g
    )
    np.testing.assert_allclose(got[g, n], want, rtol=1e-9, atol=1e-9)


def test_rtn_by_hand() -> None:
    row = np.zeros(32, dtype=np.float32)
    row[:4] = [-1.0, 2.0, 0.5, 0.49]
    codes, scales, zeros = ref.quantize_rtn(row[None], bits=2, group_size=32, sym=False)
    assert scales.tolist() == [[1.0]]
    assert zeros.tolist() == [[1]]
    assert codes[0, :5].tolist() == [0, 3, 1, 1, 1]  # 0.5 is a tie: to even, 0 + z
    codes, scales, zeros = ref.quantize_rtn(row[None], bits=2, group_size=32, sym=True)
    assert scales.tolist() == [[float(np.float16(4 / 3))]]
    assert zeros.tolist() == [[2]]
    assert codes[0, :5].tolist() == [1, 3, 2, 2, 2]


def test_rtn_of_zeros() -> None:
    for sym, zero in ((False, 0), (True, 8)):
        codes, scales, zeros = ref.quantize_rtn(
            np.zeros((2, 64), np.float32), bits=4, group_size=32, sym=sym
        )
        assert (scales == 1).all()
        assert (zeros == zero).all()
        assert (codes == zero).all()


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_the_greedy_optimum(act_order: bool, static_groups: bool) -> None:
    """Its bookkeeping holds (sum of steps = tr(E H E^T)), and it beats rounding to nearest."""
    weight = np.random.default_rng(3).standard_normal((16, 96)).astype(np.float32)
    hessian = ref.correlated_hessian(4, 96)
    found = ref.gptq(
        weight, hessian, bits=3, group_size=64, act_order=act_order, static_groups=static_groups
    )
    w_hat = ref.dequantize(found.codes, found.scales, found.zeros, group_size=64, g_idx=found.g_idx)
    cost = ref.hessian_error(weight, w_hat, ref.damped(hessian, 0.01))
    np.testing.assert_allclose(found.objective, cost, rtol=1e-9)
    codes, scales, zeros = ref.quantize_rtn(weight, bits=3, group_size=64, sym=False)
    nearest = ref.dequantize(codes, scales, zeros, group_size=64)
    assert cost < 0.9 * ref.hessian_error(weight, nearest, ref.damped(hessian, 0.01))
    assert (found.g_idx is not None) == (act_order and not static_groups)


def test_gptq_on_a_diagonal_hessian_is_rounding_to_nearest() -> None:
    weight = np.random.default_rng(3).standard_normal((8, 96)).astype(np.float32)
    hessian = np.diag(np.linspace(1, 5, 96))
    found = ref.gptq(weight, hessian, bits=4, group_size=32, act_order=True, static_groups=True)
    codes, scales, zeros = ref.quantize_rtn(weight, bits=4, group_size=32, sym=False)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scales, scales)
    np.testing.assert_array_equal(found.zeros, zeros)

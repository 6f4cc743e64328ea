"""GPTQ against the float64 textbook, and on the inputs that break naive implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowbitcore
import reference as ref
from lowbitcore import ops, runtime
from lowbitcore.ops import quantization

N, K = 64, 224  # K leaves a short last group for 64, 96 and 128
MODES = {
    "static": {"act_order": True, "static_groups": True},
    "dynamic": {"act_order": True, "static_groups": False},
    "in-order": {"act_order": False, "static_groups": False},
    "in-order-static": {"act_order": False, "static_groups": True},
}


def random_weight(seed: int, n: int = N, k: int = K) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        0.05 * rng.standard_normal((n, k)) * np.exp(0.3 * rng.standard_normal((n, 1)))
    ).float()


def hessian_of(seed: int, k: int = K, samples: int | None = None) -> torch.Tensor:
    return torch.tensor(ref.correlated_hessian(seed, k, samples=samples), dtype=torch.float32)


def run(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    act_order: bool = True,
    static_groups: bool = True,
    sym: bool = False,
    mse: bool = False,
    percdamp: float = 0.01,
) -> ops.GptqResult:
    factor = ops.gptq_factorize(hessian, percdamp=percdamp, act_order=act_order)
    return ops.gptq_quantize(
        weight,
        factor,
        bits=bits,
        group_size=group_size,
        sym=sym,
        mse=mse,
        static_groups=static_groups,
    )


def w_hat(found: ops.GptqResult | ops.Quantized, group_size: int) -> ref.F64:
    g_idx = getattr(found, "g_idx", None)
    return ref.dequantize(
        found.codes.numpy(),
        found.scales.numpy(),
        found.zeros.numpy(),
        group_size=group_size,
        g_idx=None if g_idx is None else g_idx.numpy(),
    )


# ----------------------------------------------------------------------------- against the textbook


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("group_size", ref.GROUP_SIZES)
@pytest.mark.parametrize("bits", ref.BITS)
def test_agrees_with_the_textbook(bits: int, group_size: int, sym: bool, mode: str) -> None:
    """Codes may differ only where float64 was all but on a tie (and in that row after it)."""
    weight, hessian = random_weight(bits), hessian_of(group_size + 2)
    found = run(weight, hessian, bits=bits, group_size=group_size, sym=sym, **MODES[mode])
    want = ref.gptq(
        weight.numpy(), hessian.numpy(), bits=bits, group_size=group_size, sym=sym, **MODES[mode]
    )

    assert (found.g_idx is None) == (want.g_idx is None)
    if want.g_idx is not None:
        np.testing.assert_array_equal(found.g_idx.numpy(), want.g_idx)
    if MODES[mode]["static_groups"]:
        np.testing.assert_array_equal(found.scales.numpy(), want.scales)
        np.testing.assert_array_equal(found.zeros.numpy(), want.zeros)
    assert (found.scales.numpy() == want.scales).mean() > 0.98
    assert (found.zeros.numpy() == want.zeros).mean() > 0.98
    assert (found.codes.numpy() == want.codes).mean() > 0.995
    # Most rows meet no tie at all, and those agree to the last code.
    assert (found.codes.numpy() == want.codes).all(axis=1).mean() > 0.9

    cost = ref.hessian_error(
        weight.numpy(), w_hat(found, group_size), ref.damped(hessian.numpy(), 0.01)
    )
    assert cost <= 1.0005 * want.objective
    assert found.loss == pytest.approx(cost, rel=1e-3)


@pytest.mark.parametrize("k", [32, 64, 160, 256, 288])
@pytest.mark.parametrize("mode", MODES)
def test_any_width_of_matrix(mode: str, k: int) -> None:
    """Below, at and beyond the usual block of 128 columns, with groups that straddle blocks."""
    weight, hessian = random_weight(1, 32, k), hessian_of(2, k)
    found = run(weight, hessian, bits=3, group_size=96, **MODES[mode])
    want = ref.gptq(weight.numpy(), hessian.numpy(), bits=3, group_size=96, **MODES[mode])
    assert (found.codes.numpy() == want.codes).mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_weights_are_read_exactly(dtype: torch.dtype) -> None:
    weight, hessian = random_weight(3).to(dtype), hessian_of(4)
    found = run(weight, hessian, bits=4, group_size=64)
    same = run(weight.float(), hessian, bits=4, group_size=64)
    assert torch.equal(found.codes, same.codes)
    assert torch.equal(found.scales, same.scales)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", ref.BITS)
def test_beats_rounding_to_nearest(bits: int, mode: str) -> None:
    weight, hessian = random_weight(5, 64, 256), hessian_of(6, 256, samples=300)
    found = run(weight, hessian, bits=bits, group_size=64, **MODES[mode])
    nearest = ops.quantize_rtn(weight, bits=bits, group_size=64)
    h = hessian.double().numpy()
    cost = ref.hessian_error(weight.numpy(), w_hat(found, 64), h)
    assert cost < 0.95 * ref.hessian_error(weight.numpy(), w_hat(nearest, 64), h)


def test_mse_search_helps_where_there_are_outliers() -> None:
    weight, hessian = random_weight(7), hessian_of(8)
    weight[:, ::53] *= 8
    h = hessian.double().numpy()
    plain = run(weight, hessian, bits=2, group_size=96)
    searched = run(weight, hessian, bits=2, group_size=96, mse=True)
    costs = [ref.hessian_error(weight.numpy(), w_hat(found, 96), h) for found in (plain, searched)]
    assert costs[1] < 0.95 * costs[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("mse", [False, True], ids=["minmax", "mse"])
@pytest.mark.parametrize("bits", ref.BITS)
def test_result_is_a_valid_file(bits: int, mse: bool, sym: bool, mode: str) -> None:
    found = run(
        random_weight(9), hessian_of(10), bits=bits, group_size=128, sym=sym, mse=mse, **MODES[mode]
    )
    assert (found.codes.dtype, found.scales.dtype, found.zeros.dtype) == (
        torch.uint8,
        torch.float32,
        torch.uint8,
    )
    assert found.codes.shape == (N, K)
    assert int(found.codes.max()) < 2**bits
    assert found.scales.shape == found.zeros.shape == (2, N)
    assert int(found.zeros.max()) < 2**bits
    assert (found.scales > 0).all()
    assert torch.equal(found.scales.half().float(), found.scales)
    if sym:
        assert (found.zeros == 2 ** (bits - 1)).all()


# -------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("group_size", ref.GROUP_SIZES)
def test_dynamic_groups_follow_the_processing_order(group_size: int) -> None:
    hessian = hessian_of(11)
    factor = ops.gptq_factorize(hessian, act_order=True)
    found = ops.gptq_quantize(
        random_weight(12), factor, bits=4, group_size=group_size, static_groups=False
    )
    if group_size == -1:
        assert found.g_idx is None
        return
    assert found.g_idx is not None
    assert found.g_idx.dtype == torch.int32
    size = group_size
    assert torch.equal(found.g_idx[factor.order.long()], torch.arange(K, dtype=torch.int32) // size)
    counts = torch.bincount(found.g_idx).tolist()
    assert counts == [size] * (K // size) + ([K % size] if K % size else [])


def test_order_is_by_falling_diagonal() -> None:
    hessian = hessian_of(13)
    factor = ops.gptq_factorize(hessian, act_order=True)
    assert sorted(factor.order.tolist()) == list(range(K))
    assert (hessian.diag()[factor.order.long()].diff() <= 0).all()
    assert ops.gptq_factorize(hessian, act_order=False).order.tolist() == list(range(K))


def test_equal_diagonals_keep_their_order() -> None:
    """Otherwise the integers would depend on the library's sort."""
    hessian = torch.eye(K)
    hessian[100, 100] = 2
    factor = ops.gptq_factorize(hessian, act_order=True)
    assert factor.order.tolist() == [100, *range(100), *range(101, K)]


@pytest.mark.parametrize("act_order", [True, False])
def test_factor_is_the_inverse(act_order: bool) -> None:
    """U is upper triangular and U^T U (H + damping) = I, in processing order."""
    hessian = hessian_of(14)
    factor = ops.gptq_factorize(hessian, percdamp=0.05, act_order=act_order)
    assert factor.percdamp == 0.05
    assert not factor.dead.any()
    u = factor.u.double().numpy()
    assert not np.tril(u, -1).any()
    assert (np.diag(u) > 0).all()
    order = factor.order.numpy()
    full = ref.damped(hessian.double().numpy(), 0.05)[np.ix_(order, order)]
    np.testing.assert_allclose(u.T @ u @ full, np.eye(K), atol=1e-4)


# -------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", ref.BITS)
def test_same_integers_on_every_isa_and_any_number_of_threads(bits: int, mode: str) -> None:
    weight, hessian = random_weight(15, 160, 288), hessian_of(16, 288)
    found = []
    for name in runtime.available_isas():
        for count in (1, 2, 5):
            with ref.forced_isa(name), ref.threads(count):
                found.append(run(weight, hessian, bits=bits, group_size=96, **MODES[mode]))
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert torch.equal(other.scales, found[0].scales)
        assert torch.equal(other.zeros, found[0].zeros)
        assert other.loss == found[0].loss


def test_same_factor_on_every_isa_and_any_number_of_threads() -> None:
    hessian = hessian_of(17, 352)
    found = []
    for name in runtime.available_isas():
        for count in (1, 2, 5):
            with ref.forced_isa(name), ref.threads(count):
                found.append(ops.gptq_factorize(hessian))
    assert all(torch.equal(other.u, found[0].u) for other in found)


@pytest.mark.parametrize("k", [32, 96, 192, 416, 992])
def test_same_factor_of_a_difficult_hessian_everywhere(k: int) -> None:
    """So close to singular that sums in another order are seen after rounding to float32; of less
    than a tile, of one front and of several."""
    weight, hessian = random_weight(40, 32, k), hessian_of(41, k, samples=k // 4)
    found = []
    for name in runtime.available_isas():
        for count in (1, 2, 3):
            with ref.forced_isa(name), ref.threads(count):
                factor = ops.gptq_factorize(hessian, percdamp=1e-5)
                codes = ops.gptq_quantize(weight, factor, bits=3, group_size=96).codes
            assert factor.percdamp == 1e-5
            found.append((factor.u, codes))
    for u, codes in found[1:]:
        assert torch.equal(u, found[0][0])
        assert torch.equal(codes, found[0][1])


def test_inputs_are_left_alone() -> None:
    weight, hessian = random_weight(18), hessian_of(19)
    factor = ops.gptq_factorize(hessian)
    tensors = (weight, hessian, factor.u, factor.order)
    before = [t.clone() for t in tensors]
    first = ops.gptq_quantize(weight, factor, bits=3, group_size=32)
    again = ops.gptq_quantize(weight, factor, bits=3, group_size=32)  # one factor serves q, k and v
    assert torch.equal(ops.gptq_factorize(hessian).u, factor.u)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert torch.equal(first.codes, again.codes)


@pytest.mark.parametrize("k", [32, 96, 416, 992])
def test_factor_of_less_than_a_tile_of_one_and_of_several(k: int) -> None:
    hessian = hessian_of(20, k)
    factor = ops.gptq_factorize(hessian, percdamp=0.05, act_order=False)
    u = factor.u.double().numpy()
    full = ref.damped(hessian.double().numpy(), 0.05)
    np.testing.assert_allclose(u.T @ u @ full, np.eye(k), atol=1e-4)


# ------------------------------------------------------------------------------- difficult Hessians


@pytest.mark.parametrize("first", [0, 200, 350])
def test_a_minor_that_is_not_positive_wherever_it_lies(first: int) -> None:
    """Of 352 columns the pair at `first` alone is indefinite, and is so in a tile of its own."""
    hessian = torch.eye(352)
    hessian[first, first + 1] = hessian[first + 1, first] = 4.0
    assert ops.gptq_factorize(hessian, percdamp=0.01, act_order=False).percdamp == 10.0
    hessian[first, first + 1] = hessian[first + 1, first] = 100.0
    with pytest.raises(lowbitcore.Error, match=r"gptq_factorize.*positive definite"):
        ops.gptq_factorize(hessian, act_order=False)


@pytest.mark.parametrize("mode", MODES)
def test_dead_columns(mode: str) -> None:
    """Columns that never saw an input quantize as zero, and do not disturb the others."""
    dead = torch.zeros(K, dtype=torch.bool)
    dead[[0, 5, 100, 101, K - 1]] = True
    weight, hessian = random_weight(20), hessian_of(21)
    hessian[dead] = 0
    hessian[:, dead] = 0
    factor = ops.gptq_factorize(hessian, act_order=MODES[mode]["act_order"])
    assert torch.equal(factor.dead, dead)
    found = run(weight, hessian, bits=4, group_size=64, **MODES[mode])
    assert np.isfinite(found.loss)
    got = w_hat(found, 64)
    assert not got[:, dead.numpy()].any()

    zeroed = torch.where(dead, 0, weight)
    h = hessian.double().numpy()
    nearest = ops.quantize_rtn(zeroed, bits=4, group_size=64)
    cost = ref.hessian_error(zeroed.numpy(), got, h)
    assert cost < ref.hessian_error(zeroed.numpy(), w_hat(nearest, 64), h)
    want = ref.gptq(weight.numpy(), h, bits=4, group_size=64, **MODES[mode])
    assert cost < 1.05 * ref.hessian_error(zeroed.numpy(), ref.dequantize(
        want.codes, want.scales, want.zeros, group_size=64, g_idx=want.g_idx), h)  # fmt: skip
    # The unit of H is of no consequence (a fixed number put on the dead diagonal would show) ...
    smaller = run(weight, hessian * 2.0**-20, bits=4, group_size=64, **MODES[mode])
    assert torch.equal(smaller.codes, found.codes)
    # ... and neither is a dead weight's value, however large.
    weight[:, dead] = 1e3
    louder = run(weight, hessian, bits=4, group_size=64, **MODES[mode])
    assert torch.equal(louder.codes, found.codes)
    assert torch.equal(louder.scales, found.scales)


def test_no_inputs_at_all() -> None:
    found = run(random_weight(22), torch.zeros(K, K), bits=4, group_size=64)
    assert found.loss == 0
    assert not w_hat(found, 64).any()


@pytest.mark.parametrize("exponent", [-40, 40])
def test_the_unit_of_the_hessian_does_not_matter(exponent: int) -> None:
    """A power of four, whose square root is exact too: the same integers to the last."""
    weight, hessian = random_weight(23), hessian_of(24)
    found = run(weight, hessian * 2.0**exponent, bits=3, group_size=64)
    same = run(weight, hessian, bits=3, group_size=64)
    assert torch.equal(found.codes, same.codes)


def test_fewer_samples_than_columns() -> None:
    """Rank 20 of 224: singular without damping, and it has to hold what it has seen."""
    weight, hessian = random_weight(25), hessian_of(26, samples=20)
    found = run(weight, hessian, bits=3, group_size=64)
    h = hessian.double().numpy()
    nearest = w_hat(ops.quantize_rtn(weight, bits=3, group_size=64), 64)
    cost = ref.hessian_error(weight.numpy(), w_hat(found, 64), h)
    assert cost < 0.2 * ref.hessian_error(weight.numpy(), nearest, h)


def indefinite(smallest: float) -> torch.Tensor:
    """Mean of the diagonal 1, smallest eigenvalue as given."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((K, K)))
    values = np.full(K, (K - smallest) / (K - 1))
    values[0] = smallest
    full = (basis * values) @ basis.T
    return torch.from_numpy((full + full.T) / 2).float()


def test_damping_is_raised_and_reported() -> None:
    """An eigenvalue of -0.005 of the mean: 1e-4 and 1e-3 do not suffice, 1e-2 does."""
    factor = ops.gptq_factorize(indefinite(-0.005), percdamp=1e-4)
    assert factor.percdamp == pytest.approx(1e-2)
    found = ops.gptq_quantize(random_weight(27), factor, bits=4, group_size=64)
    assert np.isfinite(found.loss)
    assert ops.gptq_factorize(hessian_of(28), percdamp=1e-4).percdamp == 1e-4


def test_singular_without_damping() -> None:
    """percdamp 0 on a singular matrix: some damping is put in all the same, and reported."""
    hessian = torch.ones(64, 64)
    factor = ops.gptq_factorize(hessian, percdamp=0.0)
    assert factor.percdamp > 0
    assert factor.u.isfinite().all()


@pytest.mark.parametrize(
    "hessian", [-torch.eye(64), indefinite(-500.0)], ids=["negative", "indefinite"]
)
def test_not_positive_definite_is_an_error(hessian: torch.Tensor) -> None:
    with pytest.raises(lowbitcore.Error, match=r"gptq_factorize.*positive definite"):
        ops.gptq_factorize(hessian)
    assert not issubclass(lowbitcore.Error, ValueError)


# ------------------------------------------------------------------------------------------ Hessian


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(data=st.data())
def test_accumulate_hessian(isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    rows, columns = data.draw(st.sampled_from(ref.ROWS)), data.draw(ref.sizes)
    layout = data.draw(st.sampled_from(ref.LAYOUTS))
    x = ref.random_activations(data.draw(ref.seeds), rows, columns, dtype, layout=layout)
    start = hessian_of(30, columns)
    hessian = start.clone()
    assert ops.accumulate_hessian_(hessian, x) is None
    x64, start64 = ref.as_float64(x), ref.as_float64(start)
    expected = start64 + x64.T @ x64
    magnitude = np.abs(start64) + np.abs(x64).T @ np.abs(x64)
    ref.assert_close(
        hessian,
        expected,
        ref.error_bound(magnitude, expected, terms=rows + 1, dtype=torch.float32)
        + ref.pair_error(x, terms=rows),
    )
    assert torch.equal(hessian, hessian.T)


def test_accumulate_hessian_takes_batches(isa: str) -> None:
    x = ref.random_activations(31, 12, 96, torch.bfloat16)
    flat, batched, split = torch.zeros(3, 96, 96)
    ops.accumulate_hessian_(flat, x)
    ops.accumulate_hessian_(batched, x.view(3, 4, 96))
    ops.accumulate_hessian_(split, x[:5])
    ops.accumulate_hessian_(split, x[5:])
    assert torch.equal(flat, batched)
    torch.testing.assert_close(split, flat, rtol=1e-5, atol=1e-4)


def test_accumulate_hessian_does_not_depend_on_threads(isa: str) -> None:
    x = ref.random_activations(32, 130, 288, torch.float32)
    found = []
    for count in (1, 2, 5):
        hessian = torch.zeros(288, 288)
        with ref.threads(count):
            ops.accumulate_hessian_(hessian, x)
        found.append(hessian)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_accumulate_hessian_takes_a_strided_hessian(isa: str) -> None:
    x = ref.random_activations(33, 9, 64, torch.float32)
    storage = torch.full((64, 80), 7.0)
    view = storage[:, :64]
    view.zero_()
    ops.accumulate_hessian_(view, x)
    torch.testing.assert_close(view, x.T @ x)
    assert (storage[:, 64:] == 7).all()


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(data=st.data())
def test_accumulate_cross(isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    rows, columns = data.draw(st.sampled_from(ref.ROWS)), data.draw(ref.sizes)
    layout = data.draw(st.sampled_from(ref.LAYOUTS))
    other = data.draw(st.sampled_from(ref.DTYPES))
    a = ref.random_activations(data.draw(ref.seeds), rows, columns, dtype, layout=layout)
    b = ref.random_activations(data.draw(ref.seeds), rows, columns, other)
    start = torch.randn(columns, columns, generator=torch.Generator().manual_seed(rows))
    cross = start.clone()
    assert ops.accumulate_cross_(cross, a, b) is None
    a64, b64, start64 = ref.as_float64(a), ref.as_float64(b), ref.as_float64(start)
    expected = start64 + a64.T @ b64
    magnitude = np.abs(start64) + np.abs(a64).T @ np.abs(b64)
    ref.assert_close(
        cross,
        expected,
        ref.error_bound(magnitude, expected, terms=rows + 1, dtype=torch.float32)
        + ref.pair_error(a, b, terms=rows),
    )


def test_accumulate_cross_does_not_depend_on_threads(isa: str) -> None:
    a, b = (ref.random_activations(seed, 300, 96, torch.float32) for seed in (38, 39))
    found = []
    for count in (1, 2, 5):
        cross = torch.zeros(96, 96)
        with ref.threads(count):
            ops.accumulate_cross_(cross, a, b)
        found.append(cross)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_is_refused(value: float) -> None:
    weight, hessian = random_weight(34), hessian_of(35)
    factor = ops.gptq_factorize(hessian)
    weight[-1, -1] = value
    with pytest.raises(ValueError, match=r"gptq_quantize.*weight.*finite"):
        ops.gptq_quantize(weight, factor, bits=4, group_size=64)
    hessian[3, K - 1] = value
    with pytest.raises(ValueError, match=r"gptq_factorize.*hessian.*finite"):
        ops.gptq_factorize(hessian)


def test_wrong_arguments_are_named() -> None:
    weight, hessian = random_weight(36), hessian_of(37)
    factor = ops.gptq_factorize(hessian)
    with pytest.raises(ValueError, match=r"gptq_factorize.*hessian.*224.*192"):
        ops.gptq_factorize(hessian[:, :192])
    with pytest.raises(ValueError, match=r"gptq_factorize.*hessian.*float64"):
        ops.gptq_factorize(hessian.double())
    with pytest.raises(ValueError, match=r"gptq_factorize.*percdamp.*-1"):
        ops.gptq_factorize(hessian, percdamp=-1.0)
    with pytest.raises(ValueError, match=r"gptq_quantize.*(weight|order).*192"):
        ops.gptq_quantize(weight[:, :192], factor, bits=4, group_size=64)
    with pytest.raises(ValueError, match=r"gptq_quantize.*bits.*5"):
        ops.gptq_quantize(weight, factor, bits=5, group_size=64)
    with pytest.raises(ValueError, match=r"gptq_quantize.*group_size.*48"):
        ops.gptq_quantize(weight, factor, bits=4, group_size=48)
    with pytest.raises(
        ValueError, match=r"accumulate_hessian.*hessian.*224.*x|accumulate_hessian.*x.*96.*"
    ):
        ops.accumulate_hessian_(hessian, torch.zeros(3, 96))
    with pytest.raises(ValueError, match=r"accumulate_cross.* b: expected.*3, 224.*4, 224"):
        ops.accumulate_cross_(hessian, torch.zeros(3, K), torch.zeros(4, K))
    with pytest.raises(ValueError, match=r"accumulate_cross.* a: expected.*224.*96"):
        ops.accumulate_cross_(hessian, torch.zeros(3, 96), torch.zeros(3, K))


# ---- the same sums on CUDA, which are torch's: here on the CPU, where they can run as well ----


@pytest.mark.parametrize("new", [False, True])
def test_sums_on_cuda_use_no_tf32(monkeypatch: pytest.MonkeyPatch, new: bool) -> None:
    """Whatever torch is told to allow; and it is told the same afterwards."""
    matmul = torch.backends.cuda.matmul
    if new and not hasattr(matmul, "fp32_precision"):
        pytest.skip("a torch without fp32_precision")
    name, wide = ("fp32_precision", "tf32") if new else ("allow_tf32", True)
    setting = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before, seen = getattr(matmul, name), []
    addmm_ = torch.Tensor.addmm_

    def spy(*args: torch.Tensor) -> torch.Tensor:
        seen.append(getattr(matmul, setting))
        return addmm_(*args)

    monkeypatch.setattr(torch.Tensor, "addmm_", spy)
    hessian, cross, x = torch.zeros(K, K), torch.zeros(K, K), torch.randn(2, 3, K)
    setattr(matmul, name, wide)
    try:
        quantization._add_square(hessian, x)
        quantization._add_cross(cross, x.bfloat16(), x)
        assert getattr(matmul, name) == wide
    finally:
        setattr(matmul, name, before)
    assert set(seen) <= {"ieee", False} and len(seen) == 2
    flat = x.view(-1, K)
    torch.testing.assert_close(hessian, flat.T @ flat)
    torch.testing.assert_close(cross, flat.bfloat16().float().T @ flat)


def test_sums_on_cuda_refuse_what_the_core_refuses() -> None:
    zeros = torch.zeros
    for hessian, x, message in (
        (zeros(K, K).double(), zeros(3, K), "hessian: expected float32, got .*float64"),
        (zeros(40, 40), zeros(3, 40), "hessian: expected a positive multiple of 32 rows, got 40"),
        (zeros(K, 32), zeros(3, K), r"hessian: expected shape \[224, 224\], got \[224, 32\]"),
        (zeros(K, K), zeros(3, K).int(), "x: expected float32, bfloat16 or float16, got .*int32"),
        (zeros(K, K), zeros(3, 96), r"x: expected shape \[3, 224\], got \[3, 96\]"),
    ):
        for accumulate in (ops.accumulate_hessian_, quantization._add_square):
            with pytest.raises(ValueError, match=f"accumulate_hessian: {message}"):
                accumulate(hessian, x)
    for a, b, message in (
        (zeros(3, 96), zeros(3, K), r"a: expected shape \[3, 224\], got \[3, 96\]"),
        (zeros(3, K), zeros(4, K), r"b: expected shape \[3, 224\], got \[4, 224\]"),
    ):
        for accumulate in (ops.accumulate_cross_, quantization._add_cross):
            with pytest.raises(ValueError, match=f"accumulate_cross: {message}"):
                accumulate(zeros(K, K), a, b)

"""Round to nearest: the integers are specified, so they are compared exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref
from lowbitcore import ops, runtime

group_sizes = st.one_of(st.just(-1), st.integers(1, 10).map(lambda blocks: 32 * blocks))


def random_weight(
    seed: int, n: int, k: int, dtype: torch.dtype, values: str = "plain"
) -> torch.Tensor:
    """[n, k]; "adversarial": rows of zeros, one sign, one value, ties, tiny and large values."""
    rng = np.random.default_rng(seed)
    data = 0.05 * rng.standard_normal((n, k))
    if values == "adversarial":
        data[0::8] = 0
        data[1::8] = np.abs(data[1::8])
        data[2::8] = -np.abs(data[2::8])
        data[3::8] = 0.125
        data[4::8] = rng.integers(-6, 10, data[4::8].shape) / 2  # steps of exactly one half
        data[5::8] *= 1e-9  # the scale would round to an fp16 zero
        data[6::8] *= 1e5
    return torch.from_numpy(data).to(dtype)


def values_of(found: ops.Quantized, group_size: int) -> ref.F64:
    return ref.dequantize(
        found.codes.numpy(), found.scales.numpy(), found.zeros.numpy(), group_size=group_size
    )


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", ref.BITS)
@given(data=st.data())
def test_integers_are_the_oracles(
    isa: str, bits: int, sym: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    n, k, group_size = data.draw(ref.sizes), data.draw(ref.sizes), data.draw(group_sizes)
    weight = random_weight(
        data.draw(ref.seeds), n, k, dtype, data.draw(st.sampled_from(("plain", "adversarial")))
    )
    found = ops.quantize_rtn(weight, bits=bits, group_size=group_size, sym=sym)
    codes, scales, zeros = ref.quantize_rtn(
        weight.float().numpy(), bits=bits, group_size=group_size, sym=sym
    )
    assert (found.codes.dtype, found.scales.dtype, found.zeros.dtype) == (
        torch.uint8,
        torch.float32,
        torch.uint8,
    )
    np.testing.assert_array_equal(found.scales.numpy(), scales)
    np.testing.assert_array_equal(found.zeros.numpy(), zeros)
    np.testing.assert_array_equal(found.codes.numpy(), codes)


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("mse", [False, True], ids=["minmax", "mse"])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_same_on_every_isa_and_any_number_of_threads(bits: int, mse: bool, sym: bool) -> None:
    weight = random_weight(0, 96, 288, torch.float32)
    found = []
    for name in runtime.available_isas():
        for count in (1, 2, 5):
            with ref.forced_isa(name), ref.threads(count):
                found.append(ops.quantize_rtn(weight, bits=bits, group_size=128, sym=sym, mse=mse))
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert torch.equal(other.scales, found[0].scales)
        assert torch.equal(other.zeros, found[0].zeros)


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("mse", [False, True], ids=["minmax", "mse"])
@given(seed=ref.seeds, group_size=group_sizes)
def test_result_is_a_valid_file(
    isa: str, bits: int, sym: bool, mse: bool, seed: int, group_size: int
) -> None:
    """Codes and zeros fit their bits; scales are positive and survive fp16, as files hold it."""
    found = ops.quantize_rtn(
        random_weight(seed, 64, 160, torch.float32, "adversarial"),
        bits=bits,
        group_size=group_size,
        sym=sym,
        mse=mse,
    )
    top = 2**bits - 1
    groups = ref.group_count(160, group_size)
    assert found.codes.shape == (64, 160)
    assert found.codes.max() <= top
    assert found.scales.shape == found.zeros.shape == (groups, 64)
    assert found.zeros.max() <= top
    assert (found.scales > 0).all()
    assert torch.equal(found.scales.half().float(), found.scales)
    if sym:
        assert (found.zeros == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("bits", ref.BITS)
def test_zero_is_kept_exactly(isa: str, bits: int) -> None:
    """Pruned weights stay zero: z is an integer, and the grid always reaches zero."""
    weight = random_weight(5, 64, 128, torch.float32, "adversarial")
    weight[:, ::3] = 0
    found = ops.quantize_rtn(weight, bits=bits, group_size=64)
    assert not values_of(found, 64)[:, ::3].any()


@pytest.mark.parametrize("bits", ref.BITS)
def test_error_is_at_most_half_a_step(isa: str, bits: int) -> None:
    weight = random_weight(6, 64, 256, torch.float32)
    found = ops.quantize_rtn(weight, bits=bits, group_size=64)
    step = found.scales.numpy().astype(np.float64)[ref.group_of_column(256, 64)].T
    error = np.abs(values_of(found, 64) - ref.as_float64(weight))
    # At the ends of the range, z's own rounding adds another half.
    assert (error <= step * (1.0 + 2.0**bits * 2.0**-11)).all()
    assert (error <= step * (0.5 + 2.0**bits * 2.0**-11)).mean() > 0.95


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_mse_search_lowers_the_squared_error(isa: str, bits: int, sym: bool) -> None:
    """Never worse in any group; with outliers, better over all at few bits."""
    weight = random_weight(7, 64, 256, torch.float32)
    weight[:, ::61] *= 6
    weight[::9] = 0

    def group_errors(mse: bool) -> ref.F64:
        found = ops.quantize_rtn(weight, bits=bits, group_size=96, sym=sym, mse=mse)
        error = (values_of(found, 96) - ref.as_float64(weight)) ** 2
        return np.stack([error[:, ref.group_of_column(256, 96) == g].sum(axis=1) for g in range(3)])

    plain, searched = group_errors(False), group_errors(True)
    assert (searched <= plain * (1 + 1e-5)).all()
    if bits <= 4:
        assert searched.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("layout", ref.LAYOUTS)
def test_takes_any_strides(isa: str, layout: str) -> None:
    weight = ref.random_activations(8, 64, 96, torch.float32, layout=layout)
    found = ops.quantize_rtn(weight, bits=4, group_size=32)
    codes, _, _ = ref.quantize_rtn(weight.contiguous().numpy(), bits=4, group_size=32, sym=False)
    np.testing.assert_array_equal(found.codes.numpy(), codes)


def test_input_is_left_alone(isa: str) -> None:
    weight = random_weight(9, 32, 64, torch.float32)
    before = weight.clone()
    ops.quantize_rtn(weight, bits=2, group_size=32, mse=True)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_not_finite_is_refused(isa: str, dtype: torch.dtype, value: float) -> None:
    weight = random_weight(0, 64, 96, dtype)
    weight[63, 95] = value
    with pytest.raises(ValueError, match=r"quantize_rtn.*weight.*finite"):
        ops.quantize_rtn(weight, bits=4, group_size=32)


@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("mse", [False, True], ids=["minmax", "mse"])
def test_a_scale_that_fp16_cannot_hold_is_refused(isa: str, sym: bool, mse: bool) -> None:
    """The file would hold an infinite scale: an error, not a model that answers NaN."""
    weight = random_weight(0, 32, 64, torch.float32)
    weight[3, 40] = 3e7
    with pytest.raises(ValueError, match=r"quantize_rtn.*weight.*fp16"):
        ops.quantize_rtn(weight, bits=4, group_size=32, sym=sym, mse=mse)

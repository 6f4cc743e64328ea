"""Interchange and execution layouts: bit for bit, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref
from lowbitcore import ops

any_problem = ref.problems()
group_sizes = st.one_of(st.just(-1), st.integers(1, 10).map(lambda blocks: 32 * blocks))


def words(values: list[int]) -> torch.Tensor:
    """Unsigned 32-bit words as the int32 tensor files hold."""
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32).copy())


def random_words(seed: int, *shape: int) -> torch.Tensor:
    raw = np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)
    return torch.from_numpy(raw.view(np.int32).copy())


# ------------------------------------------------------------------------------------ known by hand

# The fields 0, 1, 2, ... 31 (modulo 2^b), written out by hand from the layout, not by any program.
COUNTING = {
    2: [0xE4E4E4E4, 0xE4E4E4E4],
    3: [0x88FAC688, 0xC688FAC6, 0xFAC688FA],
    4: [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98],
    8: [
        0x03020100,
        0x07060504,
        0x0B0A0908,
        0x0F0E0D0C,
        0x13121110,
        0x17161514,
        0x1B1A1918,
        0x1F1E1D1C,
    ],
}


@pytest.mark.parametrize("bits", ref.BITS)
def test_counting_pattern(isa: str, bits: int) -> None:
    codes = (torch.arange(32) % 2**bits).to(torch.uint8).repeat(32, 1)
    want = words(COUNTING[bits])
    assert torch.equal(ops.pack_qweight(codes, bits=bits), want[:, None].expand(-1, 32))
    assert torch.equal(
        ops.unpack_qweight(want[:, None].expand(-1, 32).contiguous(), bits=bits), codes
    )
    zeros = codes[:5]
    assert torch.equal(ops.pack_qzeros(zeros, bits=bits), want.expand(5, -1))
    assert torch.equal(ops.unpack_qzeros(want.expand(5, -1).contiguous(), bits=bits), zeros)


@pytest.mark.parametrize(
    ("position", "value", "want"),
    [
        (0, 7, [0x00000007, 0, 0]),
        (9, 7, [0x38000000, 0, 0]),
        (10, 7, [0xC0000000, 0x00000001, 0]),  # low 2 bits in w0, the third in w1
        (10, 4, [0, 0x00000001, 0]),
        (11, 7, [0, 0x0000000E, 0]),
        (20, 7, [0, 0x70000000, 0]),
        (21, 7, [0, 0x80000000, 0x00000003]),  # low bit in w1, two in w2
        (21, 1, [0, 0x80000000, 0]),
        (22, 7, [0, 0, 0x0000001C]),
        (31, 7, [0, 0, 0xE0000000]),
    ],
)
def test_three_bit_words(isa: str, position: int, value: int, want: list[int]) -> None:
    """Where each kind of 3-bit field lands, the two that straddle words included."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[17, position] = value
    qweight = ops.pack_qweight(codes, bits=3)
    assert torch.equal(qweight[:, 17], words(want))
    assert not qweight[:, :17].any()
    assert not qweight[:, 18:].any()
    assert torch.equal(ops.unpack_qweight(qweight, bits=3), codes)


# -------------------------------------------------------------------------------------- interchange


@pytest.mark.parametrize("bits", ref.BITS)
@given(data=st.data())
def test_qweight_agrees_with_the_oracle(isa: str, bits: int, data: st.DataObject) -> None:
    problem = data.draw(ref.problems(bits))
    codes = torch.from_numpy(problem.codes)
    qweight = ops.pack_qweight(codes, bits=bits)
    assert qweight.dtype == torch.int32
    assert torch.equal(qweight, problem.qweight())
    assert torch.equal(ops.unpack_qweight(qweight, bits=bits), codes)


@pytest.mark.parametrize("bits", ref.BITS)
@given(data=st.data())
def test_qzeros_agrees_with_the_oracle(isa: str, bits: int, data: st.DataObject) -> None:
    problem = data.draw(ref.problems(bits))
    zeros = torch.from_numpy(problem.zeros)
    qzeros = ops.pack_qzeros(zeros, bits=bits)
    assert qzeros.dtype == torch.int32
    assert torch.equal(qzeros, problem.qzeros())
    assert torch.equal(ops.unpack_qzeros(qzeros, bits=bits), zeros)


def test_packing_takes_any_strides(isa: str) -> None:
    problem = ref.random_problem(0, bits=3, group_size=32, out_features=64, in_features=96)
    codes = torch.from_numpy(problem.codes)
    wide = torch.full((64, 101), 255, dtype=torch.uint8)
    wide[:, 2:98] = codes
    for view in (codes.t().contiguous().t(), wide[:, 2:98]):
        assert torch.equal(ops.pack_qweight(view, bits=3), problem.qweight())
    assert torch.equal(ops.unpack_qweight(problem.qweight().t().contiguous().t(), bits=3), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[3, 31] = 2**bits
    with pytest.raises(ValueError, match=rf"pack_qweight.*codes.*{2**bits}"):
        ops.pack_qweight(codes, bits=bits)
    with pytest.raises(ValueError, match=rf"pack_qzeros.*zeros.*{2**bits}"):
        ops.pack_qzeros(codes, bits=bits)


# --------------------------------------------------------------------------------- execution layout


@pytest.mark.parametrize("bits", ref.BITS)
@given(data=st.data())
def test_prepack_keeps_every_bit(isa: str, bits: int, data: st.DataObject) -> None:
    """Any bit pattern is a valid file, so the words themselves are random."""
    n, k, group_size = data.draw(ref.sizes), data.draw(ref.sizes), data.draw(group_sizes)
    seed = data.draw(ref.seeds)
    qweight = random_words(seed, k * bits // 32, n)
    qzeros = random_words(seed + 1, ref.group_count(k, group_size), n * bits // 32)
    packed = ops.prepack(qweight, qzeros, bits=bits, group_size=group_size)
    assert packed.dtype == torch.uint8
    assert packed.ndim == 1
    layout = {"bits": bits, "group_size": group_size, "in_features": k, "out_features": n}
    qweight_back, qzeros_back = ops.unpack(packed, **layout)
    assert torch.equal(qweight_back, qweight)
    assert torch.equal(qzeros_back, qzeros)


@pytest.mark.parametrize("bits", ref.BITS)
def test_prepack_is_no_larger_than_it_has_to_be(bits: int) -> None:
    """One copy of the weights: q in b bits and z in at most a byte."""
    n, k, group_size = 96, 256, 64
    qweight, qzeros = random_words(0, k * bits // 32, n), random_words(1, 4, n * bits // 32)
    packed = ops.prepack(qweight, qzeros, bits=bits, group_size=group_size)
    assert n * k * bits // 8 <= packed.numel() <= n * k * bits // 8 + 4 * n + 128


@given(problem=any_problem)
def test_layouts_are_the_same_on_every_isa(problem: ref.Problem) -> None:
    """Interchange tensors have to be the same bits whichever instruction set is in use."""
    from lowbitcore import runtime

    layout = {"bits": problem.bits, "group_size": problem.group_size}
    shape = {"in_features": problem.in_features, "out_features": problem.out_features}
    for name in runtime.available_isas():
        with ref.forced_isa(name):
            qweight = ops.pack_qweight(torch.from_numpy(problem.codes), bits=problem.bits)
            qzeros = ops.pack_qzeros(torch.from_numpy(problem.zeros), bits=problem.bits)
            assert torch.equal(qweight, problem.qweight())
            assert torch.equal(qzeros, problem.qzeros())
            packed = ops.prepack(qweight, qzeros, **layout)
            back = ops.unpack(packed, **layout, **shape)
            assert torch.equal(back[0], qweight)
            assert torch.equal(back[1], qzeros)


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(data=st.data())
def test_dequantize(isa: str, bits: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """fp32: exactly s * (q - z) in fp32; narrower types: that, rounded once more."""
    problem = data.draw(ref.problems(bits))
    layout = {"bits": bits, "group_size": problem.group_size}
    packed = ops.prepack(problem.qweight(), problem.qzeros(), **layout)
    got = ops.dequantize(
        packed,
        problem.scales_tensor(),
        in_features=problem.in_features,
        g_idx=problem.g_idx_tensor(),
        dtype=dtype,
        **layout,
    )
    assert got.dtype == dtype
    # float64 holds the product exactly, so this is the fp32 product correctly rounded.
    want = torch.from_numpy(problem.w_hat).float().to(dtype)
    assert torch.equal(got, want)

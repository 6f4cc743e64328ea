"""The three products against the float64 oracle, elementwise within the a-priori bound.

y = x W^T, dx = dy W and the gradient of the scales, for every width, dtype, instruction set and
number of rows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref
from lowbitcore import ops

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

each_dtype = pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
each_width = pytest.mark.parametrize("bits", ref.BITS)
layouts = st.sampled_from(ref.LAYOUTS)
row_counts = st.sampled_from(ref.ROWS)
activation_values = st.sampled_from(("plain", "adversarial"))


class Packed:
    """A problem in the execution layout, with the operations bound to it."""

    def __init__(self, problem: ref.Problem) -> None:
        self.problem = problem
        self.layout = {"bits": problem.bits, "group_size": problem.group_size}
        self.packed = ops.prepack(problem.qweight(), problem.qzeros(), **self.layout)
        self.scales = problem.scales_tensor()
        self.g_idx = problem.g_idx_tensor()

    def nt(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        scales = self.scales if scales is None else scales
        return ops.qgemm_nt(x, self.packed, scales, g_idx=self.g_idx, bias=bias, **self.layout)

    def nn(self, dy: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        scales = self.scales if scales is None else scales
        columns = self.problem.in_features
        return ops.qgemm_nn(
            dy, self.packed, scales, in_features=columns, g_idx=self.g_idx, **self.layout
        )

    def grad_scales(self, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return ops.qgemm_grad_scales(dy, x, self.packed, g_idx=self.g_idx, **self.layout)


def check_all(
    problem: ref.Problem,
    rows: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    values: str = "plain",
    x_layout: str = "contiguous",
    dy_layout: str = "contiguous",
    with_bias: bool = False,
) -> None:
    """Run the three products on one problem and hold each to its bound."""
    core = Packed(problem)
    x = ref.random_activations(
        seed, rows, problem.in_features, dtype, values=values, layout=x_layout
    )
    dy = ref.random_activations(
        seed + 1, rows, problem.out_features, dtype, values=values, layout=dy_layout
    )
    bias = (
        ref.random_activations(seed + 2, 1, problem.out_features, dtype)[0] if with_bias else None
    )

    y = core.nt(x, bias)
    assert y.dtype == dtype
    ref.assert_close(y, *ref.expect_nt(x, problem.w_hat, bias))

    dx = core.nn(dy)
    assert dx.dtype == dtype
    ref.assert_close(dx, *ref.expect_nn(dy, problem.w_hat))

    ds = core.grad_scales(dy, x)
    assert ds.dtype == torch.float32
    ref.assert_close(ds, *ref.expect_grad_scales(dy, x, problem))


# ------------------------------------------------------------------------------- against the oracle


@each_dtype
@each_width
@given(data=st.data())
def test_any_problem(isa: str, bits: int, dtype: torch.dtype, data: st.DataObject) -> None:
    check_all(
        data.draw(ref.problems(bits)),
        data.draw(row_counts),
        dtype,
        seed=data.draw(ref.seeds),
        values=data.draw(activation_values),
        x_layout=data.draw(layouts),
        dy_layout=data.draw(layouts),
        with_bias=data.draw(st.booleans()),
    )


@each_dtype
@each_width
def test_every_number_of_rows(isa: str, bits: int, dtype: torch.dtype) -> None:
    problem = ref.random_problem(0, bits=bits, group_size=64, out_features=96, in_features=160)
    for rows in ref.ROWS:
        check_all(problem, rows, dtype, with_bias=rows % 2 == 1)


@each_width
@pytest.mark.parametrize("g_idx", ref.G_IDX_KINDS)
@pytest.mark.parametrize("group_size", ref.GROUP_SIZES)
def test_every_group_size_and_index(isa: str, bits: int, group_size: int, g_idx: str) -> None:
    """K = 224 leaves a short last group for 64, 96 and 128."""
    problem = ref.random_problem(
        1, bits=bits, group_size=group_size, out_features=64, in_features=224, g_idx=g_idx
    )
    for rows in (1, 8, 33):
        check_all(problem, rows, torch.float32)
        check_all(problem, rows, torch.bfloat16)


@each_width
@pytest.mark.parametrize(("n", "k"), [(32, 32), (32, 1056), (1056, 32), (576, 1536), (1536, 576)])
def test_long_and_narrow(isa: str, bits: int, n: int, k: int) -> None:
    """Larger than any block of a kernel in one direction or the other; SmolLM2's own shapes."""
    problem = ref.random_problem(2, bits=bits, group_size=128, out_features=n, in_features=k)
    for rows in (1, 5, 40):
        check_all(problem, rows, torch.float32)


@each_width
@given(
    seed=ref.seeds,
    rows=st.integers(1, 5),
    octaves=st.lists(st.sampled_from((0, 6, 14, 22, 30, 60)), min_size=3, max_size=3),
    largest=st.booleans(),
)
def test_few_rows_of_bf16(
    isa: str, bits: int, seed: int, rows: int, octaves: list[int], largest: bool
) -> None:
    """Groups whose numbers are this many octaves apart: as integers they have few digits, many, or
    too many. Powers of two below the largest have a digit of -128, and with the largest codes sums
    are as large as they get."""
    problem = ref.random_problem(seed, bits=bits, group_size=64, out_features=32, in_features=160)
    if largest:
        problem.codes[:] = 2**bits - 1
    generator = torch.Generator().manual_seed(seed)

    def random(below: int) -> torch.Tensor:
        return torch.randint(0, below, (rows, 160), generator=generator)

    column = torch.arange(160)
    if largest:
        numbers, below = torch.full((rows, 160), -1.0), (column % 64 > 0).long()
    else:
        numbers, below = (1 + random(128) / 128) * (1 - 2 * random(2)), random(2)
    x = torch.ldexp(numbers, -below * torch.tensor(octaves)[column // 64]).bfloat16()
    x[:, column // 64 == seed % 4] = -0.0
    y = Packed(problem).nt(x)
    ref.assert_close(y, *ref.expect_nt(x, problem.w_hat, None))


@each_width
def test_a_number_too_small_beside_another(isa: str, bits: int) -> None:
    """Where the large one meets a weight of 0, the small one is all there is."""
    problem = ref.random_problem(4, bits=bits, group_size=64, out_features=32, in_features=64)
    problem.codes[:, 0] = problem.zeros[0]
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 2.0**100, 2.0**-100
    y = torch.ldexp(Packed(problem).nt(x).float(), torch.tensor(100.0)).bfloat16()
    x[0, 0], x[0, 1] = 0.0, 1.0
    ref.assert_close(y, *ref.expect_nt(x, problem.w_hat, None))


@each_width
def test_a_zero_of_either_sign(isa: str, bits: int) -> None:
    problem = ref.random_problem(3, bits=bits, group_size=64, out_features=32, in_features=128)
    problem.codes[:] = 2**bits - 1
    core = Packed(problem)
    # In fp32 the one between is lost, on levels that multiply integers it is not.
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 4], x[0, 8], x[0, 12] = 1.0, 2.0**-29, -1.0
    y = core.nt(x)
    x[0, 9] = -0.0
    assert torch.equal(core.nt(x), y)


@each_width
@pytest.mark.parametrize("rows", [257, 481, 1000])
def test_many_rows(isa: str, bits: int, rows: int) -> None:
    """More than any block of rows a kernel works on at a time."""
    problem = ref.random_problem(
        2, bits=bits, group_size=32, out_features=64, in_features=96, g_idx="ragged"
    )
    check_all(problem, rows, torch.float32, with_bias=True)


@each_width
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1100, 64, 2080), (545, 2080, 64), (300, 288, 1760), (610, 288, 1760), (610, 1760, 288)],
)
def test_many_rows_of_a_long_reduction(isa: str, bits: int, rows: int, n: int, k: int) -> None:
    """More than a cache's worth of activations, cut along their rows and along the reduction, and
    more of a weight than a cache holds."""
    problem = ref.random_problem(6, bits=bits, group_size=96, out_features=n, in_features=k)
    check_all(problem, rows, torch.bfloat16, with_bias=True, x_layout="strided")


@each_width
def test_many_rows_of_a_small_weight(isa: str, bits: int) -> None:
    """Of which a cache holds a part, dequantised once for all rows."""
    problem = ref.random_problem(7, bits=bits, group_size=96, out_features=1088, in_features=576)
    check_all(problem, 1100, torch.bfloat16, with_bias=True, x_layout="strided")


@pytest.mark.full
@each_dtype
@each_width
@pytest.mark.parametrize("g_idx", ["none", "permuted"])
def test_large(isa: str, bits: int, dtype: torch.dtype, g_idx: str) -> None:
    problem = ref.random_problem(
        3, bits=bits, group_size=128, out_features=1184, in_features=2080, g_idx=g_idx
    )
    for rows in (1, 17, 513):
        check_all(problem, rows, dtype, with_bias=True)


@each_width
@pytest.mark.parametrize(("rows", "n", "k"), [(600, 64, 576), (70, 576, 64), (70, 64, 1024)])
def test_same_bits_wherever_rows_lie(isa: str, bits: int, rows: int, n: int, k: int) -> None:
    """Of aligned rows, of others, and of those that a cache holds to few of its sets."""
    dtype = torch.bfloat16
    core = Packed(ref.random_problem(8, bits=bits, group_size=64, out_features=n, in_features=k))
    x, *other_x = (ref.random_activations(9, rows, k, dtype, layout=i) for i in ref.LAYOUTS)
    dy, *other_dy = (ref.random_activations(10, rows, n, dtype, layout=i) for i in ref.LAYOUTS)
    y, dx = core.nt(x), core.nn(dy)
    assert all(torch.equal(core.nt(item), y) for item in other_x)
    assert all(torch.equal(core.nn(item), dx) for item in other_dy)


@each_dtype
@each_width
@pytest.mark.parametrize("x_layout", ref.LAYOUTS)
def test_layouts_in_memory(isa: str, bits: int, dtype: torch.dtype, x_layout: str) -> None:
    problem = ref.random_problem(
        4, bits=bits, group_size=32, out_features=64, in_features=96, g_idx="permuted"
    )
    for rows in (1, 2, 9):
        check_all(problem, rows, dtype, x_layout=x_layout, dy_layout=ref.LAYOUTS[-1])


@each_dtype
def test_more_and_fewer_dimensions(isa: str, dtype: torch.dtype) -> None:
    """[..., K]: leading dimensions are kept, whichever way they lie in memory."""
    problem = ref.random_problem(5, bits=4, group_size=64, out_features=64, in_features=128)
    core = Packed(problem)
    flat_x = ref.random_activations(6, 12, 128, dtype)
    flat_dy = ref.random_activations(7, 12, 64, dtype)
    y, dx, ds = core.nt(flat_x), core.nn(flat_dy), core.grad_scales(flat_dy, flat_x)
    for shape in ((3, 4), (12, 1), (2, 3, 2)):
        assert torch.equal(core.nt(flat_x.view(*shape, 128)), y.view(*shape, 64))
        assert torch.equal(core.nn(flat_dy.view(*shape, 64)), dx.view(*shape, 128))
        assert torch.equal(core.grad_scales(flat_dy.view(*shape, 64), flat_x.view(*shape, 128)), ds)
    swapped = flat_x.view(3, 4, 128).transpose(0, 1)
    assert torch.equal(core.nt(swapped), y.view(3, 4, 64).transpose(0, 1))
    assert core.nt(flat_x.new_empty(2, 0, 128)).shape == (2, 0, 64)
    assert torch.equal(core.nt(flat_x[0]), core.nt(flat_x[:1])[0])
    assert torch.equal(core.nn(flat_dy[0]), core.nn(flat_dy[:1])[0])


def test_broadcast_rows(isa: str) -> None:
    """A stride of zero, as `expand` makes it."""
    problem = ref.random_problem(5, bits=4, group_size=64, out_features=64, in_features=128)
    core = Packed(problem)
    x = ref.random_activations(6, 1, 128, torch.float32)
    assert torch.equal(core.nt(x.expand(5, 128)), core.nt(x.repeat(5, 1)))
    dy = torch.ones(1, 1).expand(5, 64)  # the gradient of a sum
    assert torch.equal(core.nn(dy), core.nn(torch.ones(5, 64)))
    assert torch.equal(
        core.grad_scales(dy, x.expand(5, 128)), core.grad_scales(torch.ones(5, 64), x.repeat(5, 1))
    )


@each_width
def test_no_rows(isa: str, bits: int) -> None:
    problem = ref.random_problem(5, bits=bits, group_size=64, out_features=64, in_features=160)
    core = Packed(problem)
    assert core.nt(torch.empty(0, 160)).shape == (0, 64)
    assert core.nn(torch.empty(0, 64)).shape == (0, 160)
    assert torch.equal(
        core.grad_scales(torch.empty(0, 64), torch.empty(0, 160)), torch.zeros(3, 64)
    )


# ----------------------------------------------------------------------------------- special values


@each_dtype
@each_width
@pytest.mark.parametrize("g_idx", ["none", "ragged"])
def test_nan_reaches_exactly_what_it_touches(
    isa: str, bits: int, dtype: torch.dtype, g_idx: str
) -> None:
    problem = ref.random_problem(
        8, bits=bits, group_size=32, out_features=64, in_features=160, g_idx=g_idx
    )
    core = Packed(problem)
    for rows, row, column in ((1, 0, 159), (5, 2, 0), (33, 32, 77)):
        x = ref.random_activations(9, rows, 160, dtype)
        dy = ref.random_activations(10, rows, 64, dtype)
        bad_x, bad_dy = x.clone(), dy.clone()
        bad_x[row, column] = torch.nan
        bad_dy[row, column % 64] = torch.nan
        touched = torch.zeros(rows, dtype=torch.bool)
        touched[row] = True

        y = core.nt(bad_x)
        assert y[touched].isnan().all()
        assert torch.equal(y[~touched], core.nt(x)[~touched])
        dx = core.nn(bad_dy)
        assert dx[touched].isnan().all()
        assert torch.equal(dx[~touched], core.nn(dy)[~touched])

        ds = core.grad_scales(dy, x)
        group = torch.zeros(ds.shape[0], dtype=torch.bool)
        group[problem.group[column]] = True
        from_x = core.grad_scales(dy, bad_x)
        assert from_x[group].isnan().all()
        assert torch.equal(from_x[~group], ds[~group])
        output = torch.zeros(64, dtype=torch.bool)
        output[column % 64] = True
        from_dy = core.grad_scales(bad_dy, x)
        present = torch.from_numpy(np.isin(np.arange(ds.shape[0]), problem.group))
        assert from_dy[present][:, output].isnan().all()
        assert torch.equal(from_dy[:, ~output], ds[:, ~output])


@each_width
def test_nan_scale_reaches_exactly_its_outputs(isa: str, bits: int) -> None:
    problem = ref.random_problem(8, bits=bits, group_size=64, out_features=64, in_features=160)
    core = Packed(problem)
    scales = core.scales.clone()
    scales[2, 40] = torch.nan
    for rows in (1, 20):
        x, dy = ref.random_activations(9, rows, 160, torch.float32), torch.ones(rows, 64)
        y, clean = core.nt(x, scales=scales), core.nt(x)
        output = torch.arange(64) == 40
        assert y[:, output].isnan().all()
        assert torch.equal(y[:, ~output], clean[:, ~output])
        dx, clean = core.nn(dy, scales=scales), core.nn(dy)
        member = torch.from_numpy(problem.group == 2)
        assert dx[:, member].isnan().all()
        assert torch.equal(dx[:, ~member], clean[:, ~member])


@each_dtype
@each_width
def test_infinity_stays_in_its_row(isa: str, bits: int, dtype: torch.dtype) -> None:
    problem = ref.random_problem(11, bits=bits, group_size=32, out_features=32, in_features=96)
    core = Packed(problem)
    x = ref.random_activations(12, 6, 96, dtype)
    bad = x.clone()
    bad[4, 50] = torch.inf
    with np.errstate(invalid="ignore"):
        want = torch.from_numpy(
            np.float64(np.inf) * problem.w_hat[:, 50]
        )  # NaN where the weight is zero
    y, clean = core.nt(bad), core.nt(x)
    rest = torch.arange(6) != 4
    assert torch.equal(y[rest], clean[rest])
    assert torch.equal(y[4].double().nan_to_num(nan=0.5), want.nan_to_num(nan=0.5))


@each_dtype
@each_width
def test_zero_weights_give_exact_zero(isa: str, bits: int, dtype: torch.dtype) -> None:
    """q = z everywhere: no rounding may leave a trace, whatever the inputs and scales."""
    p = ref.random_problem(
        13, bits=bits, group_size=64, out_features=64, in_features=160, values="adversarial"
    )
    codes = p.zeros[p.group].T.copy()
    core = Packed(ref.Problem(p.bits, p.group_size, codes, p.scales, p.zeros, None))
    for rows in (1, 9):
        x = ref.random_activations(14, rows, 160, dtype, values="adversarial")
        dy = ref.random_activations(15, rows, 64, dtype, values="adversarial")
        assert not core.nt(x).any()
        assert not core.nn(dy).any()
        assert not core.grad_scales(dy, x).any()


@each_dtype
@each_width
@pytest.mark.parametrize("in_features", [160, 288, 416])
def test_last_groups_much_shorter_than_others(
    isa: str, bits: int, dtype: torch.dtype, in_features: int
) -> None:
    problem = ref.random_problem(
        20, bits=bits, group_size=128, out_features=64, in_features=in_features
    )
    for rows in (1, 2, 4, 5, 17):
        check_all(problem, rows, dtype)


@each_width
@pytest.mark.parametrize("exponent", [15, 21, 22, 23, 24, 60, 127])
def test_large_inputs_of_zero_weights_hide_no_small_ones(
    isa: str, bits: int, exponent: int
) -> None:
    """Fixed-point numbers may serve a group whose largest input leaves bits for the smallest."""
    p = ref.random_problem(18, bits=bits, group_size=64, out_features=32, in_features=160)
    codes = p.codes.copy()
    codes[:, 70] = p.zeros[1]
    problem = ref.Problem(p.bits, p.group_size, codes, p.scales, p.zeros, None)
    core = Packed(problem)
    for rows in (1, 2, 3, 4):
        x = ref.random_activations(19, rows, 160, torch.bfloat16)
        x[:, 64:128] = (1 + x[:, 64:128].abs() % 1) * x[:, 64:128].sign()
        x[rows - 1, 70] = 2.0**exponent
        ref.assert_close(core.nt(x), *ref.expect_nt(x, problem.w_hat))


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e15, 1e30])
def test_extreme_scales_fp32(isa: str, magnitude: float) -> None:
    p = ref.random_problem(
        16, bits=4, group_size=64, out_features=64, in_features=160, g_idx="permuted"
    )
    scaled = ref.Problem(
        p.bits, p.group_size, p.codes, p.scales * np.float32(magnitude), p.zeros, p.g_idx
    )
    for rows in (1, 17):
        check_all(scaled, rows, torch.float32)


def test_subnormal_activations_are_not_flushed(isa: str) -> None:
    p = ref.random_problem(17, bits=8, group_size=-1, out_features=64, in_features=96)
    core = Packed(ref.Problem(p.bits, p.group_size, p.codes, np.ones_like(p.scales), p.zeros, None))
    for dtype, tiny in (
        (torch.float32, 2.0**-149),
        (torch.bfloat16, 2.0**-133),
        (torch.float16, 2.0**-24),
    ):
        steps = torch.randint(-3, 4, (5, 96), generator=torch.Generator().manual_seed(0))
        x = (steps.double() * tiny).to(dtype)
        if ref.multiplies_pairs(x):
            continue  # the processor's instruction for pairs does flush them
        integers = p.codes.astype(np.int64) - p.zeros.astype(np.int64).T
        # Integers times the smallest subnormal: every sum is exact in fp32.
        want = torch.from_numpy((steps.numpy() @ integers.T) * tiny).float().to(dtype)
        assert torch.equal(core.nt(x), want)


# --------------------------------------------------------------------------------------- identities


@each_dtype
@each_width
@given(data=st.data())
def test_doubled_scales_double_the_result(
    isa: str, bits: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    n, k, rows = data.draw(ref.sizes), data.draw(ref.sizes), data.draw(row_counts)
    problem = ref.random_problem(
        data.draw(ref.seeds),
        bits=bits,
        group_size=64,
        out_features=n,
        in_features=k,
        g_idx="permuted",
    )
    core = Packed(problem)
    # Only what is normal doubles exactly: fp16 sums that happen to cancel may be subnormal.
    x = ref.random_activations(18, rows, k, dtype) * 8
    dy = ref.random_activations(19, rows, n, dtype) * 8
    normal = torch.finfo(dtype).tiny
    for once, twice in (
        (core.nt(x), core.nt(x, scales=2 * core.scales)),
        (core.nn(dy), core.nn(dy, 2 * core.scales)),
    ):
        exact = once.abs() >= normal
        assert torch.equal((2 * once)[exact], twice[exact])
        assert exact.float().mean() > 0.99 or not once.numel()


@each_width
@given(data=st.data())
def test_the_products_are_adjoint(isa: str, bits: int, data: st.DataObject) -> None:
    """<dY, X W^T> = <dY W, X>, and both equal <dS, S> because Y is linear in the scales."""
    problem = data.draw(ref.problems(bits))
    rows, seed = data.draw(st.integers(1, 40)), data.draw(ref.seeds)
    core = Packed(problem)
    x = ref.random_activations(seed, rows, problem.in_features, torch.float32)
    dy = ref.random_activations(seed + 1, rows, problem.out_features, torch.float32)
    x64, dy64 = ref.as_float64(x), ref.as_float64(dy)
    forward = np.vdot(dy64, ref.as_float64(core.nt(x)))
    backward = np.vdot(ref.as_float64(core.nn(dy)), x64)
    scales = np.vdot(ref.as_float64(core.grad_scales(dy, x)), problem.scales.astype(np.float64))
    magnitude = np.vdot(np.abs(dy64), ref.qgemm_nt(np.abs(x64), np.abs(problem.w_hat)))
    terms = problem.in_features + problem.out_features + rows
    tolerance = 2 * ref.gamma(terms + 8) * magnitude + 1e-30
    assert abs(forward - backward) <= tolerance
    assert abs(forward - scales) <= tolerance


@each_dtype
@each_width
@pytest.mark.parametrize("g_idx", ["none", "permuted"])
def test_same_bits_for_any_number_of_threads(
    isa: str, bits: int, dtype: torch.dtype, g_idx: str
) -> None:
    problem = ref.random_problem(
        20, bits=bits, group_size=64, out_features=288, in_features=352, g_idx=g_idx
    )
    core = Packed(problem)
    for rows in (1, 3, 130, 600):  # of the last one thread goes another way than two
        x = ref.random_activations(21, rows, 352, dtype)
        dy = ref.random_activations(22, rows, 288, dtype)
        with ref.threads(1):
            alone = core.nt(x), core.nn(dy), core.grad_scales(dy, x)
        for count in (2, 5):
            with ref.threads(count):
                together = core.nt(x), core.nn(dy), core.grad_scales(dy, x)
            for one, many in zip(alone, together, strict=True):
                assert torch.equal(one, many)


@pytest.mark.parametrize(("rows", "n", "k"), [(70, 288, 1760), (520, 64, 1184), (520, 1184, 64)])
def test_same_bits_of_long_reductions_for_any_number_of_threads(
    isa: str, rows: int, n: int, k: int
) -> None:
    core = Packed(ref.random_problem(23, bits=4, group_size=64, out_features=n, in_features=k))
    x = ref.random_activations(24, rows, k, torch.bfloat16)
    dy = ref.random_activations(25, rows, n, torch.bfloat16)
    with ref.threads(1):
        alone = core.nt(x), core.nn(dy)
    for count in (2, 5):
        with ref.threads(count):
            assert all(map(torch.equal, (core.nt(x), core.nn(dy)), alone))


@each_dtype
def test_a_repeated_call_gives_the_same_bits(isa: str, dtype: torch.dtype) -> None:
    """Scratch left over from a larger problem must not leak into a smaller one."""
    small = Packed(
        ref.random_problem(
            23, bits=3, group_size=32, out_features=32, in_features=96, g_idx="ragged"
        )
    )
    large = Packed(ref.random_problem(24, bits=4, group_size=64, out_features=288, in_features=288))
    x, dy = ref.random_activations(25, 3, 96, dtype), ref.random_activations(26, 3, 32, dtype)
    first = small.nt(x), small.nn(dy), small.grad_scales(dy, x)
    poison = torch.full((130, 288), torch.nan, dtype=dtype)
    large.nt(poison), large.nn(poison), large.grad_scales(poison, poison)
    again = small.nt(x), small.nn(dy), small.grad_scales(dy, x)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)


def test_calls_from_several_python_threads(isa: str) -> None:
    """The interpreter lock is released while the core computes; scratch must not be shared."""
    problem = ref.random_problem(30, bits=3, group_size=64, out_features=192, in_features=288)
    core = Packed(problem)
    inputs = [ref.random_activations(31 + i, 3 + 20 * i, 288, torch.float32) for i in range(6)]
    alone = [core.nt(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            together = list(pool.map(core.nt, inputs))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_inputs_are_left_alone(isa: str) -> None:
    problem = ref.random_problem(
        27, bits=4, group_size=32, out_features=64, in_features=96, g_idx="permuted"
    )
    core = Packed(problem)
    x, dy = (
        ref.random_activations(28, 9, 96, torch.float32),
        ref.random_activations(29, 9, 64, torch.float32),
    )
    tensors = (x, dy, core.packed, core.scales, core.g_idx)
    before = [t.clone() for t in tensors]
    core.nt(x), core.nn(dy), core.grad_scales(dy, x)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))

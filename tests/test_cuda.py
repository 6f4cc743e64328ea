"""The CUDA backend against the float64 oracle and against the CPU, in the interpreter or on a GPU.

The interpreter (ptxsim) also refuses what no comparison shows: memory out of bounds, shared-memory
races, values read before they were written.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref
from cuda_device import CudaDevice
from lowbitcore import nn, ops

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

each_width = pytest.mark.parametrize("bits", ref.BITS)
each_dtype = pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

# Relative error of a whole result, in the Frobenius norm; roundings average out over enough of it.
FROBENIUS = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 3e-3}
ROWS = (1, 5, 16, 17, 64, 77, 128, 200)


class OnDevice:
    """A problem in the backend's execution layout, with the operations bound to it."""

    def __init__(self, device: CudaDevice, problem: ref.Problem) -> None:
        self.device, self.problem = device, problem
        self.layout = {"bits": problem.bits, "group_size": problem.group_size}
        self.packed = ops.prepack(
            device.put(problem.qweight()), device.put(problem.qzeros()), **self.layout
        )
        self.scales = device.put(problem.scales_tensor())
        self.g_idx = device.put(problem.g_idx_tensor())

    def nt(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x, bias = self.device.put(x), self.device.put(bias)
        return ops.qgemm_nt(
            x, self.packed, self.scales, g_idx=self.g_idx, bias=bias, **self.layout
        ).cpu()

    def nn(self, dy: torch.Tensor) -> torch.Tensor:
        dy, columns = self.device.put(dy), self.problem.in_features
        return ops.qgemm_nn(
            dy, self.packed, self.scales, in_features=columns, g_idx=self.g_idx, **self.layout
        ).cpu()

    def grad_scales(self, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        dy, x = self.device.put(dy), self.device.put(x)
        return ops.qgemm_grad_scales(dy, x, self.packed, g_idx=self.g_idx, **self.layout).cpu()

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return ops.dequantize(
            self.packed,
            self.scales,
            in_features=self.problem.in_features,
            g_idx=self.g_idx,
            dtype=dtype,
            **self.layout,
        ).cpu()


def rounding_term(operand: torch.Tensor, weight: ref.F64, problem: ref.Problem) -> ref.F64 | float:
    """What weights rounded to the operand's type add to the bound of a product.

    They are rounded once, but for what a scale of two parts leaves out; in fp16 the weight and the
    parts may be subnormal. fp32 and problems with g_idx take kernels that round no weight.
    """
    if operand.dtype == torch.float32 or problem.g_idx is not None:
        return 0.0
    unit = ref.UNIT_ROUNDOFF[operand.dtype]
    roundings = 1.02
    subnormal = 2.0**-25 * (1 + 2**problem.bits) if operand.dtype == torch.float16 else 0.0
    return np.abs(ref.as_float64(operand)) @ (roundings * unit * np.abs(weight) + subnormal)


def check_all(
    device: CudaDevice,
    problem: ref.Problem,
    rows: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    values: str = "plain",
    layout: str = "contiguous",
    with_bias: bool = False,
    frobenius: bool = False,
) -> None:
    core = OnDevice(device, problem)
    n, k = problem.out_features, problem.in_features
    x = ref.random_activations(seed, rows, k, dtype, values=values, layout=layout)
    dy = ref.random_activations(seed + 1, rows, n, dtype, values=values, layout=layout)
    bias = ref.random_activations(seed + 2, 1, n, dtype)[0] if with_bias else None

    expected, bound = ref.expect_nt(x, problem.w_hat, bias)
    y = core.nt(x, bias)
    assert y.dtype == dtype
    ref.assert_close(y, expected, bound + rounding_term(x, problem.w_hat.T, problem))
    expected_dx, bound = ref.expect_nn(dy, problem.w_hat)
    dx = core.nn(dy)
    assert dx.dtype == dtype
    ref.assert_close(dx, expected_dx, bound + rounding_term(dy, problem.w_hat, problem))
    expected_ds, bound = ref.expect_grad_scales(dy, x, problem)
    ds = core.grad_scales(dy, x)
    assert ds.dtype == torch.float32
    ref.assert_close(ds, expected_ds, bound)

    if frobenius:
        for got, wanted, limit in (
            (y, expected, FROBENIUS[dtype]),
            (dx, expected_dx, FROBENIUS[dtype]),
            (ds, expected_ds, FROBENIUS[torch.float32]),
        ):
            error = np.linalg.norm(ref.as_float64(got) - wanted) / np.linalg.norm(wanted)
            assert error <= limit, f"{error:.2e} of {limit:.0e}"


# ---- the weight ----


@each_width
@given(data=st.data())
def test_prepack_and_back(device: CudaDevice, bits: int, data: st.DataObject) -> None:
    problem = data.draw(ref.problems(bits))
    core = OnDevice(device, problem)
    qweight, qzeros = ops.unpack(
        core.packed,
        in_features=problem.in_features,
        out_features=problem.out_features,
        **core.layout,
    )
    assert torch.equal(qweight.cpu(), problem.qweight())
    assert torch.equal(qzeros.cpu(), problem.qzeros())


@each_dtype
@each_width
@given(data=st.data())
def test_dequantize(device: CudaDevice, bits: int, dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(ref.problems(bits))
    got = OnDevice(device, problem).dequantize(dtype)
    # The product may be rounded to float32 on the way.
    unit = ref.UNIT_ROUNDOFF[dtype] + 1.01 * ref.UNIT_ROUNDOFF[torch.float32]
    ref.assert_close(
        got, problem.w_hat, unit * np.abs(problem.w_hat) + ref.SMALLEST_SUBNORMAL[dtype]
    )


# ---- the products ----


@each_half
@each_width
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
def test_tensor_cores(device: CudaDevice, bits: int, dtype: torch.dtype, group_size: int) -> None:
    """Every kernel: shapes that fill no block, short last groups, all numbers of rows."""
    problem = ref.random_problem(
        bits, bits=bits, group_size=group_size, out_features=160, in_features=288
    )
    for rows in ROWS:
        with device.schedule(rows % 3):
            check_all(
                device, problem, rows, dtype, seed=rows, with_bias=rows % 2 == 1, frobenius=True
            )


@each_dtype
@each_width
@given(data=st.data())
def test_any_problem(
    device: CudaDevice, bits: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    with device.schedule(data.draw(st.integers(0, 3))):
        check_all(
            device,
            data.draw(ref.problems(bits)),
            data.draw(st.sampled_from((0, 1, 3, 16, 17, 40))),
            dtype,
            seed=data.draw(ref.seeds),
            values=data.draw(st.sampled_from(("plain", "adversarial"))),
            layout=data.draw(st.sampled_from(ref.LAYOUTS)),
            with_bias=data.draw(st.booleans()),
        )


@each_half
@each_width
@pytest.mark.parametrize(("n", "k"), [(32, 32), (64, 1600), (1600, 64)])
def test_long_and_narrow(device: CudaDevice, bits: int, dtype: torch.dtype, n: int, k: int) -> None:
    """The contraction is split over blocks, or there is one step only."""
    problem = ref.random_problem(3, bits=bits, group_size=128, out_features=n, in_features=k)
    for rows in (1, 16, 130):
        check_all(device, problem, rows, dtype)


def test_results_repeat(device: CudaDevice) -> None:
    """Whatever the order of warps and blocks: sums have a fixed order."""
    problem = ref.random_problem(4, bits=4, group_size=64, out_features=96, in_features=1024)
    x = ref.random_activations(0, 200, 1024, torch.bfloat16)
    dy = ref.random_activations(1, 200, 96, torch.bfloat16)
    core = OnDevice(device, problem)
    first = core.nt(x), core.nn(dy), core.grad_scales(dy, x)
    for seed in (1, 2):
        with device.schedule(seed):
            again = core.nt(x), core.nn(dy), core.grad_scales(dy, x)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---- quantization ----


@each_width
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_rtn_as_on_the_cpu(device: CudaDevice, bits: int, sym: bool, mse: bool) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(bits))
    options = {"bits": bits, "group_size": 64, "sym": sym, "mse": mse}
    got = ops.quantize_rtn(device.put(weight), **options)
    with device.set_aside():
        expected = ops.quantize_rtn(weight, **options)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b)


@each_width
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_gptq_as_on_the_cpu(device: CudaDevice, bits: int, static_groups: bool, mse: bool) -> None:
    weight = torch.randn(96, 288, generator=torch.Generator().manual_seed(bits))
    hessian = torch.tensor(ref.correlated_hessian(5, 288), dtype=torch.float32)
    options = {"bits": bits, "group_size": 96, "mse": mse, "static_groups": static_groups}
    with device.set_aside():
        factor = ops.gptq_factorize(hessian)
        expected = ops.gptq_quantize(weight, factor, **options)
    on_device = factor._replace(
        order=device.put(factor.order), u=device.put(factor.u), dead=device.put(factor.dead)
    )
    got = ops.gptq_quantize(device.put(weight), on_device, **options)
    assert torch.equal(got.codes.cpu(), expected.codes)
    assert torch.equal(got.scales.cpu(), expected.scales)
    assert torch.equal(got.zeros.cpu(), expected.zeros)
    assert (got.g_idx is None) == (expected.g_idx is None)
    if expected.g_idx is not None:
        assert torch.equal(got.g_idx.cpu(), expected.g_idx)
    assert got.loss == pytest.approx(expected.loss, rel=1e-12)


def test_not_finite(device: CudaDevice) -> None:
    weight = torch.randn(32, 64)
    weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="quantize_rtn: weight: expected finite values"):
        ops.quantize_rtn(device.put(weight), bits=4, group_size=32)


# ---- a layer ----


@each_width
def test_layer_trains(device: CudaDevice, bits: int) -> None:
    """Forward and all gradients of a QuantLinear, against the dense layer."""
    problem = ref.random_problem(6, bits=bits, group_size=32, out_features=64, in_features=96)
    layer = nn.QuantLinear.from_canonical(
        device.put(problem.qweight()),
        device.put(problem.qzeros()),
        device.put(problem.scales_tensor()),
        bits=bits,
        group_size=32,
        bias=device.put(torch.randn(64)),
    )
    layer.scales.requires_grad_()
    x = device.put(torch.randn(2, 20, 96)).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    dense = torch.from_numpy(problem.w_hat).float()
    x_cpu = x.detach().cpu().requires_grad_()
    expected = x_cpu @ dense.T + layer.bias.cpu()
    expected.square().sum().backward()
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.cpu(), x_cpu.grad, rtol=1e-4, atol=1e-3)
    assert layer.scales.grad is not None and torch.isfinite(layer.scales.grad).all()
    rebuilt = layer.canonical()
    assert torch.equal(rebuilt["qweight"].cpu(), problem.qweight())


# ---- what goes wrong ----


def test_views_that_tensor_cores_cannot_take(device: CudaDevice) -> None:
    """Rows that are not aligned to 16 bytes take the slower kernels, with the same result."""
    problem = ref.random_problem(7, bits=4, group_size=32, out_features=64, in_features=96)
    core = OnDevice(device, problem)
    wide = device.put(torch.randn(5, 101).bfloat16())
    x = wide[:, 3:99]
    got = ops.qgemm_nt(x, core.packed, core.scales, **core.layout).cpu()
    ref.assert_close(got, *ref.expect_nt(x.cpu(), problem.w_hat))


def test_device_without_kernels(device: CudaDevice) -> None:
    if device.emulated is None:
        pytest.skip("needs a pretended device")
    problem = ref.random_problem(8, bits=4, group_size=32, out_features=64, in_features=96)
    core = OnDevice(device, problem)
    x = ref.random_activations(0, 130, 96, torch.float16)
    with (
        device.emulated.simulator.options(compute_capability=70),
        pytest.raises(device.core.Error, match="qgemm_nt: CUDA: .*"),
    ):
        core.nt(x)
    with (
        device.emulated.simulator.options(max_dynamic_shared=32 << 10),
        pytest.raises(device.core.Error, match="qgemm_nt: CUDA: .*"),
    ):
        core.nt(x)
    ref.assert_close(core.nt(x), *bounded_nt(x, problem))


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_a_packed_weight_that_is_not_aligned(device: CudaDevice, offset: int) -> None:
    """Before any kernel reads it: a fault there ends the CUDA context of the process."""
    problem = ref.random_problem(10, bits=4, group_size=32, out_features=64, in_features=96)
    core = OnDevice(device, problem)
    room = torch.empty(len(core.packed) + 16, dtype=torch.uint8, device=core.packed.device)
    start = (offset - room.data_ptr()) % 16
    core.packed = room[start : start + len(core.packed)].copy_(core.packed)
    x, dy = torch.randn(3, 96), torch.randn(3, 64)
    shape = {"in_features": 96, "out_features": 64, **core.layout}
    for op, call in (
        ("qgemm_nt", lambda: core.nt(x)),
        ("qgemm_nn", lambda: core.nn(dy)),
        ("qgemm_grad_scales", lambda: core.grad_scales(dy, x)),
        ("dequantize", lambda: core.dequantize(torch.float32)),
        ("unpack", lambda: ops.unpack(core.packed, **shape)),
    ):
        with pytest.raises(ValueError, match=f"{op}: packed: expected an address aligned to 16"):
            call()
    qweight, qzeros = device.put(problem.qweight()), device.put(problem.qzeros())
    with pytest.raises(ValueError, match="prepack: packed: expected an address aligned to 16"):
        device.core.prepack(qweight, qzeros, 4, 32, 96, 64, core.packed, 0)


def test_scratch_is_freed_where_a_check_throws(device: CudaDevice) -> None:
    if device.emulated is None:
        pytest.skip("needs a pretended device")
    simulator = device.emulated.simulator
    with (
        simulator.options(compute_capability=70),
        pytest.raises(device.core.Error, match="all_finite: CUDA: "),
    ):
        ops.quantize_rtn(torch.randn(32, 64), bits=4, group_size=32)
    assert simulator.allocated_bytes == 0


def test_large_scratch_goes_back(device: CudaDevice) -> None:
    """To the device, for others to take: GPTQ copies a weight, here of 128 MiB."""
    if device.emulated is not None:
        pytest.skip("the interpreter's pool keeps nothing")
    n, k = 8192, 4096
    weight, u = torch.ones(n, k, device=device.torch), torch.eye(k, device=device.torch)
    order = torch.arange(k, dtype=torch.int32, device=device.torch)
    factor = ops.GptqFactor(order, u, torch.zeros_like(order, dtype=torch.bool), 0.0)
    ops.quantize_rtn(weight, bits=4, group_size=128)  # kernels and pools are there
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    result = ops.gptq_quantize(weight, factor, bits=4, group_size=128)
    del result
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] <= 96 << 20


def test_index_of_no_group_stops_the_kernel(device: CudaDevice) -> None:
    if device.emulated is None:
        pytest.skip("a trap ends the CUDA context of the process")
    problem = ref.random_problem(9, bits=4, group_size=32, out_features=64, in_features=96)
    core = OnDevice(device, problem)
    core.g_idx = torch.full((96,), 7, dtype=torch.int32)
    with pytest.raises(device.core.Error, match="trap"):
        core.nt(torch.randn(3, 96))


def bounded_nt(x: torch.Tensor, problem: ref.Problem) -> tuple[ref.F64, ref.F64]:
    expected, bound = ref.expect_nt(x, problem.w_hat)
    return expected, bound + rounding_term(x, problem.w_hat.T, problem)

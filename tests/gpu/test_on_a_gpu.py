"""What only a GPU can confirm: streams, graphs, memory, sizes, several devices, torch's settings.

That the numbers are right is the business of test_cuda.py; here they are compared with themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lowbitcore as lbc
import reference as ref
from cuda_device import CudaDevice
from lowbitcore import dispatch, nn, ops
from test_cuda import check_all, rounding_term

# Few outputs and a long contraction: it is split over blocks, which takes scratch memory.
N, K = 512, 2048
LAYOUT = {"bits": 4, "group_size": 64}
TICKS = 1 << 30  # of a GPU's clock, about half a second
GIGABYTE = 10**9

each_number_of_rows = pytest.mark.parametrize("rows", [1, 16, 200])


@pytest.fixture(params=["fused", "dequantize"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Either way of the products of 16 bits, whatever the table says."""
    with dispatch.override(1 << 40 if request.param == "fused" else 0):
        yield request.param


class Products:
    """The three products of one weight, each a few kernels that wait for nobody."""

    def __init__(self, gpu: torch.device, rows: int, seed: int = 0) -> None:
        problem = ref.random_problem(seed, out_features=N, in_features=K, **LAYOUT)
        self.packed = ops.prepack(problem.qweight().to(gpu), problem.qzeros().to(gpu), **LAYOUT)
        self.scales = problem.scales_tensor().to(gpu)
        self.x = ref.random_activations(seed, rows, K, torch.bfloat16).to(gpu)
        self.dy = ref.random_activations(seed + 1, rows, N, torch.bfloat16).to(gpu)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            ops.qgemm_nt(self.x, self.packed, self.scales, **LAYOUT),
            ops.qgemm_nn(self.dy, self.packed, self.scales, in_features=K, **LAYOUT),
            ops.qgemm_grad_scales(self.dy, self.x, self.packed, **LAYOUT),
        )


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """But for roundings: cuBLAS does not promise the same ones on every stream."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        largest = float(b.abs().max())
        assert 0 < largest < float("inf")
        torch.testing.assert_close(a, b, rtol=0, atol=largest / 128)


# ---- streams ----


@each_number_of_rows
def test_work_keeps_to_its_stream(gpu: torch.device, path: str, rows: int) -> None:
    """It sees what its stream did before, and the host goes on meanwhile."""
    products = Products(gpu, rows)
    expected = products()
    x, dy = products.x.clone(), products.dy.clone()
    products.x.zero_(), products.dy.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(TICKS)
        products.x.copy_(x), products.dy.copy_(dy)
        got = tuple(item.clone() for item in products())
    assert not stream.query(), "the host waited for the GPU"
    stream.synchronize()
    assert_same(got, expected)


def test_two_streams_at_once(gpu: torch.device, path: str) -> None:
    """Neither uses the other's scratch memory."""
    both = [Products(gpu, rows, seed) for seed, rows in enumerate((16, 200))]
    expected = [products() for products in both]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in both]
    found: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(100):
        for stream, products, results in zip(streams, both, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(products())
    torch.cuda.synchronize()
    for wanted, results in zip(expected, found, strict=True):
        for got in results:
            assert_same(got, wanted)


def a_layer(gpu: torch.device) -> nn.QuantLinear:
    problem = ref.random_problem(2, out_features=N, in_features=K, **LAYOUT)
    layer = nn.QuantLinear.from_canonical(
        problem.qweight().to(gpu),
        problem.qzeros().to(gpu),
        problem.scales_tensor().to(gpu),
        **LAYOUT,
    )
    layer.scales.requires_grad_()
    return layer


def step(layer: nn.QuantLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward; the gradients are new ones."""
    layer.scales.grad = x.grad = None
    y = layer(x)
    y.square().sum().backward()
    assert layer.scales.grad is not None and x.grad is not None
    return y.detach(), x.grad, layer.scales.grad


def test_training_keeps_to_its_stream(gpu: torch.device, path: str) -> None:
    """Autograd runs the backward in a thread of its own."""
    layer = a_layer(gpu)
    x = ref.random_activations(3, 32, K, torch.bfloat16).to(gpu)
    expected = step(layer, x.clone().requires_grad_())
    late = torch.zeros_like(x).requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(TICKS)
        late.data.copy_(x)
        got = step(layer, late)
    assert not stream.query(), "the host waited for the GPU"
    stream.synchronize()
    assert_same(got, expected)


def test_torch_sees_nobody_wait(gpu: torch.device, path: str) -> None:
    products, layer = Products(gpu, 16), a_layer(gpu)
    x = products.x.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.detach().sum().item()
        products()
        step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- graphs ----


@each_number_of_rows
def test_a_graph_does_the_same(gpu: torch.device, path: str, rows: int) -> None:
    products = Products(gpu, rows)
    inputs = [(products.x.roll(i, 1), products.dy.roll(i, 1)) for i in range(3)]
    expected = []
    for x, dy in inputs:
        products.x.copy_(x), products.dy.copy_(dy)
        expected.append(products())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = products()
    for (x, dy), wanted in zip(inputs, expected, strict=True):
        products.x.copy_(x), products.dy.copy_(dy)
        graph.replay()
        assert_same(got, wanted)
    assert_same(products(), expected[-1])  # outside of the graph nothing has changed


# ---- memory ----


def fill() -> list[Tensor]:
    """All of the GPU's memory, but for less than a megabyte."""
    torch.cuda.empty_cache()
    held, size = [], torch.cuda.mem_get_info()[0]
    while size >= 1 << 19:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return held


def test_out_of_memory(gpu: torch.device) -> None:
    """Where scratch is missing, or a result: it is said, and work goes on."""
    products = Products(gpu, 16)
    expected = products()
    n = k = 32768  # scratch of 128 MB, more than the library's pool keeps
    size = ops.packed_size(in_features=k, out_features=n, **LAYOUT)
    packed = torch.zeros(size, dtype=torch.uint8, device=gpu)
    dy, x = (torch.ones(16, width, dtype=torch.bfloat16, device=gpu) for width in (n, k))
    result = torch.empty(ops.group_count(k, LAYOUT["group_size"]), n, device=gpu)
    held = fill()
    del result  # for torch to take again
    for missing in ("scratch", "result"):
        with pytest.raises((torch.OutOfMemoryError, lbc.Error), match=r"(?i)out of memory"):
            ops.qgemm_grad_scales(dy, x, packed, **LAYOUT)
        if missing == "scratch":
            held += fill()
    held.clear()
    torch.cuda.empty_cache()
    ops.qgemm_grad_scales(dy, x, packed, **LAYOUT)
    assert_same(products(), expected)


def test_memory_does_not_grow(gpu: torch.device, path: str) -> None:
    products = Products(gpu, 200)
    products()
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(200):
        products()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] >= before - (4 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_results_than_an_int_counts(gpu: torch.device, dtype: torch.dtype) -> None:
    rows, n, k = 70_000, 32_768, 64
    assert rows * n > 2**31
    if torch.cuda.mem_get_info()[0] < 24 * GIGABYTE:
        pytest.skip("needs 24 GB of GPU memory")
    problem = ref.random_problem(4, out_features=n, in_features=k, **LAYOUT)
    packed = ops.prepack(problem.qweight().to(gpu), problem.qzeros().to(gpu), **LAYOUT)
    scales = problem.scales_tensor().to(gpu)
    x = torch.randn(rows, k, dtype=dtype, device=gpu)
    y = ops.qgemm_nt(x, packed, scales, **LAYOUT)
    for part in (slice(0, 3), slice(rows - 3, rows)):
        few = x[part].cpu()
        expected, bound = ref.expect_nt(few, problem.w_hat)
        bound = bound + rounding_term(few, problem.w_hat.T, problem)
        ref.assert_close(y[part].cpu(), expected, bound)
    del x
    dx = ops.qgemm_nn(y, packed, scales, in_features=k, **LAYOUT)
    for part in (slice(0, 3), slice(rows - 3, rows)):
        few = ops.qgemm_nn(y[part], packed, scales, in_features=k, **LAYOUT)
        unit = 8 * ref.UNIT_ROUNDOFF[dtype]
        torch.testing.assert_close(dx[part], few, rtol=unit, atol=unit * float(few.abs().max()))


# ---- devices, and torch's settings ----


def test_a_second_gpu(gpu: torch.device, path: str) -> None:
    """Work is done where the tensors are, whatever the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    other = torch.device("cuda", 1)
    there, here = Products(other, 16), Products(gpu, 16)
    got = there()
    assert torch.cuda.current_device() == gpu.index
    assert {item.device for item in got} == {other}
    with torch.cuda.device(other):
        assert_same(here(), tuple(item.to(gpu) for item in got))


@pytest.fixture
def tf32() -> Iterator[None]:
    """torch may multiply float32 in TF32."""
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # since torch 2.9; the two do not mix
    name, value = ("fp32_precision", "tf32") if new else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    yield
    setattr(matmul, name, before)


@each_number_of_rows
def test_float32_is_exact(gpu: torch.device, path: str, tf32: None, rows: int) -> None:
    problem = ref.random_problem(5, out_features=160, in_features=288, **LAYOUT)
    check_all(CudaDevice("cuda"), problem, rows, torch.float32, frobenius=True)
    x = ref.random_activations(0, rows, 288, torch.float32)
    hessian = torch.zeros(288, 288, device=gpu)
    ops.accumulate_hessian_(hessian, x.to(gpu))
    expected = x.double().mT @ x.double()
    assert (hessian.cpu() - expected).norm() < 1e-6 * expected.norm()  # TF32 is 100 times as far

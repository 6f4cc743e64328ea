"""Throughput of the three products beside torch's dense ones.

    pytest bench/                                   # medians; ratios are in extra_info
    pytest bench/ --benchmark-json=result.json
    pytest bench/ -k "bits4 and M1024"
    pytest bench/ -m "full or not full"             # more layers, rows, groups, types: hours
    pytest bench/ -m "full or not full" -k "permuted and not unequal"      # what act-order costs
    pytest bench/ -k "two_threads or prepack"
    pytest bench/ --benchmark-disable               # each case once, to see that it runs

A case alternates with its baselines within one run, so that a machine that slows down slows both.
At small M, weights rotate over copies larger than the last-level cache, ours and the baselines'.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import device
import lowbitcore as lbc
from ceilings import CACHE_BYTES, peak_gflops, read_gbytes_per_s
from lowbitcore import dispatch, ops
from lowbitcore.dense import multiplies
from lowbitcore.nn import QuantLinear

SHAPES = [(4096, 4096), (1536, 576), (576, 1536)]
FULL_SHAPES = [(11008, 4096), (4096, 11008), (576, 576), (192, 576)]
ROWS = [1, 16, 128, 1024]
FULL_ROWS = [4, 32, 512, 2048, 4096]
UNEQUAL_ROWS = [1, 16, 32, 64, 128, 256]
BITS = [2, 3, 4, 8]
GROUP_SIZES = [128, 64]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
ROUNDS = 9
T = TypeVar("T")


class Case(NamedTuple):
    """Groups are "permuted" as act-order leaves them, "permuted_unequal" if they have not their
    whole size, either."""

    bits: int
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    group_size: int = 128
    groups: Literal["", "permuted", "permuted_unequal"] = ""


def is_full(case: Case) -> bool:
    if (case.n, case.k) in FULL_SHAPES or case.m in FULL_ROWS:
        return True
    usual = case.dtype != torch.float16 and case.group_size == 128 and not case.groups
    return not usual and (case.bits, case.m) != (4, 16)


def label(case: Case) -> str:
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    parts = (f"bits{case.bits}", f"g{case.group_size}", f"M{case.m}", f"N{case.n}", f"K{case.k}")
    return "-".join([device.name(), *parts, dtype] + [case.groups] * bool(case.groups))


def as_parameter(case: Case) -> Any:
    return pytest.param(case, id=label(case), marks=pytest.mark.full if is_full(case) else ())


def cases_of(shapes: list[tuple[int, int]], rows: list[int], *rest: Any) -> list[Any]:
    """`rest`: types and group sizes."""
    found = itertools.product(shapes, sorted(rows), BITS, *rest)
    return [as_parameter(Case(bits, m, n, k, *more)) for (n, k), m, bits, *more in found]


CASES = [
    *cases_of(SHAPES + FULL_SHAPES, ROWS + FULL_ROWS, (torch.bfloat16, torch.float32)),
    *cases_of(SHAPES, ROWS, (torch.float16,), (128,)),
    *cases_of(SHAPES, ROWS, DTYPES.values(), (64,)),
]
PERMUTED = cases_of([(4096, 4096), (1536, 576)], ROWS, (torch.bfloat16,), (128,), ("permuted",))
UNEQUAL = [as_parameter(Case(4, m, 4096, 4096, groups="permuted_unequal")) for m in UNEQUAL_ROWS]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device.device(), dtype=dtype)


def canonical(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """A weight's integers, zeros and scales."""
    weight = randn(case.n, case.k)
    codes, scales, zeros = ops.quantize_rtn(weight, bits=case.bits, group_size=case.group_size)
    integers = ops.pack_qweight(codes, bits=case.bits), ops.pack_qzeros(zeros, bits=case.bits)
    return *integers, scales


def packed_weights(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """The same packed integers and their scales, anew each time, as layers of a model have them."""
    *integers, scales = canonical(case)
    while True:
        packed = ops.prepack(*integers, bits=case.bits, group_size=case.group_size)
        yield packed, scales.clone()


def layers(case: Case) -> Iterator[QuantLinear]:
    """As a model that was loaded has them."""
    form = {"bits": case.bits, "group_size": case.group_size}
    g_idx = (torch.randperm(case.k) // case.group_size).int().to(device.device())
    first = QuantLinear.from_canonical(
        *canonical(case), **form, g_idx=g_idx if case.groups else None
    )
    for packed, scales in packed_weights(case):  # any integers: putting them in order takes long
        layer = QuantLinear(case.k, case.n, **form, device=device.device())
        layer.packed, layer.scales.data = packed, scales
        layer.g_idx, layer.order, layer.inverse = first.g_idx, first.order, first.inverse
        yield layer


def dense_weights(n: int, k: int, dtype: torch.dtype) -> Iterator[Tensor]:
    weight = randn(n, k, dtype=dtype)
    while True:
        yield weight.clone()


def form_of(case: Case) -> dict[str, Any]:
    """What the products want to know of a weight, beside its bytes and scales."""
    g_idx = None
    if case.groups == "permuted_unequal":
        groups = -(-case.k // case.group_size)
        g_idx = torch.randint(groups, (case.k,)).int().to(device.device())
    return {"bits": case.bits, "group_size": case.group_size, "g_idx": g_idx}


def torchs_dtype(case: Case) -> torch.dtype:
    """What the baselines compute in: torch would take minutes for a product of fp16 on processors
    that multiply none."""
    slow = case.dtype == torch.float16 and not device.on_gpu()
    return torch.float32 if slow and not multiplies(case.dtype) else case.dtype


def copies(weights: Iterator[T], weight_bytes: int, m: int) -> itertools.cycle[T]:
    # A GPU's cache holds a weight, too, and its arithmetic hides a read only of many more rows.
    most = 512 if device.on_gpu() else 16
    count = max(1, CACHE_BYTES // weight_bytes) if m <= most else 1
    return itertools.cycle(list(itertools.islice(weights, count)))


def packed_copies(case: Case) -> itertools.cycle[tuple[Tensor, Tensor]]:
    return copies(packed_weights(case), case.n * case.k * case.bits // 8, case.m)


def dense_copies(case: Case) -> itertools.cycle[Tensor]:
    dtype = torchs_dtype(case)
    weights = dense_weights(case.n, case.k, dtype)
    return copies(weights, case.n * case.k * dtype.itemsize, case.m)


def path_of(op: dispatch.Op, case: Case) -> dispatch.Path:
    return dispatch.path(
        op,
        case.m,
        device.device(),
        dtype=case.dtype,
        permuted=case.groups == "permuted_unequal",
        weights=case.n * case.k,
    )


def not_taken(path: dispatch.Path, run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The fused kernel as a baseline where the dispatcher leaves it aside. The other way round,
    `dequant` is what it leaves aside."""

    def fused() -> Any:
        with dispatch.override(1 << 40):
            return run()

    return {"fused": fused} if path == "dequantize" else {}


def compare(
    benchmark: Any,
    run: Callable[[], Any],
    *,
    seconds: Callable[[Callable[[], Any]], float] = device.seconds,
    **baselines: Callable[[], Any],
) -> None:
    """Times `run` in turn with its baselines; `ratio_X` is the time of X over ours."""
    if not benchmark.disabled:
        times: dict[str, list[float]] = {"ours": []} | {name: [] for name in baselines}
        for _ in range(ROUNDS + 1):
            for name, function in [("ours", run), *baselines.items()]:
                times[name].append(seconds(function))
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        benchmark.extra_info["ms"] = medians["ours"] * 1e3
        for name in baselines:
            benchmark.extra_info[f"ratio_{name}"] = medians[name] / medians["ours"]

    def to_the_end() -> None:
        run()
        lbc.runtime.synchronize()

    benchmark.pedantic(to_the_end, rounds=ROUNDS, warmup_rounds=1)


def describe(benchmark: Any, op: str, case: Case, path: dispatch.Path = "fused") -> None:
    benchmark.extra_info.update(
        op=f"{op}_{case.groups}" if case.groups else op,
        isa=device.name(),
        device=device.model(),
        path=path,
        bits=case.bits,
        group_size=case.group_size,
        M=case.m,
        N=case.n,
        K=case.k,
        dtype=str(case.dtype).removeprefix("torch."),
        threads=lbc.runtime.num_threads(),
    )
    if "ms" in benchmark.extra_info:
        seconds = benchmark.extra_info["ms"] / 1e3
        benchmark.extra_info["gflops"] = 2 * case.m * case.n * case.k / seconds / 1e9
        rate = case.n * case.k * case.bits / 8 / seconds / 1e9
        benchmark.extra_info["packed_gbytes_per_s"] = rate
        benchmark.extra_info["fraction_of_bandwidth"] = rate / read_gbytes_per_s()
        benchmark.extra_info["read_gbytes_per_s"] = read_gbytes_per_s()
        peak = peak_gflops(case.dtype)
        if peak is not None:
            benchmark.extra_info["fraction_of_peak"] = benchmark.extra_info["gflops"] / peak
            benchmark.extra_info["peak_gflops"] = peak


@torch.no_grad()  # as one generates: torch's autograd takes longer than a small product
@pytest.mark.parametrize("case", CASES + UNEQUAL)
def test_qgemm_nt(benchmark: Any, case: Case) -> None:
    form = form_of(case)
    x = randn(case.m, case.k, dtype=case.dtype)
    torchs_x = x.to(torchs_dtype(case))
    ours, dense = packed_copies(case), dense_copies(case)

    def run() -> Tensor:
        return ops.qgemm_nt(x, *next(ours), **form)

    def dequantize_first() -> Tensor:
        weight = ops.dequantize(*next(ours), in_features=case.k, dtype=torchs_x.dtype, **form)
        return functional.linear(torchs_x, weight)

    path = path_of("qgemm_nt", case)
    compare(
        benchmark,
        run,
        dense=lambda: functional.linear(torchs_x, next(dense)),
        dequant=dequantize_first,
        **not_taken(path, run),
    )
    describe(benchmark, "qgemm_nt", case, path)


@pytest.mark.parametrize("case", CASES + UNEQUAL)
def test_qgemm_nn(benchmark: Any, case: Case) -> None:
    form = form_of(case)
    dy = randn(case.m, case.n, dtype=case.dtype)
    torchs_dy = dy.to(torchs_dtype(case))
    ours, dense = packed_copies(case), dense_copies(case)

    def run() -> Tensor:
        return ops.qgemm_nn(dy, *next(ours), in_features=case.k, **form)

    def dequantize_first() -> Tensor:
        weight = ops.dequantize(*next(ours), in_features=case.k, dtype=torchs_dy.dtype, **form)
        return torchs_dy @ weight

    path = path_of("qgemm_nn", case)
    compare(
        benchmark,
        run,
        dense=lambda: torchs_dy @ next(dense),
        dequant=dequantize_first,
        **not_taken(path, run),
    )
    describe(benchmark, "qgemm_nn", case, path)


@pytest.mark.parametrize("case", CASES)
def test_qgemm_grad_scales(benchmark: Any, case: Case) -> None:
    form = form_of(case)
    ours = packed_copies(case)
    dy = randn(case.m, case.n, dtype=case.dtype)
    x = randn(case.m, case.k, dtype=case.dtype)
    torchs_dy, torchs_x = (item.to(torchs_dtype(case)) for item in (dy, x))
    compare(
        benchmark,
        lambda: ops.qgemm_grad_scales(dy, x, next(ours)[0], **form),
        dense=lambda: torchs_dy.T @ torchs_x,  # the dense dW alone, without contracting it
    )
    describe(benchmark, "qgemm_grad_scales", case)


# ---- act-order, as layers of a model have it: integers in order, activations permuted ----

Run = Callable[[], Any]


def compare_layers(benchmark: Any, case: Case, timed: Callable[[QuantLinear], Run]) -> None:
    """`timed` gives what is timed of a layer, here and in one whose groups lie in order."""
    size = case.n * case.k * case.bits // 8
    ours, plain = (
        copies(map(timed, layers(item)), size, case.m) for item in (case, case._replace(groups=""))
    )
    compare(benchmark, lambda: next(ours)(), plain=lambda: next(plain)())


def gradient(y: Tensor, of: Tensor, dy: Tensor) -> Run:
    return lambda: torch.autograd.grad(y, of, dy, retain_graph=True)


@torch.no_grad()
@pytest.mark.parametrize("case", PERMUTED)
def test_permuted_nt(benchmark: Any, case: Case) -> None:
    x = randn(case.m, case.k, dtype=case.dtype)
    compare_layers(benchmark, case, lambda layer: lambda: layer(x))
    describe(benchmark, "qgemm_nt", case, path_of("qgemm_nt", case))


@pytest.mark.parametrize("case", PERMUTED)
def test_permuted_nn(benchmark: Any, case: Case) -> None:
    x = randn(case.m, case.k, dtype=case.dtype).requires_grad_()
    dy = randn(case.m, case.n, dtype=case.dtype)
    compare_layers(benchmark, case, lambda layer: gradient(layer(x), x, dy))
    describe(benchmark, "qgemm_nn", case, path_of("qgemm_nn", case))


@pytest.mark.parametrize("case", PERMUTED)
def test_permuted_grad_scales(benchmark: Any, case: Case) -> None:
    """Of activations that the forward has permuted and kept."""
    x = randn(case.m, case.k, dtype=case.dtype)
    dy = randn(case.m, case.n, dtype=case.dtype)

    def timed(layer: QuantLinear) -> Run:
        scales = layer.scales.requires_grad_()
        return gradient(layer(x), scales, dy)

    compare_layers(benchmark, case, timed)
    describe(benchmark, "qgemm_grad_scales", case)


# ---- threads, and what comes before all products ----

TWO_THREADS = [Case(4, m, 4096, 4096) for m in (128, 1024)]


def on_threads(count: int, run: Run) -> Run:
    def timed() -> Any:
        lbc.runtime.set_num_threads(count)
        return run()

    return timed


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    yield
    lbc.runtime.set_num_threads(0)


@pytest.mark.skipif(
    device.on_gpu() or len(os.sched_getaffinity(0)) < 2, reason="threads need two cores"
)
@pytest.mark.usefixtures("threads_as_before")
@pytest.mark.parametrize("case", TWO_THREADS, ids=label)
@pytest.mark.parametrize("op", ["qgemm_nt", "qgemm_nn", "qgemm_grad_scales"])
def test_two_threads(benchmark: Any, op: str, case: Case) -> None:
    form = form_of(case)
    packed, scales = next(packed_weights(case))
    x, dy = (randn(case.m, size, dtype=case.dtype) for size in (case.k, case.n))
    run: Run = {
        "qgemm_nt": lambda: ops.qgemm_nt(x, packed, scales, **form),
        "qgemm_nn": lambda: ops.qgemm_nn(dy, packed, scales, in_features=case.k, **form),
        "qgemm_grad_scales": lambda: ops.qgemm_grad_scales(dy, x, packed, **form),
    }[op]
    compare(benchmark, on_threads(2, run), one_thread=on_threads(1, run))
    describe(benchmark, f"{op}_two_threads", case)


@pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{device.name()}-bits{bits}-N4096-K4096")
def test_prepack(benchmark: Any, bits: int) -> None:
    case = Case(bits, 0, 4096, 4096)
    qweight, qzeros, _ = canonical(case)
    compare(benchmark, lambda: ops.prepack(qweight, qzeros, bits=bits, group_size=case.group_size))
    benchmark.extra_info.update(
        op="prepack",
        isa=device.name(),
        device=device.model(),
        threads=lbc.runtime.num_threads(),
        **{"bits": bits, "group_size": case.group_size, "N": case.n, "K": case.k},
    )


# ---- decoding, where launching costs more than computing ----

HIDDEN, INTERMEDIATE, BLOCKS = 4096, 11008, 8  # of LLaMA-7B, a quarter of its blocks
LINEARS = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
Linear = Callable[[Tensor], Tensor]


def packed_linear(bits: int, n: int, k: int) -> Linear:
    case = Case(bits, 1, n, k)
    packed, scales = next(packed_weights(case))
    return lambda x: ops.qgemm_nt(x, packed, scales, **form_of(case))


def dense_linear(n: int, k: int) -> Linear:
    weight = randn(n, k, dtype=torch.bfloat16)
    return lambda x: functional.linear(x, weight)


def decode_step(make: Callable[[int, int], Linear]) -> Callable[[], Tensor]:
    """One token through blocks that have everything but attention."""
    blocks = [[make(n, k) for n, k in LINEARS] for _ in range(BLOCKS)]
    token = randn(1, HIDDEN, dtype=torch.bfloat16)

    def step() -> Tensor:
        hidden = token
        for query, key, value, out, gate, up, down in blocks:
            x = functional.rms_norm(hidden, (HIDDEN,))
            hidden = hidden + out(query(x) + key(x) + value(x))
            x = functional.rms_norm(hidden, (HIDDEN,))
            hidden = hidden + down(functional.silu(gate(x)) * up(x))
        return hidden

    return step


def captured(step: Callable[[], Tensor]) -> Callable[[], None]:
    """The step as one CUDA graph."""
    step()  # what happens once happens before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_holds: Callable[[], Tensor] = step) -> None:  # the memory that the graph reads
        graph.replay()

    return replay


@pytest.mark.skipif(not device.on_gpu(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("bits", BITS)
def test_decode_step(benchmark: Any, bits: int) -> None:
    step = decode_step(lambda n, k: packed_linear(bits, n, k))
    compare(
        benchmark,
        captured(step),
        seconds=device.gpu_wall_seconds,
        eager=step,
        dense=captured(decode_step(dense_linear)),
    )
    # As one linear with as many weights.
    weights = BLOCKS * sum(n * k for n, k in LINEARS)
    case = Case(bits, 1, HIDDEN, weights // HIDDEN)
    describe(benchmark, "decode_step", case, path_of("qgemm_nt", case))

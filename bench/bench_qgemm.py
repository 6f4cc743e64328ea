"""Throughput of the three products beside torch's dense ones.

    pytest bench/                                   # medians; ratios are in extra_info
    pytest bench/ --benchmark-json=result.json
    pytest bench/ -k "bits4 and M1024"
    pytest bench/ -m "full or not full"             # wide layers, small ones, more rows: an hour
    pytest bench/ --benchmark-disable               # each case once, to see that it runs

A case alternates with its baselines within one run, so that a machine that slows down slows both.
At small M, weights rotate over copies larger than the last-level cache, ours and the baselines'.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import device
import lowbitcore as lbc
from ceilings import CACHE_BYTES, peak_gflops, read_gbytes_per_s
from lowbitcore import dispatch, ops

SHAPES = [(4096, 4096), (1536, 576), (576, 1536)]
FULL_SHAPES = [(11008, 4096), (4096, 11008), (576, 576), (192, 576)]
ROWS = [1, 16, 128, 1024]
FULL_ROWS = [4, 32, 512, 2048, 4096]
PERMUTED_ROWS = [1, 16, 32, 64, 128, 256]
BITS = [2, 3, 4, 8]
GROUP_SIZE = 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS = 9
T = TypeVar("T")


class Case(NamedTuple):
    bits: int
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    permuted: bool = False  # the weight has a g_idx, as act-order leaves it


def as_parameter(case: Case) -> Any:
    full = (case.n, case.k) in FULL_SHAPES or case.m in FULL_ROWS or case.permuted
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    label = f"bits{case.bits}-g{GROUP_SIZE}-M{case.m}-N{case.n}-K{case.k}-{dtype}"
    label += "-permuted" if case.permuted else ""
    marks = pytest.mark.full if full else ()
    return pytest.param(case, id=f"{device.name()}-{label}", marks=marks)


CASES = [
    as_parameter(Case(bits, m, n, k, dtype))
    for (n, k), m, bits, dtype in itertools.product(
        SHAPES + FULL_SHAPES, sorted(ROWS + FULL_ROWS), BITS, DTYPES.values()
    )
]
PERMUTED = [as_parameter(Case(4, m, 4096, 4096, permuted=True)) for m in PERMUTED_ROWS]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device.device(), dtype=dtype)


def packed_weights(n: int, k: int, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same packed integers and their scales, anew each time, as layers of a model have them."""
    codes, scales, zeros = ops.quantize_rtn(randn(n, k), bits=bits, group_size=GROUP_SIZE)
    qweight, qzeros = ops.pack_qweight(codes, bits=bits), ops.pack_qzeros(zeros, bits=bits)
    while True:
        packed = ops.prepack(qweight, qzeros, bits=bits, group_size=GROUP_SIZE)
        yield packed, scales.clone()


def dense_weights(n: int, k: int, dtype: torch.dtype) -> Iterator[Tensor]:
    weight = randn(n, k, dtype=dtype)
    while True:
        yield weight.clone()


def form_of(case: Case) -> dict[str, Any]:
    """What the products want to know of a weight, beside its bytes and scales."""
    g_idx = None
    if case.permuted:
        g_idx = (torch.randperm(case.k) // GROUP_SIZE).int().to(device.device())
    return {"bits": case.bits, "group_size": GROUP_SIZE, "g_idx": g_idx}


def copies(weights: Iterator[T], weight_bytes: int, m: int) -> itertools.cycle[T]:
    # A GPU's cache holds a weight, too, and its arithmetic hides a read only of many more rows.
    most = 512 if device.on_gpu() else 16
    count = max(1, CACHE_BYTES // weight_bytes) if m <= most else 1
    return itertools.cycle(list(itertools.islice(weights, count)))


def packed_copies(case: Case) -> itertools.cycle[tuple[Tensor, Tensor]]:
    weights = packed_weights(case.n, case.k, case.bits)
    return copies(weights, case.n * case.k * case.bits // 8, case.m)


def dense_copies(case: Case) -> itertools.cycle[Tensor]:
    weights = dense_weights(case.n, case.k, case.dtype)
    return copies(weights, case.n * case.k * case.dtype.itemsize, case.m)


def path_of(op: dispatch.Op, case: Case) -> dispatch.Path:
    return dispatch.path(
        op,
        case.m,
        device.device(),
        dtype=case.dtype,
        permuted=case.permuted,
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
        op=f"{op}_permuted" if case.permuted else op,
        isa=device.name(),
        device=device.model(),
        path=path,
        bits=case.bits,
        group_size=GROUP_SIZE,
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
@pytest.mark.parametrize("case", CASES + PERMUTED)
def test_qgemm_nt(benchmark: Any, case: Case) -> None:
    form = form_of(case)
    x = randn(case.m, case.k, dtype=case.dtype)
    ours, dense = packed_copies(case), dense_copies(case)

    def run() -> Tensor:
        return ops.qgemm_nt(x, *next(ours), **form)

    def dequantize_first() -> Tensor:
        weight = ops.dequantize(*next(ours), in_features=case.k, dtype=case.dtype, **form)
        return functional.linear(x, weight)

    path = path_of("qgemm_nt", case)
    compare(
        benchmark,
        run,
        dense=lambda: functional.linear(x, next(dense)),
        dequant=dequantize_first,
        **not_taken(path, run),
    )
    describe(benchmark, "qgemm_nt", case, path)


@pytest.mark.parametrize("case", CASES + PERMUTED)
def test_qgemm_nn(benchmark: Any, case: Case) -> None:
    form = form_of(case)
    dy = randn(case.m, case.n, dtype=case.dtype)
    ours, dense = packed_copies(case), dense_copies(case)

    def run() -> Tensor:
        return ops.qgemm_nn(dy, *next(ours), in_features=case.k, **form)

    def dequantize_first() -> Tensor:
        weight = ops.dequantize(*next(ours), in_features=case.k, dtype=case.dtype, **form)
        return dy @ weight

    path = path_of("qgemm_nn", case)
    compare(
        benchmark,
        run,
        dense=lambda: dy @ next(dense),
        dequant=dequantize_first,
        **not_taken(path, run),
    )
    describe(benchmark, "qgemm_nn", case, path)


@pytest.mark.parametrize("case", CASES)
def test_qgemm_grad_scales(benchmark: Any, case: Case) -> None:
    ours = packed_copies(case)
    dy = randn(case.m, case.n, dtype=case.dtype)
    x = randn(case.m, case.k, dtype=case.dtype)
    compare(
        benchmark,
        lambda: ops.qgemm_grad_scales(dy, x, next(ours)[0], bits=case.bits, group_size=GROUP_SIZE),
        dense=lambda: dy.T @ x,  # the dense dW alone, without contracting it
    )
    describe(benchmark, "qgemm_grad_scales", case)


# ---- decoding, where launching costs more than computing ----

HIDDEN, INTERMEDIATE, BLOCKS = 4096, 11008, 8  # of LLaMA-7B, a quarter of its blocks
LINEARS = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
Linear = Callable[[Tensor], Tensor]


def packed_linear(bits: int, n: int, k: int) -> Linear:
    packed, scales = next(packed_weights(n, k, bits))
    return lambda x: ops.qgemm_nt(x, packed, scales, bits=bits, group_size=GROUP_SIZE)


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

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
from collections.abc import Callable
from typing import Any

import pytest
import torch

import device
import lowbitcore as lbc
from ceilings import CACHE_BYTES, peak_gflops, read_gbytes_per_s
from lowbitcore import ops

SHAPES = [(4096, 4096), (1536, 576), (576, 1536)]
FULL_SHAPES = [(11008, 4096), (4096, 11008), (576, 576), (192, 576)]
ROWS = [1, 16, 128, 1024]
FULL_ROWS = [4, 32, 512, 4096]
BITS = [2, 3, 4, 8]
GROUP_SIZE = 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS = 9

CASES = [
    pytest.param(
        bits,
        m,
        n,
        k,
        dtype,
        id=f"{device.name()}-bits{bits}-g{GROUP_SIZE}-M{m}-N{n}-K{k}-{name}",
        marks=pytest.mark.full if (n, k) in FULL_SHAPES or m in FULL_ROWS else (),
    )
    for (n, k), m, bits, (name, dtype) in itertools.product(
        SHAPES + FULL_SHAPES, sorted(ROWS + FULL_ROWS), BITS, DTYPES.items()
    )
]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=device.device(), dtype=dtype)


def packed_weight(n: int, k: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales, zeros = ops.quantize_rtn(randn(n, k), bits=bits, group_size=GROUP_SIZE)
    qweight, qzeros = ops.pack_qweight(codes, bits=bits), ops.pack_qzeros(zeros, bits=bits)
    return ops.prepack(qweight, qzeros, bits=bits, group_size=GROUP_SIZE), scales


def copies(tensor: torch.Tensor, m: int) -> itertools.cycle[torch.Tensor]:
    count = max(1, CACHE_BYTES // (tensor.numel() * tensor.element_size())) if m <= 16 else 1
    return itertools.cycle([tensor.clone() for _ in range(min(count, 64))])


def compare(benchmark: Any, run: Callable[[], Any], **baselines: Callable[[], Any]) -> None:
    """Times `run` in turn with its baselines; `ratio_X` is the time of X over ours."""
    if not benchmark.disabled:
        times: dict[str, list[float]] = {"ours": []} | {name: [] for name in baselines}
        for _ in range(ROUNDS + 1):
            for name, function in [("ours", run), *baselines.items()]:
                times[name].append(device.seconds(function))
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        benchmark.extra_info["ms"] = medians["ours"] * 1e3
        for name in baselines:
            benchmark.extra_info[f"ratio_{name}"] = medians[name] / medians["ours"]
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)


def describe(
    benchmark: Any, op: str, bits: int, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    benchmark.extra_info.update(
        op=op,
        isa=device.name(),
        bits=bits,
        group_size=GROUP_SIZE,
        M=m,
        N=n,
        K=k,
        dtype=str(dtype).removeprefix("torch."),
        threads=lbc.runtime.num_threads(),
    )
    if "ms" in benchmark.extra_info:
        seconds = benchmark.extra_info["ms"] / 1e3
        benchmark.extra_info["gflops"] = 2 * m * n * k / seconds / 1e9
        rate = n * k * bits / 8 / seconds / 1e9
        benchmark.extra_info["packed_gbytes_per_s"] = rate
        benchmark.extra_info["fraction_of_bandwidth"] = rate / read_gbytes_per_s()
        benchmark.extra_info["read_gbytes_per_s"] = read_gbytes_per_s()
        peak = peak_gflops(dtype)
        if peak is not None:
            benchmark.extra_info["fraction_of_peak"] = benchmark.extra_info["gflops"] / peak
            benchmark.extra_info["peak_gflops"] = peak


@pytest.mark.parametrize(("bits", "m", "n", "k", "dtype"), CASES)
def test_qgemm_nt(benchmark: Any, bits: int, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    packed, scales = packed_weight(n, k, bits)
    form: dict[str, Any] = {"bits": bits, "group_size": GROUP_SIZE}
    x = randn(m, k, dtype=dtype)
    ours, dense = copies(packed, m), copies(randn(n, k, dtype=dtype), m)

    def dequantize_first() -> torch.Tensor:
        weight = ops.dequantize(next(ours), scales, in_features=k, dtype=dtype, **form)
        return torch.nn.functional.linear(x, weight)

    compare(
        benchmark,
        lambda: ops.qgemm_nt(x, next(ours), scales, **form),
        dense=lambda: torch.nn.functional.linear(x, next(dense)),
        dequant=dequantize_first,
    )
    describe(benchmark, "qgemm_nt", bits, m, n, k, dtype)


@pytest.mark.parametrize(("bits", "m", "n", "k", "dtype"), CASES)
def test_qgemm_nn(benchmark: Any, bits: int, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    packed, scales = packed_weight(n, k, bits)
    form: dict[str, Any] = {"bits": bits, "group_size": GROUP_SIZE}
    dy = randn(m, n, dtype=dtype)
    ours, dense = copies(packed, m), copies(randn(n, k, dtype=dtype), m)
    compare(
        benchmark,
        lambda: ops.qgemm_nn(dy, next(ours), scales, in_features=k, **form),
        dense=lambda: dy @ next(dense),
    )
    describe(benchmark, "qgemm_nn", bits, m, n, k, dtype)


@pytest.mark.parametrize(("bits", "m", "n", "k", "dtype"), CASES)
def test_qgemm_grad_scales(
    benchmark: Any, bits: int, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    packed, _ = packed_weight(n, k, bits)
    dy, x = randn(m, n, dtype=dtype), randn(m, k, dtype=dtype)
    compare(
        benchmark,
        lambda: ops.qgemm_grad_scales(dy, x, packed, bits=bits, group_size=GROUP_SIZE),
        dense=lambda: dy.T @ x,  # the dense dW alone, without contracting it
    )
    describe(benchmark, "qgemm_grad_scales", bits, m, n, k, dtype)

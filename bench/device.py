"""Where products are timed, and how: on the GPU that torch and this build share, else on the CPU.

CUDA_VISIBLE_DEVICES= (empty) hides a GPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

_CALLS = 20  # of one measurement on a GPU
_SHORT = 5e-3  # seconds
# Ticks of a GPU's clock: about 10 ms at first, 0.1 s at most.
_SPIN, _LONGEST_SPIN = 1 << 24, 1 << 28


@functools.cache
def on_gpu() -> bool:
    from lowbitcore import runtime  # not before: the peers' interpreter may lack it

    return runtime.why_no_cuda() is None


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def name() -> str:
    """For test ids: the level of the CPU, or the architecture of the GPU."""
    if on_gpu():
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    from lowbitcore import runtime

    return runtime.isa()


def model() -> str:
    """Which GPU; of the CPU, pytest-benchmark's JSON says more by itself."""
    return torch.cuda.get_device_name() if on_gpu() else "cpu"


def seconds(function: Callable[[], Any]) -> float:
    """The time of one call, where products are timed."""
    return gpu_seconds(function) if on_gpu() else cpu_seconds(function)


def cpu_seconds(function: Callable[[], Any]) -> float:
    """The time of one call or, where it is short, of one among several in a row, as a model's
    layers follow each other: the first finds the interpreter's own data gone from the caches."""
    start = time.perf_counter()
    function()
    alone = time.perf_counter() - start
    if alone > _SHORT:
        return alone
    start = time.perf_counter()
    for _ in range(_CALLS):
        function()
    return (time.perf_counter() - start) / _CALLS


def gpu_seconds(function: Callable[[], Any]) -> float:
    """What the GPU needs for one call of many in a row; issuing them is not counted.

    It spins until all have been issued: small products take less than their launch.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spin = _SPIN
    while True:
        torch.cuda._sleep(spin)
        start.record()
        for _ in range(_CALLS):
            function()
        waited = start.query()  # the GPU was ready before the last call was
        end.record()
        end.synchronize()
        if not waited or spin >= _LONGEST_SPIN:  # some calls themselves wait for the GPU
            return start.elapsed_time(end) / 1e3 / _CALLS
        spin *= 4


def gpu_wall_seconds(function: Callable[[], Any]) -> float:
    """The time of one call of many in a row, with what it takes to issue it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_CALLS):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / _CALLS

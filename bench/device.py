"""Where products are timed: on the GPU that torch and this build share, else on the CPU.

CUDA_VISIBLE_DEVICES= (empty) hides a GPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def on_gpu() -> bool:
    if not torch.cuda.is_available():
        return False
    from lowbitcore import runtime  # not before: the peers' interpreter may lack it

    return runtime.cuda_status().startswith("built; devices")


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def name() -> str:
    """For test ids: the level of the CPU, or the architecture of the GPU."""
    if on_gpu():
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    from lowbitcore import runtime

    return runtime.isa()


def seconds(function: Callable[[], Any]) -> float:
    """The time of one call; of many in a row on a GPU, where launches would hide it."""
    calls = 20 if on_gpu() else 1
    if on_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if on_gpu():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls

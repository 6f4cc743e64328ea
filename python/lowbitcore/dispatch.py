"""Which way a product takes on CUDA: through the fused kernel, which reads packed weights, or
through a dequantized weight and torch's dense product.

Dequantizing costs the same for any number of rows, and the dense product is faster on devices whose
peak the fused kernels do not reach; from some number of rows on it wins. The table says from where.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch

from lowbitcore import _C

__all__ = [
    "ENVIRONMENT",
    "PANEL_BYTES",
    "RULES",
    "Op",
    "Path",
    "Rule",
    "capability",
    "override",
    "panels",
    "path",
]

Op = Literal["qgemm_nt", "qgemm_nn"]
Path = Literal["fused", "dequantize"]

# Overrides the table for a process: the most rows that fused kernels get.
ENVIRONMENT = "LOWBITCORE_CUDA_FUSED_ROWS"
# Of a weight so much is dequantized at a time; torch's allocator reuses the memory from one panel,
# and one product, to the next.
PANEL_BYTES = 1 << 28


class Rule(NamedTuple):
    """On devices of this compute capability, up to that of the next rule, the fused kernel takes up
    to `rows` rows (None: any number). `permuted`: of weights with a g_idx."""

    op: Op
    permuted: bool
    capability: tuple[int, int]
    rows: int | None
    source: Literal["roofline", "measurement"]


# With a time for the fused kernel of 2 M N K / F and for the other way of N K d / B + 2 M N K / D,
# the two meet at M = d / 2B / (1/F - 1/D); d is bytes read and written to dequantize a weight: 2.5
# at 4 bits.
#
# sm_80 to sm_89, sm_120: mma.sync is what the dense product runs on too, so F = D.
# sm_90: both are wgmma, D = 800 TFLOP/s, B = 3.0 TB/s; if the fused kernel reaches 85% of D: 1890.
# sm_100: F is that of mma.sync, 520 on the H100 and no less there, and D is at least 800: 620.
# So it is on sm_90, too, in a build without wgmma.
# g_idx: F is that of fp32 units. 13 rows on an H100 (F = 33), 35 on an A100 (F = 19.5, D = 250,
# B = 1.5), 70 on an RTX 4090 (F = 41, D = 165, B = 1.0).
RULES = tuple(
    Rule(op, permuted, capability, rows, "roofline")
    for op in ("qgemm_nt", "qgemm_nn")
    for permuted, capability, rows in (
        (False, (8, 0), None),
        (False, (9, 0), 1920),
        (False, (10, 0), 640),
        (False, (12, 0), None),
        (True, (8, 0), 64),
    )
)

# Not of a thread: autograd runs the backward in threads of its own.
_override: list[int] = []


@contextmanager
def override(rows: int) -> Iterator[None]:
    """Fused kernels get at most `rows` rows for as long as this lasts, in all threads."""
    if type(rows) is not int or rows < 0:
        raise ValueError(f"override: rows: expected an integer of 0 or more, got {rows!r}")
    _override.append(rows)
    try:
        yield
    finally:
        _override.pop()


def path(
    op: Op,
    rows: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    permuted: bool = False,
    weights: int = 0,
) -> Path:
    """The way of a product with `rows` rows of activations in `dtype`; `weights` is N * K,
    `permuted` whether there is a g_idx.

    On the CPU, and for anything but 16 bits (float32 is computed exactly), always "fused".
    """
    architecture = capability(device)
    if architecture is None or dtype not in (torch.bfloat16, torch.float16):
        return "fused"
    # Its sums run over the panels, and between two of them they would be rounded.
    if op == "qgemm_nn" and weights * dtype.itemsize > PANEL_BYTES:
        return "fused"
    most = _override[-1] if _override else _from_environment()
    if most is None:
        slower = architecture == (9, 0) and not _C.cuda_has_wgmma()
        most = _from_table(op, permuted, (10, 0) if slower else architecture)
    return "fused" if most is None or rows <= most else "dequantize"


def panels(out_features: int, in_features: int, dtype: torch.dtype) -> list[slice]:
    """The outputs of a weight [N, K], cut into those that a panel holds."""
    size = max(32, PANEL_BYTES // (in_features * dtype.itemsize) // 32 * 32)
    starts = range(0, out_features, size)
    return [slice(start, min(start + size, out_features)) for start in starts]


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for what is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@cache
def _from_environment() -> int | None:
    value = os.environ.get(ENVIRONMENT)
    if value is None:
        return None
    if not value.isdecimal():
        raise ValueError(f"{ENVIRONMENT}: expected an integer of 0 or more, got {value!r}")
    return int(value)


@cache
def _from_table(op: Op, permuted: bool, capability: tuple[int, int]) -> int | None:
    """The rule with the newest capability that the device has."""
    found = [
        rule
        for rule in RULES
        if (rule.op, rule.permuted) == (op, permuted) and rule.capability <= capability
    ]
    return max(found, key=lambda rule: rule.capability).rows if found else None

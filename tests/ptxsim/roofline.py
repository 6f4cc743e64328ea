"""The least time a product can take on a GPU, from its exact counts and published figures.

time = max(DRAM bytes / bandwidth, tensor operations / peak, warp instructions / issue slots)

What no count can tell, and only a GPU confirms: which share of each peak is reached, what the
caches keep, the cost of launches, how well copies, issue and tensor cores overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptxsim.geometry import Problem
from ptxsim.model import Prediction


@dataclass(frozen=True)
class Gpu:
    name: str
    multiprocessors: int
    ghz: float
    bandwidth: float  # bytes/s
    mma_peak: float  # flop/s of mma.sync in 16 bits with fp32 sums
    dense_peak: float  # flop/s of the dense product it is compared with, and of wgmma
    capability: int
    source: str


# Specifications, but for the H100: bandwidth, wgmma (dense) and mma.sync as others measured them.
GPUS = (
    Gpu("A100 SXM 80 GB", 108, 1.41, 2.039e12, 312e12, 312e12, 80, "specified"),
    Gpu("RTX 4090", 128, 2.52, 1.008e12, 165e12, 165e12, 89, "specified"),
    Gpu("H100 SXM", 132, 1.755, 3.0e12, 520e12, 800e12, 90, "measured by others; 3.35 specified"),
)
SCHEDULERS = 4  # of a multiprocessor; each issues one warp instruction a clock


@dataclass(frozen=True)
class Bounds:
    """Seconds that each resource needs by itself."""

    dram: float
    tensor: float
    issue: float

    @property
    def seconds(self) -> float:
        return max(self.dram, self.tensor, self.issue)

    @property
    def binding(self) -> str:
        return max(("dram", "tensor", "issue"), key=lambda name: getattr(self, name))


def bounds(p: Prediction, gpu: Gpu, *, spilled: bool = False) -> Bounds:
    """`spilled`: partial results go to DRAM and back, instead of staying in the L2 cache."""
    return Bounds(
        (p.dram_bytes + (p.partial_bytes if spilled else 0)) / gpu.bandwidth,
        p.flops / (gpu.dense_peak if p.geometry.wgmma else gpu.mma_peak),
        p.instructions / (SCHEDULERS * gpu.multiprocessors * gpu.ghz * 1e9),
    )


def dense_seconds(p: Problem, gpu: Gpu) -> float:
    """The same product of 16-bit matrices; for dS, the product dW that a dense layer needs."""
    moved = 2 * (p.m * p.k + p.m * p.n + p.n * p.k)
    return max(moved / gpu.bandwidth, p.flops() / gpu.dense_peak)


def panel_seconds(p: Problem, gpu: Gpu) -> float:
    """W to 16 bits in memory once, then the dense product: what many rows are better off with."""
    packed = 32 * (p.weight_sectors + p.grid_sectors)
    return (packed + 2 * p.n * p.k) / gpu.bandwidth + dense_seconds(p, gpu)


def balance(p: Prediction, gpu: Gpu) -> float:
    """Part of the time that multiprocessors are busy, if each takes whole and equal blocks."""
    each = -(-p.blocks // gpu.multiprocessors)
    return p.blocks / (each * gpu.multiprocessors)

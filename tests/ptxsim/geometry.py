"""What a tensor-core kernel is, read from its name, and the least that a product can cost in it.

The kernels' template arguments are in their mangled names, so that nothing here repeats which tile
the library chooses; what follows from a tile is derived once more and compared with what ran.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TILE = 32  # outputs and inputs of a tile of the packed weight
SECTOR = 32  # bytes that DRAM moves at once
MMA_FLOPS = 2 * 16 * 8 * 16  # of one m16n8k16
OPS = ("nt", "nn", "grad_scales")

_WGMMA = re.compile(
    r"qgemm_wgmma_kernelI\w*?(Forward|Transposed)WeightsI(6__half|13__nv_bfloat16)Li(\d+)E"
)
_NAME = re.compile(r"qgemm_(nt|nn|grad_scales)_kernelI(6__half|13__nv_bfloat16)((?:Li\d+E)+)E")


def up(count: int, size: int) -> int:
    """How many of `size` cover `count`."""
    return -(-count // size)


@dataclass(frozen=True)
class Problem:
    """X [m, k], packed W [n, k] with its groups, dY [m, n]."""

    bits: int
    m: int
    n: int
    k: int
    group_size: int = 128

    @property
    def groups(self) -> int:
        return up(self.k, self.group_size)

    @property
    def weight_sectors(self) -> int:
        return self.n * self.k * self.bits // 8 // SECTOR

    @property
    def grid_sectors(self) -> int:
        """One row of scales and zeros for each group; scales are fp32, zeros are bytes."""
        return self.groups * self.n * 5 // SECTOR

    def activation_sectors(self, columns: int) -> int:
        return self.m * columns * 2 // SECTOR

    def columns(self, op: str) -> int:
        """Of the result of a product."""
        return self.n if op == "nt" else self.k

    def depth(self, op: str) -> int:
        """What a product sums over."""
        return {"nt": self.k, "nn": self.n, "grad_scales": self.m}[op]

    def flops(self) -> int:
        """Of the dense product, the same in every direction."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Geometry:
    """The tile of a block: `rows` x `columns` of the result in steps of the contraction."""

    op: str
    dtype: str
    bits: int
    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    stage_bytes: int
    wgmma: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes

    @property
    def label(self) -> str:
        kind = " wgmma" if self.wgmma else ""
        return f"{self.op} {self.bits}-bit {self.dtype} {self.rows}x{self.columns}{kind}"

    @property
    def step_products(self) -> int:
        """m16n8k16 that a warp multiplies in a step."""
        return 2 * self.rows * self.columns * self.step // MMA_FLOPS // self.warps

    @property
    def blocks_each(self) -> int:
        """Blocks on a multiprocessor that the dispatcher counts on."""
        return 2 if self.op == "grad_scales" or self.rows == 16 else 1

    def tiles(self, p: Problem) -> tuple[int, int]:
        """Blocks of the result, in x and y."""
        if self.op == "grad_scales":
            return up(p.n, self.rows), up(p.k, self.columns)
        return up(p.m, self.rows), up(p.columns(self.op), self.columns)

    def steps(self, p: Problem) -> int:
        return up(p.depth(self.op), self.step)


def geometry_of(kernel: str) -> Geometry | None:
    """None for kernels that use no tensor core."""
    found = _WGMMA.search(kernel)
    if found is not None:
        return _wgmma_geometry("nt" if found[1] == "Forward" else "nn", found[2], int(found[3]))
    found = _NAME.search(kernel)
    if found is None:
        return None
    op, dtype = found[1], "fp16" if "half" in found[2] else "bf16"
    bits, *rest = (int(number) for number in re.findall(r"Li(\d+)E", found[3]))
    tile_bytes = TILE * TILE // 8 * bits
    if op == "grad_scales":
        (stages,) = rest
        return Geometry(op, dtype, bits, 128, 128, 32, 4, stages, 2 * 32 * 128 * 2)
    if op == "nt":
        fragments, strips, warps_m, warps_n, stages = rest
        rows, columns = 16 * fragments * warps_m, TILE * strips * warps_n
        grid_bytes = 2 * columns * 5  # of two groups: a step may touch as many
    else:
        fragments, warps_m, warps_n, stages = rest
        rows, columns = 16 * fragments * warps_m, 2 * TILE * warps_n
        grid_bytes = columns // TILE * 64 * 5  # every tile of inputs may be in a group of its own
    stage_bytes = rows * 64 * 2 + 2 * columns // TILE * tile_bytes + grid_bytes
    return Geometry(op, dtype, bits, rows, columns, 64, warps_m * warps_n, stages, stage_bytes)


def _wgmma_geometry(op: str, dtype: str, bits: int) -> Geometry:
    """gemm_wgmma.cuh has one tile: two groups of four warps, 32 columns a warp."""
    rows, columns, stages = 128, 256, 4
    weight_bytes = 2 * columns // TILE * TILE * TILE // 8 * bits
    grid_bytes = 2 * columns * 5 if op == "nt" else columns // TILE * 64 * 5
    stage_bytes = up(rows * 64 * 2 + weight_bytes + grid_bytes, 1024) * 1024
    name = "fp16" if "half" in dtype else "bf16"
    return Geometry(op, name, bits, rows, columns, 64, 8, stages, stage_bytes, wgmma=True)


@dataclass(frozen=True)
class Least:
    """The least that a launch can do, given its tile."""

    flops: int  # of the tensor cores
    read_sectors: int  # distinct, from DRAM
    write_sectors: int
    cp_async_sectors: int
    load_sectors: int  # of plain loads from global memory


def least(g: Geometry, p: Problem, splits: int) -> Least:
    across, down = g.tiles(p)
    flops = 2 * across * g.rows * down * g.columns * g.steps(p) * g.step
    tiles = p.k // TILE
    x, dy = p.activation_sectors(p.k), p.activation_sectors(p.n)
    if g.op == "grad_scales":
        # The epilogue of each share of the tokens reads W once. For every tile and 16 of its
        # outputs, two warp instructions read 8 zeros each, which lie in one sector.
        zeros = p.groups * p.n // SECTOR
        loads = splits * (p.weight_sectors + tiles * p.n // 16 * 2)
        written = splits * tiles * p.n * 4 // SECTOR
        read = x + dy + p.weight_sectors + zeros
        return Least(flops, read, written, dy * down + x * across, loads)
    # A row of blocks reads W once. Activations come once for each column of blocks, and the rows
    # of scales and zeros once for each step (nt) or column of blocks (nn) that lies in their group.
    operand = x if g.op == "nt" else dy
    together = g.step if g.op == "nt" else g.columns
    touched = sum(
        len({tile * TILE // p.group_size for tile in range(first // TILE, end // TILE)})
        for first in range(0, p.k, together)
        for end in (min(first + together, p.k),)
    )
    grid = touched * p.n * 5 // SECTOR
    copies = across * (p.weight_sectors + grid) + down * operand
    element = 4 if splits > 1 else 2
    written = splits * p.m * p.columns(g.op) * element // SECTOR
    return Least(flops, operand + p.weight_sectors + p.grid_sectors, written, copies, 0)

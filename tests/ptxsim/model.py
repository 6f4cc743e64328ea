"""Counters of products too large to interpret, from small ones.

All blocks of a launch do the same: something once and something for each step. Two small launches
tell both, a third one of another size has to agree exactly. Groups span whole numbers of steps
here; where a large problem's parts begin in the middle of a group, the few instructions more that
this costs are not in the prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ptxsim import toolchain
from ptxsim.checks import Checks
from ptxsim.geometry import Geometry, Problem, least, up
from ptxsim.workload import MULTIPROCESSORS, Launch, Workload

# What is predicted. Sectors are not among them: they follow from the problem alone (`least`).
COUNTERS = (
    "warp_instructions",
    "mma",
    "mma_flops",
    "wgmma",
    "ldmatrix_wavefronts",
    "shared_wavefronts",
    "cp_async",
    "barriers",
)


@dataclass(frozen=True)
class Prediction:
    """One product on one device: its kernel, and the sum that follows it."""

    problem: Problem
    geometry: Geometry
    blocks: int
    splits: int
    flops: int  # of the tensor cores
    instructions: int  # of warps
    dram_bytes: int  # what any implementation of this format has to move
    partial_bytes: int  # fp32 partial results, written and read once


@cache
def splits_of(blocks: int, steps: int, multiprocessors: int, blocks_each: int) -> int:
    """Parts into which the library's dispatcher cuts the contraction."""
    (splits,) = toolchain.ask("splits.cpp", [(blocks, steps, multiprocessors, blocks_each)])
    return splits


class Model:
    """Of a device's compute capability."""

    def __init__(
        self,
        work: Workload,
        dtype: str,
        capability: int,
        checks: Checks,
        older: Model | None = None,
    ) -> None:
        """`older`: of a device whose kernels this one runs, too, but for wgmma."""
        self._work, self._dtype, self._capability = work, dtype, capability
        self._checks, self._older = checks, older
        self._per_block = cache(self._fit)
        self._reduction = cache(self._measure_reduction)
        self._tile = cache(self._geometry)
        # PTX instructions that a warp runs in a step, of every kernel predicted so far.
        self.step_instructions: dict[Geometry, float] = {}

    def predict(self, op: str, p: Problem, multiprocessors: int) -> Prediction:
        g = self._tile(op, p.bits, p.m)
        if self._older is not None and not g.wgmma:
            return self._older.predict(op, p, multiprocessors)
        across, down = g.tiles(p)
        steps = g.steps(p)
        splits = splits_of(across * down, steps, multiprocessors, g.blocks_each)
        share = up(steps, splits)
        shares = [min(share, max(0, steps - i * share)) for i in range(splits)]
        once, each = self._per_block(op, p.bits, self._few_rows(g, p.m), splits > 1)
        totals = {
            name: across * down * sum(once[name] + each[name] * s for s in shares)
            for name in COUNTERS
        }
        need = least(g, p, splits)
        instructions = totals["warp_instructions"]
        dram = need.read_sectors + need.write_sectors
        partial = 0
        if op == "grad_scales" or splits > 1:
            # Partial results stand where the result will; the last kernel writes that.
            partial = 2 * 32 * need.write_sectors
            results = p.groups * p.n if op == "grad_scales" else p.m * p.columns(op)
            dram += results * (4 if op == "grad_scales" else 2) // 32 - need.write_sectors
            instructions += round(up(results, 32) * self._reduction(op, splits))
        return Prediction(
            p,
            g,
            across * down * splits,
            splits,
            totals["mma_flops"],
            instructions,
            32 * dram,
            partial,
        )

    def confirm(self, op: str, p: Problem) -> None:
        """Checks the prediction of a whole launch against the launch."""
        predicted = self.predict(op, p, MULTIPROCESSORS)
        launches, _ = self._work.run(op, p, self._dtype, self._capability)
        got = {
            "blocks": launches[0].blocks,
            "flops": launches[0].counters["mma_flops"],
            "instructions": sum(one.counters["warp_instructions"] for one in launches),
        }
        wanted = {name: getattr(predicted, name) for name in got}
        label = f"{predicted.geometry.label}, M = {p.m}, {p.n}x{p.k}"
        self._checks.equal(f"{label}: counted as predicted", got, wanted)

    def _run(self, op: str, p: Problem) -> tuple[Launch, list[Launch]]:
        first, *rest = self._work.run(op, p, self._dtype, self._capability)[0]
        return first, rest

    @staticmethod
    def _few_rows(g: Geometry, m: int) -> int:
        """The least rows with blocks like those of m rows."""
        if g.op == "grad_scales":  # rows are steps
            return m if m <= g.step else 2 * g.step
        return g.rows if m % g.rows == 0 else m

    def _geometry(self, op: str, bits: int, m: int) -> Geometry:
        g = self._run(op, Problem(bits, min(m, 256), 256, 256))[0].geometry
        assert g is not None
        return g

    def _fit(
        self, op: str, bits: int, m: int, split: bool
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Counts of a block, without its steps and for each of them."""
        g = self._tile(op, bits, m)
        if op == "grad_scales" and m <= g.step:
            return self._fit_one_step(bits, m, g)
        sizes = [self._shape(op, bits, m, g, steps, split) for steps in (4, 6, 8)]
        counts = []
        for p in sizes:
            launch, _ = self._run(op, p)
            splits = launch.grid[2]
            if (splits > 1) != split or g.steps(p) % splits:
                raise RuntimeError(f"{g.label}: no small problem with the splits of the large one")
            each_block = {}
            for name in COUNTERS:
                each_block[name], rest = divmod(launch.counters[name], launch.blocks)
                if rest and name != "barriers":
                    raise RuntimeError(f"{g.label}: blocks differ in {name}")
            counts.append((g.steps(p) // splits, each_block))
        (s0, a), (s1, b), (s2, c) = counts
        each = {name: (b[name] - a[name]) // (s1 - s0) for name in COUNTERS}
        once = {name: a[name] - each[name] * s0 for name in COUNTERS}
        predicted = {name: once[name] + each[name] * s2 for name in COUNTERS}
        self._checks.equal(
            f"{g.label}, {m} rows, {'split' if split else 'whole'}: counters are linear in steps",
            c,
            predicted,
        )
        self.step_instructions[g] = each["warp_instructions"] / g.warps
        return once, each

    def _fit_one_step(
        self, bits: int, m: int, g: Geometry
    ) -> tuple[dict[str, int], dict[str, int]]:
        counts = []
        for n, k in ((384, 384), (640, 512)):
            launch, _ = self._run("grad_scales", Problem(bits, m, n, k))
            counts.append({c: launch.counters[c] / launch.blocks for c in COUNTERS})
        self._checks.equal(f"{g.label}, M = {m}: blocks are alike", counts[1], counts[0])
        return {c: round(counts[0][c]) for c in COUNTERS}, dict.fromkeys(COUNTERS, 0)

    def _shape(self, op: str, bits: int, m: int, g: Geometry, share: int, split: bool) -> Problem:
        """A problem whose blocks take `share` steps each."""
        if op == "grad_scales":  # so many blocks that tokens are not split
            return Problem(bits, share * g.step, 384, 384)
        across = up(m, g.rows)
        # A part has four steps at least, so that 7 steps are never split.
        down = 1 if split else (1 if share < 8 else up(MULTIPROCESSORS + 1, across))
        splits, down = self._parts(g, across, down, share) if split else (1, down)
        out, depth = down * g.columns, splits * share * g.step
        return Problem(bits, m, out, depth) if op == "nt" else Problem(bits, m, depth, out)

    def _parts(self, g: Geometry, across: int, down: int, share: int) -> tuple[int, int]:
        """Parts that the dispatcher cuts `parts * share` steps into, and blocks that make it so."""
        for down_ in (down, 2, 4, 8):
            for parts in (4, 2, 3, 8):
                steps = parts * share
                if splits_of(across * down_, steps, MULTIPROCESSORS, g.blocks_each) == parts:
                    return parts, down_
        raise RuntimeError(f"the dispatcher never gives a block {share} steps of several parts")

    def _measure_reduction(self, op: str, splits: int) -> float:
        """Warp instructions of the last kernel for 32 results."""
        if op == "grad_scales":
            p = Problem(4, 16, 512, 512)  # whole blocks of results
            _, rest = self._run(op, p)
            return rest[-1].counters["warp_instructions"] / (p.groups * p.n / 32)
        g = self._tile(op, 4, 16)
        out, depth = g.columns, 4 * splits * g.step
        p = Problem(4, 16, out, depth) if op == "nt" else Problem(4, 16, depth, out)
        launch, rest = self._run(op, p)
        if launch.grid[2] != splits:
            raise RuntimeError(f"no small problem is split {splits} times: {launch.grid[2]}")
        return rest[-1].counters["warp_instructions"] / (16 * out / 32)

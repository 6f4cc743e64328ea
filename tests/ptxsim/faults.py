"""Bugs put into the kernels' PTX on purpose: what the interpreter and the oracle have to catch.

A test that has never failed proves little. Each fault is one that people make; it is caught if
the interpreter refuses the launch or the result is not the oracle's. A fault whose place is not
found in the PTX is an error: it would prove nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

import reference as ref
from ptxsim import SimulationError, Simulator, toolchain
from ptxsim.geometry import Geometry, Problem, geometry_of

BITS = 4
# Fills no block in any direction; its last group is short; a few steps in every pipeline.
PROBLEM = Problem(bits=BITS, m=5, n=352, k=416, group_size=64)
TOKENS = 150  # of the gradient of the scales, which sums over them
LIMIT = 1e-3  # relative error in the Frobenius norm, above what fp16 operands lose
SCALES_PARAMETER = 24  # where `scales` lies in GemmArgs (kernels.h)


class DoesNotApply(Exception):
    """The PTX has no place for this fault."""


# ---- faults: PTX of one kernel -> PTX of one kernel ----


def _substitute(pattern: str, new: str | Callable[[re.Match[str]], str], ptx: str, n: int) -> str:
    changed, count = re.subn(pattern, new, ptx, count=n)
    if count == 0 or changed == ptx:
        raise DoesNotApply(pattern)
    return changed


def _in_loop(ptx: str) -> tuple[str, str]:
    """Cut before the main loop's wait, the last one."""
    at = ptx.rfind("cp.async.wait_group")
    if at < 0:
        raise DoesNotApply("cp.async.wait_group")
    return ptx[:at], ptx[at:]


def no_barrier(ptx: str) -> str:
    before, loop = _in_loop(ptx)
    return before + _substitute(r"bar(rier)?\.sync[^;]*;", "", loop, 1)


def waits_for_one_less(ptx: str) -> str:
    return _substitute(
        r"(cp\.async\.wait_group\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}", ptx, 0
    )


def no_commit(ptx: str) -> str:
    before, loop = _in_loop(ptx)
    return before + _substitute(r"cp\.async\.commit_group;", "", loop, 1)


def copies_without_predicate(ptx: str) -> str:
    return _substitute(r"(cp\.async\.c[ag]\.[^;]*\], 16), %r\d+;", r"\1, 16;", ptx, 0)


def next_row_of_scales(ptx: str) -> str:
    row = PROBLEM.n * 4
    return _substitute(
        rf"ld\.param\.u64\s+(%rd\d+), \[\w+\+{SCALES_PARAMETER}\];",
        lambda m: f"{m[0]} add.s64 {m[1]}, {m[1]}, {row};",
        ptx,
        0,
    )


def swapped_operands(ptx: str) -> str:
    """The halves of the first mma's second operand, or of wgmma's first."""
    if "wgmma" in ptx:
        return _substitute(
            r"(wgmma\.mma_async[^{]*\{[^}]*\},\s*)\{(%r\d+), *(%r\d+),",
            r"\1{\3, \2,",
            ptx,
            1,
        )
    return _substitute(
        r"(mma\.sync\S* \{[^}]*\}, \{[^}]*\}, )\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}", ptx, 1
    )


def no_zero_point(ptx: str) -> str:
    """One zero point is taken for 0: where bytes of zeros are spread, or where they are loaded."""
    spreads = {0x4040, 0x4242, 0x4141, 0x4343, 0x4140, 0x4342}  # ZeroPair in dequant.cuh
    constants = dict(re.findall(r"mov\.[bu]32\s+(%r\d+), (\d+);", ptx))
    for place in re.finditer(r"(prmt\.b32\s+%r\d+, )%r\d+(, %r\d+, )(%r\d+|\d+);", ptx):
        if int(constants.get(place[3], place[3].replace("%r", "-"))) in spreads:
            return f"{ptx[: place.start()]}{place[1]}0{place[2]}{place[3]};{ptx[place.end() :]}"
    return _substitute(r"ld\.global(?:\.nc)?\.u8\s+(%rs\d+), \[[^;]*;", r"mov.u16 \1, 0;", ptx, 1)


def wgmma_waits_for_one_less(ptx: str) -> str:
    """The last wait of a step: results are read, and operands overwritten, while it works."""
    return _substitute(r"(wgmma\.wait_group\S*\s+)0;", r"\g<1>1;", ptx, 0)


FAULTS: dict[str, Callable[[str], str]] = {
    "no barrier in the main loop": no_barrier,
    "waits for one group of copies less": waits_for_one_less,
    "no commit in the main loop": no_commit,
    "copies ignore their predicate": copies_without_predicate,
    "the next group's scales": next_row_of_scales,
    "halves of an operand swapped": swapped_operands,
    "one zero point not subtracted": no_zero_point,
    "waits for one wgmma less": wgmma_waits_for_one_less,
}


def faults_of(g: Geometry) -> list[str]:
    """Those that a kernel can have: the gradient of the scales reads no scales."""
    without = set() if g.wgmma else {"waits for one wgmma less"}
    if g.op == "grad_scales":
        without.add("the next group's scales")
    return [fault for fault in FAULTS if fault not in without]


# ---- the kernels under test ----


def packed_weight(codes: NDArray[np.uint8], zeros: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The execution layout of 4-bit weights, written from the description in layout.cuh."""
    n, k = (axis.ravel() for axis in np.indices(codes.shape))
    row, column, k_tile = n % 32, k % 32, k // 32
    ob, o = row // 16 * 4 + row % 8 // 2, row % 2 * 2 + row % 16 // 8
    ib, m, e = column // 2 % 4, column // 8, column % 2
    unit = (ob ^ (k_tile % 2 * 4)) * 4 + (ib ^ (ob & 2))
    word = (n // 32 * (codes.shape[1] // 32) + k_tile) * 128 + unit * 4 + o
    words = np.zeros(codes.size // 8, dtype=np.uint32)
    np.bitwise_or.at(words, word, codes.ravel().astype(np.uint32) << (4 * m + 16 * e))
    return np.concatenate([words.view(np.uint8), zeros.ravel()])


@dataclass(frozen=True)
class Kernel:
    """One kernel of the library, as PTX that stands alone."""

    name: str
    geometry: Geometry
    ptx: str

    @property
    def capability(self) -> int:
        return 90 if self.geometry.wgmma else 80


def kernels() -> list[Kernel]:
    """fp16: the smallest and the largest tile of the products, with mma and wgmma, and dS."""
    chosen = []
    for family in (*toolchain.FAMILIES, *toolchain.WGMMA_FAMILIES):
        architecture = "90a" if family in toolchain.WGMMA_FAMILIES else "80"
        text = toolchain.ptx(family, BITS, architecture).read_text()
        header, *entries = re.split(r"(?=\.visible \.entry )", text)
        found = []
        for entry in entries:
            name = re.findall(r"\.entry (\w+)", entry)[0]
            geometry = geometry_of(name)
            if geometry is not None and geometry.dtype == "fp16":
                body = entry[: entry.index("\n}") + 3]
                found.append(Kernel(name, geometry, header + body))
        found.sort(key=lambda kernel: kernel.geometry.rows)
        chosen += found if len(found) == 1 else [found[0], found[-1]]
    return chosen


class Harness:
    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        p = PROBLEM
        self._weight = ref.random_problem(
            7, bits=BITS, group_size=p.group_size, out_features=p.n, in_features=p.k
        )
        # One more row of scales than there are groups: a kernel that reads it gets numbers.
        more = np.full((1, p.n), 0.5, dtype=np.float32)
        self._scales = np.concatenate([self._weight.scales, more])
        self._packed = packed_weight(self._weight.codes, self._weight.zeros)
        rng = np.random.default_rng(8)
        self._x = rng.standard_normal((TOKENS, p.k)).astype(np.float16)
        self._dy = rng.standard_normal((TOKENS, p.n)).astype(np.float16)

    @cached_property
    def _tile_sums(self) -> ref.F64:
        """What the gradient's kernel leaves: sums of each tile of 32 inputs, [K / 32, N]."""
        w = self._weight
        ones = np.ones(w.scales.shape)
        integers = ref.dequantize(w.codes, ones, w.zeros, group_size=w.group_size)
        product = (self._dy.astype(np.float64).T @ self._x.astype(np.float64)) * integers
        sums: ref.F64 = product.reshape(PROBLEM.n, -1, 32).sum(axis=2).T
        return sums

    def error(self, kernel: Kernel, ptx: str) -> float:
        """Runs the PTX in place of the kernel's; the relative error of its result."""
        p, g = PROBLEM, kernel.geometry
        group_tiles = p.group_size // 32
        packed, scales = self._packed, self._scales
        if g.op == "grad_scales":
            operands = [self._dy, self._x]
            out = np.full(self._tile_sums.shape, np.nan, dtype=np.float32)
            expected = self._tile_sums
            arguments = struct.pack(
                "<QqQqQQ4i",
                *(self._dy.ctypes.data, p.n, self._x.ctypes.data, p.k),
                *(packed.ctypes.data, out.ctypes.data, TOKENS, p.n, p.k, group_tiles),
            )
        else:
            a = (self._x if g.op == "nt" else self._dy)[: p.m].copy()
            columns = p.columns(g.op)
            operands = [a, scales]
            out = np.full((p.m, columns), np.nan, dtype=np.float16)
            w_hat = self._weight.w_hat
            expected = a.astype(np.float64) @ (w_hat.T if g.op == "nt" else w_hat)
            arguments = struct.pack(
                "<QqQQqQQqQ4i",
                *(a.ctypes.data, a.shape[1], packed.ctypes.data, scales.ctypes.data, p.n),
                *(0, out.ctypes.data, columns, 0, p.m, p.n, p.k, group_tiles),
            )
        self._simulator.load(ptx)
        grid, block = (*g.tiles(p), 1), (g.threads, 1, 1)
        with (
            self._simulator.options(seed=3, quantum=7, compute_capability=kernel.capability),
            self._simulator.regions(packed, out, *operands),
        ):
            self._simulator.launch_packed(kernel.name, grid, block, arguments, g.shared_bytes)
        return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))

    def caught(self, kernel: Kernel, fault: str) -> str | None:
        """What caught a fault, or None if nothing did."""
        try:
            error = self.error(kernel, FAULTS[fault](kernel.ptx))
        except SimulationError as refused:
            return str(refused).splitlines()[0]
        return None if error <= LIMIT else f"relative error {error:.1e}"

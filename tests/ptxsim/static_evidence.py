"""What ptxas makes of the kernels: registers, spills, warnings, occupancy, SASS main loops."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ptxsim import toolchain
from ptxsim.checks import Checks
from ptxsim.geometry import Geometry, geometry_of

ARCHITECTURES = ("80", "86", "89", "90", "90a")
# By the PTX that each is made from. sm_86 and sm_89 run the code of sm_80 where a build has no
# other (CMakeLists.txt); a build for them alone is looked at here.
VIRTUAL = {"80": "80", "86": "80", "89": "80", "90": "90", "90a": "90a"}
REGISTERS = 65536  # of a multiprocessor


def planned_blocks(geometry: Geometry, architecture: str) -> int:
    """Blocks on a multiprocessor that a kernel is made for. Two, where shared memory has room for
    them: sm_86 and sm_89 have 100 KB, which three stages of a large tile fill, and so do those of
    8 bits; those with wgmma fill any."""
    if geometry.wgmma:
        return 1
    small = architecture in ("86", "89")
    return 1 if small and not (geometry.blocks_each == 2 and geometry.bits < 8) else 2


@dataclass(frozen=True)
class Compiled:
    geometry: Geometry
    architecture: str
    registers: int
    stack: int
    spills: int  # bytes stored and loaded


@dataclass(frozen=True)
class MainLoop:
    """The innermost loop with tensor-core instructions, as ptxas laid it out."""

    geometry: Geometry
    architecture: str
    instructions: int
    hmma: int


def parse_ptxas(said: str, architecture: str) -> list[Compiled]:
    """One entry for each tensor-core kernel of ptxas -v."""
    kernels = []
    for part in said.split("Compiling entry function '")[1:]:
        geometry = geometry_of(part.split("'")[0])
        registers = re.search(r"Used (\d+) registers", part)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        if registers is None or frame is None:
            raise ValueError(f"cannot read what ptxas said:\n{part}")
        if geometry is not None:
            stack, stored, loaded = (int(number) for number in frame.groups())
            kernels.append(
                Compiled(geometry, architecture, int(registers[1]), stack, stored + loaded)
            )
    return kernels


def warnings_of(said: str) -> list[str]:
    """Lines of ptxas that are more than statistics; C75xx tells of serialised instructions."""
    return [line for line in said.splitlines() if re.search(r"warning|error|C75\d\d", line)]


def compile_all(
    families: Iterable[str], widths: Iterable[int], architectures: Iterable[str], checks: Checks
) -> list[Compiled]:
    """Every kernel of these for each architecture, checked for what ptxas can tell."""

    def compile_one(family: str, bits: int) -> list[tuple[str, str, str]]:
        return [
            (f"{family} {bits}-bit sm_{a}", a, said)
            for a in architectures
            if (a == "90a") == (family in toolchain.WGMMA_FAMILIES)
            for _, said in [toolchain.assemble(toolchain.ptx(family, bits, VIRTUAL[a]), a)]
        ]

    found: list[Compiled] = []
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(compile_one, f, b) for f in families for b in widths]
        for label, architecture, said in (one for job in jobs for one in job.result()):
            checks.equal(f"{label}: warnings of ptxas", warnings_of(said), [])
            kernels = parse_ptxas(said, architecture)
            checks.that(f"{label}: has kernels", bool(kernels), wanted="some", got=kernels)
            found += kernels
    for kernel in found:
        label = f"{kernel.geometry.label} sm_{kernel.architecture}"
        bound = min(255, REGISTERS // kernel.geometry.threads)
        checks.equal(f"{label}: bytes spilled", kernel.spills, 0)
        checks.equal(f"{label}: bytes of stack", kernel.stack, 0)
        checks.within(f"{label}: registers", kernel.registers, 1, bound)
    return found


def occupancy(kernels: list[Compiled]) -> list[int]:
    """Blocks of each kernel on a multiprocessor, by cuda_occupancy.h."""
    return toolchain.ask(
        "occupancy.cpp",
        (
            (
                *divmod(int(k.architecture[:2]), 10),
                k.geometry.threads,
                k.registers,
                k.geometry.shared_bytes,
            )
            for k in kernels
        ),
    )


def check_occupancy(kernels: list[Compiled], checks: Checks) -> None:
    """Prints blocks and warps of a multiprocessor, a line for each kernel."""
    print(f"{'kernel':34}{'shared':>8}", *(f"{f'sm_{a}':>16}" for a in ARCHITECTURES))
    print(f"{'':42}", *(f"{'registers blocks':>16}" for _ in ARCHITECTURES))
    cells: dict[Geometry, dict[str, str]] = {}
    for kernel, blocks in zip(kernels, occupancy(kernels), strict=True):
        g = kernel.geometry
        planned = planned_blocks(g, kernel.architecture)
        checks.that(
            f"{g.label} sm_{kernel.architecture}: blocks on a multiprocessor",
            blocks >= planned,
            wanted=f">= {planned}",
            got=blocks,
        )
        most = REGISTERS // (g.threads * planned)
        checks.within(
            f"{g.label} sm_{kernel.architecture}: registers of {planned} blocks",
            kernel.registers,
            1,
            most,
        )
        cells.setdefault(g, {})[kernel.architecture] = f"{kernel.registers:>9}{blocks:>7}"
    for g, cell in cells.items():
        line = (f"{cell.get(a, '-'):>16}" for a in ARCHITECTURES)
        print(f"{g.label:34}{g.shared_bytes:>8}", *line)


def main_loops(kernels_of: Iterable[tuple[str, int, str]]) -> list[MainLoop]:
    """Of (family, bits, architecture), with the disassembler."""
    tool = toolchain.disassembler()
    if tool is None:
        raise RuntimeError(toolchain.NO_DISASSEMBLER)
    loops = []
    for family, bits, architecture in kernels_of:
        source = toolchain.ptx(family, bits, VIRTUAL[architecture])
        cubin, _ = toolchain.assemble(source, architecture)
        text = toolchain.command(tool, "-c", cubin).stdout
        for part in re.split(r"\n//-+ \.text\.", text)[1:]:
            geometry = geometry_of(part.split()[0])
            if geometry is not None:
                instructions, hmma = find_main_loop(part)
                loops.append(MainLoop(geometry, architecture, instructions, hmma))
    return loops


def find_main_loop(listing: str) -> tuple[int, int]:
    """Instructions and HMMAs (HGMMAs with wgmma) between a backward branch and its target.

    Of all such loops the one with the most HMMAs, and the shortest of these: code that the compiler
    moved behind the loop may jump back into its middle.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    best = (0, 0)
    for end, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?(\.L_\w+)", instruction)
        if branch is None or labels[branch[1]] > end:
            continue
        body = instructions[labels[branch[1]] : end + 1]
        hmma = sum("HMMA" in one or "HGMMA" in one for one in body)
        best = max(best, (hmma, -len(body)))
    if best[0] == 0:
        raise ValueError("no loop with tensor-core instructions")
    return -best[1], best[0]

"""The evidence for the CUDA kernels that needs no GPU: python -m tests.ptxsim.report [--quick].

Counters, roofline, machine code, schedules and seeded faults; README.md says what each section
shows. The exit status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The tests' folder, where they and these modules import each other from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ptxsim import faults, model, roofline, static_evidence, toolchain
from ptxsim.checks import Checks
from ptxsim.geometry import MMA_FLOPS, OPS, Geometry, Problem, least
from ptxsim.workload import Workload

WIDTHS = toolchain.WIDTHS
ROWS = (1, 16, 128, 2048)
LAYERS = ((4096, 4096), (11008, 4096))  # N x K
SLACK = 1.001  # of DRAM sectors over the compulsory ones
# The first fill their blocks exactly, the others none.
FULL, RAGGED = (256, 512, (1, 16, 64, 128)), (160, 288, (5, 40, 77))
SCHEDULES = (
    {"seed": 1, "quantum": 1, "resident": 1},
    {"seed": 2, "quantum": 23, "resident": 2},
    {"seed": 3, "quantum": 400, "resident": 4},
)
COUNTERS_LEGEND = """\
mma: products of 16x8x16, wgmma counted in these. Wavefronts of shared memory: loads and stores
+ ldmatrix + cp.async, over the ideal. Sectors: distinct ones, read and written, over the compulsory
ones. W: times that the launch reads W, over its rows of blocks or shares of the tokens.
"""
ONLY_A_GPU = (
    "Only a GPU can confirm: the share of each peak that is reached, hits in the caches, the cost\n"
    "of launches, how copies, issue and tensor cores overlap. Times are lower bounds, not results."
)


def heading(text: str) -> None:
    print(f"\n==== {text} ====\n")


# ---- counters ----


def count(work: Workload, checks: Checks, quick: bool) -> None:
    heading("counters")
    print(COUNTERS_LEGEND)
    print(f"{'kernel':34}{'M':>5} {'N x K':10}{'grid':>9}{'mma':>7}{'wavefronts':>14}", end="")
    print(f"{'read':>14}{'written':>14}{'W':>8}")
    for dtype in ("fp16", "bf16"):
        for bits in WIDTHS if dtype == "fp16" or not quick else (4,):
            for op in OPS:
                for n, k, rows in (FULL, RAGGED):
                    for m in rows:
                        p = Problem(bits, m, n, k)
                        kind = count_one(work, checks, op, p, dtype, 80)
                        if kind != choice(work, op, p, dtype):
                            count_one(work, checks, op, p, dtype, 90)


def choice(work: Workload, op: str, p: Problem, dtype: str) -> str:
    """The kernel on an H100."""
    return work.run(op, p, dtype, 90)[0][0].kernel


def count_one(
    work: Workload, checks: Checks, op: str, p: Problem, dtype: str, capability: int
) -> str:
    """Prints a line; returns the kernel."""
    (launch, *after), _ = work.run(op, p, dtype, capability)
    g, c = launch.geometry, launch.counters
    name = f"{op} {p.bits}-bit {dtype}, M = {p.m}, {p.n}x{p.k}, sm_{capability}"
    if not checks.that(f"{name}: on tensor cores", g is not None, got=launch.kernel) or g is None:
        return launch.kernel
    splits = launch.grid[2]
    need = least(g, p, splits)
    checks.equal(
        f"{name}: threads and shared memory",
        (launch.threads, launch.shared),
        (g.threads, g.shared_bytes),
    )
    checks.equal(f"{name}: blocks of the result", launch.grid[:2], g.tiles(p))
    for kind in ("shared", "ldmatrix", "cp_async"):
        key = f"{kind}_wavefronts"
        checks.equal(f"{name}: {key}", c[key], c[f"{key}_ideal"])
    checks.equal(f"{name}: mma", c["mma_flops"] / MMA_FLOPS, need.flops / MMA_FLOPS)
    read, written = c["dram_read_sectors"], c["dram_write_sectors"]
    checks.within(f"{name}: sectors read", read, need.read_sectors, SLACK * need.read_sectors)
    checks.within(
        f"{name}: sectors written", written, need.write_sectors, SLACK * need.write_sectors
    )
    # With activations, scales and zeros as often as expected, what is left was read of W.
    checks.equal(f"{name}: sectors of cp.async", c["cp_async_sectors"], need.cp_async_sectors)
    checks.equal(f"{name}: sectors of loads", c["global_load_sectors"], need.load_sectors)
    for one in (launch, *after):
        checks.equal(f"{name}: atomics", one.counters["atomics"], 0)
    for one in after:
        checks.equal(f"{name}: partial results read", one.counters["dram_read_sectors"], written)
    passes = splits if op == "grad_scales" else launch.grid[0]
    rest = need.cp_async_sectors + need.load_sectors - passes * p.weight_sectors
    times = (c["cp_async_sectors"] + c["global_load_sectors"] - rest) / p.weight_sectors
    waves = sum(c[f"{kind}_wavefronts"] for kind in ("shared", "ldmatrix", "cp_async"))
    ideal = sum(c[f"{kind}_wavefronts_ideal"] for kind in ("shared", "ldmatrix", "cp_async"))
    print(f"{g.label:34}{p.m:>5} {f'{p.n}x{p.k}':10}", end="")
    mma = c["mma_flops"] // MMA_FLOPS
    print(f"{'x'.join(map(str, launch.grid)):>9}{mma:>7}{f'{waves}/{ideal}':>14}", end="")
    print(f"{f'{read}/{need.read_sectors}':>14}{f'{written}/{need.write_sectors}':>14}", end="")
    print(f"{f'{times:g}/{passes}':>8}")
    return launch.kernel


# ---- roofline ----


def predict(work: Workload, checks: Checks, quick: bool) -> dict[Geometry, float]:
    """Prints the tables; returns the instructions of a warp in a step of each kernel."""
    heading("roofline of bf16 products, groups of 128")
    models = {80: model.Model(work, "bf16", 80, checks)}
    models[90] = model.Model(work, "bf16", 90, checks, older=models[80])
    print("Counters of large products from a linear model of small ones, which a third one checks.")
    for predictor in models.values():
        for op in OPS if predictor is models[80] else OPS[:2]:
            predictor.confirm(op, Problem(4, 256, 768, 1024))
            if not quick:
                predictor.confirm(op, Problem(4, 128, *LAYERS[0]))
    for op in OPS if not quick else ():
        for bits in WIDTHS:
            for m in (1, 16):
                models[80].confirm(op, Problem(bits, m, *LAYERS[0]))
    print("dram, tensor, issue: microseconds that each needs by itself; the largest is the time.")
    print("In brackets: if partial results go to DRAM and back instead of staying in the L2 cache.")
    print("Issue slots count PTX instructions; section 'SASS' shows what ptxas makes of the loops.")
    print(
        "ratio: time of the dense bf16 product (of dW for grad_scales) over the time; by way of a"
    )
    print("panel: W to bf16 in memory, then the dense product. busy: blocks in whole waves.")
    print(ONLY_A_GPU)
    ratios: dict[tuple[str, str, int], list[str]] = {}
    for gpu in roofline.GPUS:
        predictor = models[90 if gpu.capability == 90 else 80]
        print(
            f"\n{gpu.name} ({gpu.source}): {gpu.bandwidth / 1e12:.3f} TB/s, mma.sync"
            f" {gpu.mma_peak / 1e12:.0f} and dense {gpu.dense_peak / 1e12:.0f} TFLOP/s,"
            f" {roofline.SCHEDULERS} x {gpu.multiprocessors} x {gpu.ghz} GHz slots"
        )
        print(
            f"{'op':12}{'bits':>4} {'N x K':11}{'M':>5}{'blocks':>7}{'MB':>7}{'partial':>8}", end=""
        )
        print(f"{'k mma':>8}{'k instr':>9}{'dram':>16}{'tensor':>8}{'issue':>8}  ", end="")
        print(f"{'binds':7}{'time':>8}{'dense':>8}{'ratio':>14}{'panel':>7}{'busy':>6}")
        for op in OPS:
            for bits in WIDTHS:
                for layer in LAYERS:
                    for m in ROWS:
                        p = Problem(bits, m, *layer)
                        ratio = predict_one(predictor, op, p, gpu)
                        if gpu.name.startswith("H100"):
                            key = (op, f"{layer[0]}x{layer[1]}", bits)
                            ratios.setdefault(key, []).append(ratio)
    print(
        "\nExpected ratio to dense bf16 on an H100 by the arithmetic above (to be confirmed on one)"
    )
    print(f"{'op':12}{'N x K':11}{'bits':>4}", *(f"{f'M = {m}':>14}" for m in ROWS))
    for (op, layer_name, bits), cells in ratios.items():
        print(f"{op:12}{layer_name:11}{bits:>4}", *(f"{cell:>14}" for cell in cells))
    return {g: n for one in models.values() for g, n in one.step_instructions.items()}


def predict_one(predictor: model.Model, op: str, p: Problem, gpu: roofline.Gpu) -> str:
    """Prints a line of the table; returns the ratio to the dense product."""
    found = predictor.predict(op, p, gpu.multiprocessors)
    kept, spilled = (roofline.bounds(found, gpu, spilled=flag) for flag in (False, True))
    dense, panel = roofline.dense_seconds(p, gpu), roofline.panel_seconds(p, gpu)
    ratio = f"{dense / kept.seconds:.2f}"
    if f"{dense / spilled.seconds:.2f}" != ratio:
        ratio += f" ({dense / spilled.seconds:.2f})"
    dram = f"{kept.dram * 1e6:.2f}"
    if found.partial_bytes:
        dram += f" ({spilled.dram * 1e6:.2f})"
    print(f"{op:12}{p.bits:>4} {f'{p.n}x{p.k}':11}{p.m:>5}{found.blocks:>7}", end="")
    print(f"{found.dram_bytes / 1e6:>7.1f}{found.partial_bytes / 1e6:>8.1f}", end="")
    print(
        f"{found.flops / MMA_FLOPS / 1e3:>8.0f}{found.instructions / 1e3:>9.0f}{dram:>16}", end=""
    )
    print(f"{kept.tensor * 1e6:>8.2f}{kept.issue * 1e6:>8.2f}  {kept.binding:7}", end="")
    print(f"{kept.seconds * 1e6:>8.2f}{dense * 1e6:>8.2f}{ratio:>14}", end="")
    print(f"{dense / panel:>7.2f}{roofline.balance(found, gpu):>6.2f}")
    return ratio


# ---- machine code ----


def look_at_machine_code(
    checks: Checks, quick: bool, step_instructions: dict[Geometry, float]
) -> None:
    heading("machine code")
    widths = (4,) if quick else WIDTHS
    compiled = static_evidence.compile_all(
        (*toolchain.FAMILIES, *toolchain.WGMMA_FAMILIES),
        widths,
        static_evidence.ARCHITECTURES if not quick else ("80", "90", "90a"),
        checks,
    )
    print("No spills, no stack, no warnings; registers of a thread and blocks of a multiprocessor.")
    static_evidence.check_occupancy(compiled, checks)
    heading("SASS: instructions of the main loop (reported, not checked)")
    if toolchain.disassembler() is None:
        print(toolchain.NO_DISASSEMBLER)
        return
    loops = static_evidence.main_loops(
        (family, bits, architecture)
        for families, architectures in (
            (toolchain.FAMILIES, ("80", "90")),
            (toolchain.WGMMA_FAMILIES, ("90a",)),
        )
        for family in families
        for bits in widths
        for architecture in architectures
    )
    print(
        "Of a warp and step, code that only some steps run included. The prototype, 4-bit: 4.1 for"
    )
    print(
        "each HMMA forward, 4.3 dX, 2.7 dS; 212 in all with few rows. PTX: what a warp was counted"
    )
    print(
        "to run in a step, which the roofline goes by. An HGMMA counts as the HMMAs it replaces.\n"
    )
    print(f"{'kernel':34}{'sm':>4}{'SASS':>6}{'PTX':>8}{'HMMA':>6}{'SASS per HMMA':>15}")
    for loop in sorted(loops, key=lambda one: (one.geometry.label, one.architecture)):
        ratio = loop.instructions / loop.geometry.step_products
        ptx = step_instructions.get(loop.geometry)
        print(f"{loop.geometry.label:34}{loop.architecture:>4}{loop.instructions:>6}", end="")
        print(f"{f'{ptx:.0f}' if ptx else '-':>8}{loop.hmma:>6}{ratio:>15.2f}")


# ---- schedules and faults ----


def vary_schedules(work: Workload, checks: Checks, quick: bool) -> None:
    heading("schedules")
    print("Round robin, then:", *SCHEDULES, sep="\n  ")
    runs = 0
    for dtype in ("fp16", "bf16"):
        for bits in WIDTHS if not quick else ((4,) if dtype == "fp16" else (3,)):
            for op in OPS:
                for m, capability in ((3, 80), (40, 80), (150, 80), (150, 90)):
                    # Deep enough for splits and several rounds of the pipelines.
                    p = Problem(bits, m, 160, 1056, group_size=96)
                    p = Problem(bits, m, p.k, p.n, 96) if op == "nn" else p
                    _, expected = work.run(op, p, dtype, capability)
                    for options in SCHEDULES:
                        runs += 1
                        with work.simulator.options(**options):
                            _, got = work.run(op, p, dtype, capability)
                        label = f"{op} {bits}-bit {dtype} {m} rows sm_{capability} {options}"
                        checks.that(
                            f"{label}: same bits",
                            torch.equal(got, expected),
                            wanted="those of round robin",
                            got=f"{int((got != expected).sum())} other elements",
                        )
    print(f"{runs} runs without a race, a read of poison or of foreign memory; results are equal.")


def seed_faults(work: Workload, checks: Checks) -> None:
    heading("seeded faults")
    harness = faults.Harness(work.simulator)
    for kernel in faults.kernels():
        error = harness.error(kernel, kernel.ptx)
        checks.within(f"{kernel.geometry.label} as it is: relative error", error, 0, faults.LIMIT)
        print(f"{kernel.geometry.label}, as it is: relative error {error:.1e}")
        for fault in faults.faults_of(kernel.geometry):
            label = f"{kernel.geometry.label}, {fault}"
            try:
                caught = harness.caught(kernel, fault)
            except faults.DoesNotApply as missing:
                checks.that(label, False, wanted="a place for the fault", got=f"none: {missing}")
                continue
            checks.that(label, caught is not None, wanted="caught", got="a result like any other")
            print(f"    {fault}: {(caught or 'NOT CAUGHT').split(';')[0]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptxsim.report")
    parser.add_argument(
        "--quick", action="store_true", help="fewer widths, types, architectures; no large runs"
    )
    quick = parser.parse_args().quick
    checks = Checks()
    missing = toolchain.why_not_compiled()
    if missing:
        raise SystemExit(missing)
    work = Workload()
    with work.in_use():
        count(work, checks, quick)
        step_instructions = predict(work, checks, quick)
        vary_schedules(work, checks, quick)
    look_at_machine_code(checks, quick, step_instructions)
    seed_faults(work, checks)
    print(f"\n{checks.summary()}")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())

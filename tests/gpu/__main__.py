"""All that a GPU can tell about this library, in one report: python -m tests.gpu [REPORT.md].

The tests, on the GPU where they can be, and under compute-sanitizer where it is installed; the
bench, with the path that the dispatcher took and how long the other one takes; the peers. An hour
or so. The exit status is 1 if a part failed, which keeps no other from running, or if there is no
GPU.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import lowbitcore as lbc

from .parts import REPOSITORY, every_part
from .report import Part, block, render


def said_by(*command: str) -> str | None:
    """The first line, if there is such a program and it succeeds."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def facts() -> dict[str, str]:
    device = torch.cuda.get_device_properties(0)
    driver = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = said_by("git", "describe", "--always", "--dirty", "--abbrev=12")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "compute capability": f"{device.major}.{device.minor}",
        "memory": f"{device.total_memory / 1e9:.1f} GB, {device.multi_processor_count} SMs",
        "driver": driver or "unknown",
        "CUDA": f"{torch.version.cuda} of torch; lowbitcore: {lbc.runtime.cuda_status()}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "lowbitcore": f"{lbc.__version__}, commit {commit or 'unknown'}",
    }


def run_all(
    parts: dict[str, Callable[[], Part]], write: Callable[[dict[str, Part], list[str]], None]
) -> bool:
    """Runs each part, whatever becomes of the others, and writes after each what is known by then;
    whether all went well."""
    done: dict[str, Part] = {}
    for name, part in parts.items():
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        try:
            found = part()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            found = Part(False, message, block(traceback.format_exc()))
        minutes = (time.monotonic() - start) / 60
        found.outcome += f" ({minutes:.1f} min)"
        done[name] = found
        print(f"    {'ok' if found.ok else 'FAILED'}: {found.outcome}", flush=True)
        write(done, [other for other in parts if other not in done])
    return all(part.ok for part in done.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("report", nargs="?", type=Path, help="default: bench/results/DEVICE.md")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with the peers")
    arguments = parser.parse_args()
    why_not = lbc.runtime.why_no_cuda()
    if why_not is not None:
        print(f"tests.gpu: expected a GPU that can be computed on: {why_not}", file=sys.stderr)
        return 1
    device = torch.cuda.get_device_name(0)
    default = REPOSITORY / "bench" / "results" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device)}.md"
    report: Path = arguments.report or default
    report.parent.mkdir(parents=True, exist_ok=True)
    known, parts = facts(), every_part(arguments.python)

    def write(done: dict[str, Part], to_come: list[str]) -> None:
        report.write_text(render(device, known, done, to_come))

    write({}, list(parts))  # a place that cannot be written to fails now
    well = run_all(parts, write)
    print(report)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

"""What is run on a GPU, each part in a process of its own: if it crashes, no other does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .report import Part, block, from_bench, from_junit

REPOSITORY = Path(__file__).resolve().parents[2]
HOURS = 3600  # in seconds
LAST = 40  # lines of what failed

# Under a sanitizer a kernel takes up to a hundred times as long: each kernel, but few problems.
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZED = (
    "(test_tensor_cores or test_products) and 96 and bfloat16 or on_the_cpu and True-True-3"
    " or test_prepack_and_back or test_results_repeat or test_layer_trains"
)
# Layers of LLaMA-7B, all widths and numbers of rows, and a decode step.
TIMED = "g128 and bf16 and (K4096 or K11008) or decode"


def every_part(peers_python: str) -> dict[str, Callable[[], Part]]:
    return {
        "Tests on the GPU": partial(tests, "device and not full"),
        "The other tests": partial(tests, "not device and not full"),
        **{f"compute-sanitizer {tool}": partial(sanitize, tool) for tool in TOOLS},
        "Bench": bench,
        "Peers": partial(peers, peers_python),
    }


def run(command: Sequence[str | Path], hours: float, **environment: str) -> tuple[int, str]:
    """Exit status, and what it printed. One that hangs is ended, and counts as failed."""
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=hours * HOURS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children would keep the GPU
            output, _ = process.communicate()
            return 124, f"{output}\nended after {hours} hours"
    return process.returncode, output


def end_of(output: str) -> str:
    return block("\n".join(output.splitlines()[-LAST:]))


def pytest(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pytest", "-q", "--device", "cuda", *arguments]


def tests(which: str) -> Part:
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        status, output = run(pytest("-m", which, f"--junitxml={junit}"), 2)
        if not junit.exists():
            return Part(False, f"pytest ended with {status}", end_of(output))
        found = from_junit(junit)
    if status != 0:
        found.ok = False
        found.body += "\n" + end_of(output)
    return found


def sanitize(tool: str) -> Part:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Part(True, "not run: compute-sanitizer is not on PATH")
    command = [program, "--tool", tool, "--error-exitcode", "99", "--report-api-errors", "no"]
    which = pytest("tests/test_cuda.py", "tests/test_cuda_wgmma.py", "-k", SANITIZED)
    # Memory that torch keeps for later looks like memory that is in use.
    status, output = run([*command, *which], 2, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = [line for line in output.splitlines() if line.startswith("=========")]
    summaries = [line.strip("= ") for line in said if "SUMMARY" in line]
    counts = re.findall(r"^\d+ passed.*$", output, re.MULTILINE)
    outcome = "; ".join([*summaries, *counts]) or f"ended with {status}"
    if status == 0 and summaries and counts:
        return Part(True, outcome)
    return Part(False, outcome, block("\n".join(said[:LAST])) + "\n" + end_of(output))


def bench() -> Part:
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "bench.json"
        which = ("bench/", "-m", "full or not full", "-k", TIMED)
        command = [sys.executable, "-m", "pytest", "-q", *which, f"--benchmark-json={result}"]
        status, output = run(command, 2)
        if not result.exists() or not result.stat().st_size:
            return Part(False, f"pytest ended with {status}", end_of(output))
        cases = json.loads(result.read_text())["benchmarks"]
    # A case that fails may leave some of its keys; what was timed has a time.
    found = from_bench([item["extra_info"] for item in cases if "ms" in item["extra_info"]])
    if status != 0:
        found = Part(False, f"{found.outcome}; some failed", found.body + end_of(output))
    return found


def peers(python: str) -> Part:
    status, output = run([sys.executable, "bench/peers.py", "--python", python], 1)
    return Part(
        status == 0,
        "4096 x 4096, 4 bits, bf16" if status == 0 else f"peers.py ended with {status}",
        block(output) if status == 0 else end_of(output),
    )

"""`python -m tests.gpu`: what it reports, and that nothing that fails on the way is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu import __main__ as command
from gpu import parts, report
from gpu.report import Part
from lowbitcore import __version__, runtime


def a_case(**settings: Any) -> dict[str, Any]:
    """As bench_qgemm.py describes one."""
    case = {
        "op": "qgemm_nt",
        "path": "fused",
        "bits": 4,
        "M": 16,
        "N": 4096,
        "K": 11008,
        "ms": 0.25,
        "ratio_dense": 2.5,
        "ratio_dequant": 3.125,
        "fraction_of_bandwidth": 0.61,
        "fraction_of_peak": 0.04,
    }
    return case | settings


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- the text ----


def test_tests_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one | two\\nmore'\n"
        "def test_not_here(): pytest.skip('there is one GPU')\n"
        "def test_not_here_either(): pytest.skip('there is one GPU')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('no memory')\n"
        "def test_without(broken): pass\n"
    )
    junit = tmp_path / "junit.xml"
    pytest_call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    subprocess.run(
        [*pytest_call, f"--junitxml={junit}", "--rootdir", tmp_path, tmp_path / "test_it.py"],
        capture_output=True,
    )
    found = report.from_junit(junit)
    assert not found.ok
    assert found.outcome == "1 passed, 2 failed, 2 skipped"
    bad, broken, skipped = (
        row for row in rows_of(found.body) if row[0] not in ("failed", "skipped", "---")
    )
    assert bad[0] == "`test_it::test_bad`" and "one \\" in bad[1]
    assert broken[0] == "`test_it::test_without`" and "no memory" in "".join(broken)
    assert skipped == ["2", "there is one GPU"]


def test_no_test_passed(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text("<testsuites><testsuite></testsuite></testsuites>")
    assert not report.from_junit(junit).ok


def test_products_are_listed() -> None:
    found = report.from_bench(
        [
            a_case(M=2048, path="dequantize", ratio_fused=0.8, ratio_dequant=1.01),
            a_case(),
            a_case(bits=2, M=4096, path="dequantize", ratio_fused=1.5),
            a_case(op="qgemm_nn_permuted_unequal", ratio_dequant=0.5),
            a_case(op="qgemm_nt_permuted", ratio_dense=None, ratio_dequant=None, ratio_plain=0.96),
            a_case(op="qgemm_grad_scales", ratio_dequant=None, fraction_of_peak=None),
            a_case(op="decode_step", M=1, ratio_eager=3.25),
        ]
    )
    assert found.ok
    assert found.outcome == "7 cases; the slower path was taken in 2"
    shape = "4096 x 11008"
    rows = rows_of(found.body)
    numbers = ["0.2500", "2.50", "3.12", "-", "0.61", "0.04"]
    assert [shape, "4", "16", *numbers, "fused", "3.12"] in rows
    numbers = ["0.2500", "2.50", "1.01", "-", "0.61", "0.04"]
    assert [shape, "4", "2048", *numbers, "dequantize", "0.80"] in rows
    assert [shape, "4", "16", "0.2500", "2.50", "-", "-", "0.61", "-", "fused", "-"] in rows
    assert [shape, "4", "16", "0.2500", "-", "-", "0.96", "0.61", "0.04", "fused", "-"] in rows
    slower = rows[rows.index(["", "N x K", "bits", "M", "taken", "other path, x"]) + 2 :][:2]
    assert slower == [
        ["Forward", shape, "4", "2048", "dequantize", "0.80"],
        ["Transposed backward, with a g_idx", shape, "4", "16", "fused", "0.50"],
    ]
    assert ["4", "0.250", "3.25", "2.50", "0.61"] in rows
    order = [row[1:3] for row in rows if row[0] == shape]
    assert order[:3] == [["2", "4096"], ["4", "16"], ["4", "2048"]]


def test_nothing_was_timed() -> None:
    assert not report.from_bench([]).ok


def test_the_whole_report() -> None:
    done = {"Tests": Part(False, "3 passed, 1 failed", "why\n"), "Bench": Part(True, "9 cases")}
    text = report.render("Some GPU", {"driver": "580.1"}, done, ["Peers"])
    assert text.startswith("# Some GPU\n")
    assert rows_of(text)[2:] == [
        ["driver", "580.1"],
        ["part", "", "outcome"],
        ["---", "---", "---"],
        ["Tests", "**failed**", "3 passed, 1 failed"],
        ["Bench", "ok", "9 cases"],
        ["Peers", "**did not run**", ""],
    ]
    assert text.endswith("\n## Tests\n\nwhy\n")


# ---- the parts ----


@pytest.fixture
def instead_of_pytest(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What the parts run in its place: a shell script."""

    def install(script: str) -> None:
        monkeypatch.setattr(parts, "pytest", lambda *arguments: ["sh", "-c", script])

    return install


def test_a_crash_is_an_outcome(instead_of_pytest: Callable[[str], None]) -> None:
    instead_of_pytest("echo as far as this; kill -9 $$")
    found = parts.tests("device")
    assert not found.ok
    assert found.outcome == "pytest ended with -9" and "as far as this" in found.body


def test_what_hangs_is_ended() -> None:
    status, output = parts.run(["sh", "-c", "echo so far; exec sleep 60"], hours=1 / 3600)
    assert status == 124
    assert output.splitlines()[0] == "so far"


@pytest.mark.parametrize(
    ("status", "passed", "errors", "ok"),
    [(0, "22 passed in 3s", 0, True), (99, "22 passed in 3s", 2, False), (1, "1 failed", 0, False)],
)
def test_sanitizers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    passed: str,
    errors: int,
    ok: bool,
) -> None:
    program = tmp_path / "compute-sanitizer"
    said = f"========= Invalid read\n{passed}\n========= ERROR SUMMARY: {errors} errors"
    program.write_text(
        f"#!/bin/sh\necho '{said}'; echo $2 $PYTORCH_NO_CUDA_MEMORY_CACHING\nexit {status}"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = parts.sanitize("racecheck")
    assert found.ok == ok
    assert f"ERROR SUMMARY: {errors} errors" in found.outcome
    assert ok or ("Invalid read" in found.body and "racecheck 1" in found.body)


def test_no_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = parts.sanitize("memcheck")
    assert found.outcome == "not run: compute-sanitizer is not on PATH"


def test_sanitized_tests_exist() -> None:
    """Each of the names that are chosen stands for some."""
    select = parts.pytest("tests/test_cuda.py", "tests/test_cuda_wgmma.py", "-k", parts.SANITIZED)
    _, output = parts.run([*select, "--collect-only"], hours=0.1)
    chosen = {line.partition("::")[2].partition("[")[0] for line in output.splitlines()}
    for name in ("tensor_cores", "products", "rtn_as_on_the_cpu", "gptq_as_on_the_cpu"):
        assert f"test_{name}" in chosen, output
    for name in ("prepack_and_back", "results_repeat", "layer_trains"):
        assert f"test_{name}" in chosen, output
    assert len(output.splitlines()) < 40


@pytest.mark.parametrize("status", [0, 1])
def test_peers(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    asked = []

    def run(call: list[str], hours: float) -> tuple[int, str]:
        asked.append(call)
        return status, "ms (x dense)"

    monkeypatch.setattr(parts, "run", run)
    found = parts.peers("/other/python")
    assert asked == [[sys.executable, "bench/peers.py", "--python", "/other/python"]]
    assert found.ok == (status == 0) and "ms (x dense)" in found.body


@pytest.mark.full
def test_bench_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report knows what the bench says."""
    monkeypatch.setattr(parts, "TIMED", "M1- and N192 and bits4 and bf16")
    found = parts.bench()
    assert found.ok, found.body
    assert found.outcome.startswith("3 cases; ")
    rows = [row for row in rows_of(found.body) if row[0] == "192 x 576"]
    assert [row[9] for row in rows] == ["fused"] * 3


# ---- the command ----


def test_a_part_that_fails_keeps_no_other_from_running() -> None:
    def broken() -> Part:
        raise OSError("disk full")

    seen: list[tuple[list[str], list[str]]] = []
    kept: dict[str, Part] = {}

    def write(done: dict[str, Part], to_come: list[str]) -> None:
        seen.append((list(done), to_come))
        kept.update(done)

    todo = {"a": broken, "b": lambda: Part(True, "fine"), "c": lambda: Part(False, "wrong")}
    assert not command.run_all(todo, write)
    assert seen == [(["a"], ["b", "c"]), (["a", "b"], ["c"]), (["a", "b", "c"], [])]
    assert [part.ok for part in kept.values()] == [False, True, False]
    assert kept["a"].outcome.startswith("OSError: disk full (") and "broken" in kept["a"].body
    assert kept["b"].outcome == "fine (0.0 min)"
    assert command.run_all({"b": lambda: Part(True, "fine")}, write)


@pytest.mark.parametrize("well", [True, False])
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, well: bool) -> None:
    monkeypatch.setattr(runtime, "why_no_cuda", lambda: None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Some GPU")
    properties = SimpleNamespace(major=9, minor=0, total_memory=85e9, multi_processor_count=132)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    asked = []

    def every_part(python: str) -> dict[str, Callable[[], Part]]:
        asked.append(python)
        return {"Tests": lambda: Part(well, "so it went")}

    monkeypatch.setattr(command, "every_part", every_part)
    out = tmp_path / "new" / "report.md"
    monkeypatch.setattr(sys, "argv", ["gpu", str(out), "--python", "other"])
    assert command.main() == (0 if well else 1)
    assert asked == ["other"]
    text = out.read_text()
    assert text.startswith("# Some GPU\n") and "so it went" in text
    assert ["compute capability", "9.0"] in rows_of(text)
    assert dict(row for row in rows_of(text) if len(row) == 2)["lowbitcore"].startswith(__version__)


def test_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", out],
        cwd=parts.REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("tests.gpu: expected a GPU that can be computed on: ")
    assert "CUDA" in done.stderr and not out.exists()

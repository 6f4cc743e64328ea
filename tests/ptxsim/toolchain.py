"""nvcc, ptxas and the disassembler: what the kernels become."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "cuda"
INCLUDES = (KERNELS, REPOSITORY / "cpp" / "include")
FAMILIES = ("qgemm_nt", "qgemm_nn", "qgemm_grad_scales")
WGMMA_FAMILIES = ("qgemm_nt_wgmma", "qgemm_nn_wgmma")  # of sm_90a only
WIDTHS = (2, 3, 4, 8)


def command(*words: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(w) for w in words], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
    return done


def nvcc(*words: str | Path) -> None:
    flags = [f"-I{path}" for path in INCLUDES]
    command("nvcc", "-std=c++17", "--Werror", "all-warnings", *flags, *words)


@lru_cache(maxsize=1)
def _sources_key() -> str:
    digest = hashlib.sha256(command("nvcc", "--version").stdout.encode())
    sources = [*KERNELS.iterdir(), *INCLUDES[1].rglob("*.h"), *Path(__file__).parent.glob("*.cpp")]
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def kept(name: str) -> Path:
    """A place for what is compiled from the kernels as they are now, in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = Path(os.environ.get("PTXSIM_CACHE", home / "lowbitcore-ptxsim"))
    checkout = hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:16]
    folder = cache / f"evidence-{checkout}" / _sources_key()
    if not folder.exists():
        # Other versions of the sources are of no use, but to a process that began with them.
        for other in folder.parent.glob("*"):
            if time.time() - other.stat().st_mtime > 3600:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def ptx(family: str, bits: int, architecture: str = "80") -> Path:
    """PTX of a family of kernels for one width; a build has all widths in one object."""
    result = kept(f"{family}_{bits}.{architecture}.ptx")
    if result.exists():
        return result
    launch = f"launch_{family}<{bits}>"
    with tempfile.TemporaryDirectory(dir=result.parent) as scratch:
        source = Path(scratch) / f"{family}_{bits}.cu"
        source.write_text(
            f'#include "{family}.cuh"\n'
            f"template decltype(lowbitcore::cuda::{launch}) lowbitcore::cuda::{launch};\n"
        )
        made = source.with_suffix(".ptx")
        nvcc("-ptx", f"-arch=compute_{architecture}", "-o", made, source)
        os.replace(made, result)
    return result


def assemble(source: Path, architecture: str) -> tuple[Path, str]:
    """The machine code of one architecture, and what ptxas says of it."""
    result = kept(f"{source.stem}.sm_{architecture}.cubin")
    said = result.with_suffix(".log")
    if not said.exists():
        with tempfile.TemporaryDirectory(dir=result.parent) as scratch:
            made, report = Path(scratch) / result.name, Path(scratch) / said.name
            done = command("ptxas", "-v", f"-arch=sm_{architecture}", source, "-o", made)
            report.write_text(done.stdout + done.stderr)
            os.replace(made, result)
            os.replace(report, said)
    return result, said.read_text()


def ask(source: str, lines: Iterable[Iterable[int]]) -> list[int]:
    """Answers of a small host program of this folder, one number a line."""
    program = kept(Path(source).stem)
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
            made = Path(scratch) / program.name
            nvcc("-o", made, Path(__file__).parent / source)
            os.replace(made, program)
    text = "\n".join(" ".join(map(str, line)) for line in lines)
    return [int(line) for line in command(program, text=text).stdout.split()]


def disassembler() -> Path | None:
    found = shutil.which("nvdisasm")
    return Path(found) if found else None


def why_not_compiled() -> str | None:
    """What is missing to compile the kernels, if anything."""
    for tool in ("nvcc", "ptxas"):
        if shutil.which(tool) is None:
            return f"no {tool} (pip install '.[test]'): nothing is known of the machine code"
    return None


NO_DISASSEMBLER = "no nvdisasm (pip install '.[test]'): SASS is not looked at"

"""The CUDA toolkit: the machine's own or, where it has none, that of PyPI's packages."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path


def _packages() -> Path | None:
    """Where nvidia-cuda-nvcc and its companions lie in this environment."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations or () if found else ():
        for nvcc in sorted(Path(folder).glob("*/bin/nvcc")):
            return nvcc.parents[1]
    return None


def offer_packages() -> None:
    """Puts the packages' programs behind all others on PATH, for this process and its children."""
    packages = _packages()
    if packages is not None:
        path = os.environ.get("PATH", os.defpath).split(os.pathsep)
        if str(packages / "bin") not in path:
            os.environ["PATH"] = os.pathsep.join([*path, str(packages / "bin")])


def cmake(source: Path, directory: Path, *options: str) -> None:
    """Configures and builds, or brings up to date, for one process at a time: several may test."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(source), "-B", str(directory), *options, *generator]
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [*configure, *_cmake_options()],
            ["cmake", "--build", str(directory), "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _cmake_options() -> list[str]:
    """What CMake cannot find out of the packages by itself: they have no libcudart.so."""
    packages, nvcc = _packages(), shutil.which("nvcc")
    if packages is None or nvcc is None or packages not in Path(nvcc).parents:
        return []
    return [f"-DCUDA_CUDART={path}" for path in sorted((packages / "lib").glob("libcudart.so.*"))]

"""A C++ project that finds the installed package, quantizes a matrix and multiplies by it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lowbitcore import runtime

CONSUMER = Path(__file__).parent / "consumer"


def test_find_package(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    configure = [cmake, "-S", CONSUMER, "-B", tmp_path, f"-Dlowbitcore_DIR={runtime.cmake_dir()}"]
    subprocess.run(configure, check=True)
    subprocess.run([cmake, "--build", tmp_path], check=True)
    done = subprocess.run([tmp_path / "consumer"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on {runtime.available_isas()[-1]}: error 0." in done.stdout

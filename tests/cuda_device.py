"""Where the tests of the CUDA backend run: in the interpreter of ptxsim, or on a GPU.

By default the extension is built once more with its kernels for the interpreter (CMake's
LOWBITCORE_EMULATE_CUDA), where device memory is host memory, and takes the place of
`lowbitcore._C` in `lowbitcore.ops` for the length of a test. With `pytest --device cuda` the same
tests use the installed extension and a GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import ptxsim
from lowbitcore import _C, nn, ops
from lowbitcore.ops import operators
from ptxsim import toolkit

REPOSITORY = Path(__file__).resolve().parents[1]
CALLERS = [
    part for part in vars(ops).values() if isinstance(part, ModuleType) and hasattr(part, "_C")
]


def why_not_emulated() -> str | None:
    """What is missing for the interpreter's build, if anything."""
    for tool in ("nvcc", "cmake", "c++"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: the CUDA kernels are not tested"
    if importlib.util.find_spec("nanobind") is None:
        return "nanobind is not installed (pip install '.[test]'): the CUDA kernels are not tested"
    return None


def build_emulated() -> Path:
    """The extension for the interpreter, brought up to date; kept in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    key = hashlib.sha256(f"{REPOSITORY}\0{sys.executable}".encode()).hexdigest()[:16]
    build = home / "lowbitcore-ptxsim" / f"extension-{key}"
    nanobind = importlib.util.find_spec("nanobind")
    assert nanobind is not None and nanobind.origin is not None
    toolkit.cmake(
        REPOSITORY,
        build,
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",  # the kernels run in the interpreter, which has its own
        "-DLOWBITCORE_PYTHON=ON",
        "-DLOWBITCORE_CUDA=ON",
        f"-DLOWBITCORE_EMULATE_CUDA={ptxsim.build().parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dnanobind_DIR={Path(nanobind.origin).parent / 'cmake'}",
    )
    return next(build.glob("_C*.so"))


class Emulated:
    """Stands for the extension: its tensors are the memory that kernels may touch."""

    def __init__(self, path: Path) -> None:
        loader = importlib.machinery.ExtensionFileLoader("emulated._C", str(path))
        spec = importlib.util.spec_from_file_location("emulated._C", path, loader=loader)
        assert spec is not None
        self._module: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self._module)
        self.simulator = ptxsim.Simulator(path)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, type) or not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            memory = {_extent(item) for item in arguments if isinstance(item, torch.Tensor)}
            with self.simulator.regions(*memory):
                return found(*arguments)

        return call


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes from the first element to the last."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


@contextlib.contextmanager
def _computing_with(core: Any) -> Iterator[None]:
    """All of `lowbitcore.ops` calls this extension in the meantime, and layers, which call the
    installed one's products at once for plain tensors of the CPU, find none of these."""
    before, is_plain = {caller: vars(caller)["_C"] for caller in CALLERS}, nn.is_plain
    for caller in CALLERS:
        vars(caller)["_C"] = core
    nn.is_plain = operators.is_plain if core is _C else lambda *tensors: False
    try:
        yield
    finally:
        nn.is_plain = is_plain
        for caller, extension in before.items():
            vars(caller)["_C"] = extension


class CudaDevice:
    """`device.put(tensor)` is the tensor where the backend works."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.emulated = Emulated(build_emulated()) if name == "emulated" else None
        self.core: Any = self.emulated or _C
        self.torch = torch.device("cpu" if self.emulated else name)

    def put(self, tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor.to(self.torch)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[CudaDevice]:
        """`lowbitcore.ops` computes here in the meantime."""
        with _computing_with(self.core):
            yield self

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """`lowbitcore.ops` is the installed extension's again, for tensors on the CPU."""
        with _computing_with(_C):
            yield

    @contextlib.contextmanager
    def schedule(self, seed: int) -> Iterator[None]:
        """Warps and blocks take turns as `seed` says; a GPU does as it likes."""
        if self.emulated is None:
            yield
            return
        options = {"seed": seed, "quantum": 1 + 37 * seed, "resident": 1 + seed % 3}
        with self.emulated.simulator.options(**options if seed else {}):
            yield

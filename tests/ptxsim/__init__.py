"""Runs PTX on the host: see README.md.

sim = Simulator(build())
sim.load(ptx)
sim.launch("kernel", grid=(4, 1, 1), block=(128, 1, 1), args=[array, 5, 1.5, None])
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import toolkit

__all__ = ["SimulationError", "Simulator", "build"]

toolkit.offer_packages()

Dimensions = Sequence[int]
Region = Any  # a numpy array, or (pointer, bytes)


class SimulationError(RuntimeError):
    """What the interpreter has to say: what happened, where, to whom."""


def build() -> Path:
    """Compiles libptxsim.so, once for the sources as they are, and returns its path.

    It is kept in PTXSIM_CACHE, or in lowbitcore-ptxsim of the user's cache; beside it the static
    libraries, libptxsim_cudart.a where the CUDA toolkit is found.
    """
    sources = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        if path.suffix in {".cpp", ".h"} or path.name == "CMakeLists.txt":
            digest.update(path.name.encode() + path.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = Path(os.environ.get("PTXSIM_CACHE", home / "lowbitcore-ptxsim"))
    directory = cache / digest.hexdigest()[:16]
    done = directory / "done"
    if not done.exists():
        toolkit.cmake(sources, directory)
        done.touch()
    return directory / "libptxsim.so"


class Simulator:
    """The simulator in one loaded shared object; a path loaded twice is the same simulator."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        library = ctypes.CDLL(str(path))
        text, size = ctypes.c_char_p, ctypes.c_uint64
        dimensions = ctypes.POINTER(ctypes.c_uint32)
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "load": (ctypes.c_int, [text]),
            "error": (text, []),
            "kernels": (text, []),
            "parameters": (text, [text]),
            "add_region": (None, [ctypes.c_void_p, size]),
            "remove_region": (None, [ctypes.c_void_p]),
            "clear_regions": (None, []),
            "allocated_bytes": (size, []),
            "set_option": (ctypes.c_int, [text, ctypes.c_int64]),
            "get_option": (ctypes.c_int64, [text]),
            "launch": (
                ctypes.c_int,
                [text, dimensions, dimensions, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_uint32],
            ),
            "log_json": (text, []),
            "clear_log": (None, []),
        }
        self._call: dict[str, Any] = {}
        for name, (result, arguments) in signatures.items():
            function = getattr(library, f"ptxsim_{name}")
            function.restype, function.argtypes = result, arguments
            self._call[name] = function

    def _fail(self) -> SimulationError:
        return SimulationError(self._call["error"]().decode())

    def load(self, ptx: str) -> None:
        if self._call["load"](ptx.encode()):
            raise self._fail()

    @property
    def kernels(self) -> list[str]:
        names: str = self._call["kernels"]().decode()
        return names.split()

    def launch(
        self,
        name: str,
        grid: Dimensions,
        block: Dimensions,
        args: Sequence[Any],
        dynamic_shared: int = 0,
    ) -> None:
        """Numpy arrays among `args` are memory that the kernel may touch, None a null pointer."""
        found = self._call["parameters"](name.encode())
        if found is None:
            raise self._fail()
        layout = [tuple(map(int, line.split())) for line in found.decode().splitlines()]
        if len(layout) != len(args):
            raise SimulationError(f"{name} has {len(layout)} parameters, got {len(args)}")
        parameters = bytearray(layout[-1][0] + layout[-1][1] if layout else 0)
        for (offset, size), argument in zip(layout, args, strict=True):
            parameters[offset : offset + size] = _pack(argument, size)
        with self.regions(*(a for a in args if isinstance(a, np.ndarray))):
            self.launch_packed(name, grid, block, bytes(parameters), dynamic_shared)

    def launch_packed(
        self, name: str, grid: Dimensions, block: Dimensions, parameters: bytes, dynamic_shared: int
    ) -> None:
        failed = self._call["launch"](
            name.encode(),
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*block),
            dynamic_shared,
            parameters,
            len(parameters),
        )
        if failed:
            raise self._fail()

    @contextlib.contextmanager
    def regions(self, *regions: Region) -> Iterator[None]:
        """Memory that kernels may touch in the meantime: arrays or (pointer, bytes)."""
        pairs = [(r.ctypes.data, r.nbytes) if isinstance(r, np.ndarray) else r for r in regions]
        for pointer, size in pairs:
            self._call["add_region"](pointer, size)
        try:
            yield
        finally:
            for pointer, _ in pairs:
                self._call["remove_region"](pointer)

    @contextlib.contextmanager
    def options(self, **values: int) -> Iterator[None]:
        """Options in the meantime; README.md lists them."""
        before = {name: self._call["get_option"](name.encode()) for name in values}
        try:
            for name, value in values.items():
                if self._call["set_option"](name.encode(), value):
                    raise self._fail()
            yield
        finally:
            for name, value in before.items():
                self._call["set_option"](name.encode(), value)

    @property
    def allocated_bytes(self) -> int:
        """What the CUDA runtime has allocated and not freed."""
        found: int = self._call["allocated_bytes"]()
        return found

    def log(self) -> list[dict[str, Any]]:
        """One entry for each launch since the last `clear_log()`."""
        entries: list[dict[str, Any]] = json.loads(self._call["log_json"]())
        return entries

    def clear_log(self) -> None:
        self._call["clear_log"]()


def _pack(argument: Any, size: int) -> bytes:
    """The bytes of one parameter."""
    if isinstance(argument, np.ndarray):
        packed = struct.pack("<Q", argument.ctypes.data)
    elif argument is None:
        packed = bytes(8)
    elif isinstance(argument, np.generic):
        packed = argument.tobytes()
    elif isinstance(argument, float):
        packed = struct.pack("<d" if size == 8 else "<f", argument)
    elif isinstance(argument, int):
        bits = argument & ((1 << (8 * size)) - 1)
        if argument not in (bits, bits - (1 << (8 * size))):
            raise SimulationError(f"{argument} does not fit a parameter of {size} bytes")
        packed = bits.to_bytes(size, "little")
    else:
        packed = bytes(argument)  # ctypes, bytes
    if len(packed) != size:
        raise SimulationError(f"wrong size of parameter: expected {size} bytes, got {len(packed)}")
    return packed

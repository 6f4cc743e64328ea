"""Products of the library in the interpreter, from `lowbitcore.ops` to the launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

import cuda_device
import reference as ref
from lowbitcore import ops
from ptxsim import Simulator
from ptxsim.geometry import Geometry, Problem, geometry_of

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# The library asks once how many multiprocessors there are. With few of them, small problems are
# split, or not, as large ones are on a GPU.
MULTIPROCESSORS = 8


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    counters: dict[str, int]

    @cached_property
    def geometry(self) -> Geometry | None:
        return geometry_of(self.kernel)

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Workload:
    def __init__(self) -> None:
        missing = cuda_device.why_not_emulated()
        if missing:
            raise SystemExit(missing)
        device = cuda_device.CudaDevice("emulated")
        assert device.emulated is not None
        self.device = device
        self.simulator: Simulator = device.emulated.simulator
        self._weight = lru_cache(maxsize=16)(self._new_weight)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        options = self.simulator.options(sms=MULTIPROCESSORS, trace_sectors=1)
        with self.device.in_use(), options, torch.no_grad():
            yield

    def _new_weight(self, bits: int, n: int, k: int, group_size: int) -> tuple[Any, Any]:
        problem = ref.random_problem(
            bits, bits=bits, group_size=group_size, out_features=n, in_features=k
        )
        packed = ops.prepack(problem.qweight(), problem.qzeros(), bits=bits, group_size=group_size)
        # Where torch allocates it lies as on a GPU: at the start of a sector.
        return packed, problem.scales_tensor().clone()

    def run(
        self, op: str, p: Problem, dtype: str, capability: int = 80
    ) -> tuple[list[Launch], torch.Tensor]:
        """The launches of one product on a device of that compute capability, and its result."""
        with self.simulator.options(compute_capability=capability):
            return self._run(op, p, dtype)

    def _run(self, op: str, p: Problem, dtype: str) -> tuple[list[Launch], torch.Tensor]:
        packed, scales = self._weight(p.bits, p.n, p.k, p.group_size)
        x = ref.random_activations(1, p.m, p.k, DTYPES[dtype])
        dy = ref.random_activations(2, p.m, p.n, DTYPES[dtype])
        layout: dict[str, Any] = {"bits": p.bits, "group_size": p.group_size}
        self.simulator.clear_log()
        if op == "nt":
            result = ops.qgemm_nt(x, packed, scales, **layout)
        elif op == "nn":
            result = ops.qgemm_nn(dy, packed, scales, in_features=p.k, **layout)
        else:
            result = ops.qgemm_grad_scales(dy, x, packed, **layout)
        launches = [
            Launch(
                entry["kernel"],
                tuple(entry["grid"]),
                entry["block"][0] * entry["block"][1] * entry["block"][2],
                entry["dynamic_shared"],
                entry["counters"],
            )
            for entry in self.simulator.log()
        ]
        return launches, result

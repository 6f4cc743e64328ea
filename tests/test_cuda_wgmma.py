"""The kernels for sm_90a against the float64 oracle: on a pretended device of compute capability
9.0 in the interpreter, or on a real one.

Beside all that it refuses elsewhere, the interpreter refuses what wgmma adds: registers and shared
memory touched while a product is under way, and writes that no fence has published to it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptxsim
import reference as ref
from cuda_device import CudaDevice
from ptxsim import toolchain
from test_cuda import OnDevice, check_all, each_half, each_width

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

GROUPS = (32, 64, 96, 128, -1)
ROWS = (129, 200, 261)  # none fills its blocks
DIRECTIONS = {"nt": "Forward", "nn": "Transposed"}
BLOCK_ROWS, BLOCK_COLUMNS, STEP, WARPS = 128, 256, 64, 8


@pytest.fixture
def hopper(device: CudaDevice) -> Iterator[CudaDevice]:
    """A device that has wgmma."""
    if device.emulated is None:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the GPU is not of compute capability 9.0")
        yield device
        return
    with device.emulated.simulator.options(compute_capability=90):
        yield device


@pytest.fixture
def simulator(hopper: CudaDevice) -> ptxsim.Simulator:
    """The interpreter, pretending to have wgmma."""
    if hopper.emulated is None:
        pytest.skip("looks into the interpreter")
    hopper.emulated.simulator.clear_log()
    return hopper.emulated.simulator


def launches(simulator: ptxsim.Simulator) -> dict[str, dict[str, Any]]:
    """What was launched with wgmma since the log was cleared, by direction."""
    found = [
        (op, entry)
        for entry in simulator.log()
        for op, weights in DIRECTIONS.items()
        if entry["counters"]["wgmma"] and f"{weights}Weights" in entry["kernel"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def check(
    device: CudaDevice,
    bits: int,
    dtype: torch.dtype,
    group_size: int,
    rows: int,
    *,
    n: int = 160,
    k: int = 288,
    seed: int = 0,
) -> None:
    """Both products are right, and wgmma computed them."""
    problem = ref.random_problem(
        bits, bits=bits, group_size=group_size, out_features=n, in_features=k
    )
    if device.emulated is not None:
        device.emulated.simulator.clear_log()
    with device.schedule(seed):
        check_all(device, problem, rows, dtype, seed=rows, with_bias=rows % 2 == 1, frobenius=True)
    if device.emulated is not None:
        assert launches(device.emulated.simulator).keys() == DIRECTIONS.keys()


@each_half
@each_width
@pytest.mark.parametrize("group_size", GROUPS)
def test_products(hopper: CudaDevice, bits: int, dtype: torch.dtype, group_size: int) -> None:
    """Every kernel: shapes that fill no block, short last groups, several schedules."""
    for rows in ROWS:
        check(hopper, bits, dtype, group_size, rows, seed=rows % 4)


@each_half
@each_width
@pytest.mark.parametrize(("n", "k"), [(32, 32), (64, 1600), (1600, 64), (352, 544)])
def test_long_and_narrow(hopper: CudaDevice, bits: int, dtype: torch.dtype, n: int, k: int) -> None:
    """The contraction is split over blocks, or there is one step only; more than one block."""
    check(hopper, bits, dtype, 64, 130, n=n, k=k)


@pytest.mark.full
@each_half
@each_width
@pytest.mark.parametrize("seed", range(1, 9))
def test_schedules(hopper: CudaDevice, bits: int, dtype: torch.dtype, seed: int) -> None:
    check(hopper, bits, dtype, 32 + 32 * (seed % 3), 257 + seed, n=288, k=480, seed=seed)


def test_results_repeat(hopper: CudaDevice) -> None:
    """Whatever the order of warps and blocks; and with another number of rows."""
    problem = ref.random_problem(4, bits=4, group_size=64, out_features=96, in_features=1024)
    x = ref.random_activations(0, 200, 1024, torch.bfloat16)
    dy = ref.random_activations(1, 200, 96, torch.bfloat16)
    core = OnDevice(hopper, problem)
    first = core.nt(x), core.nn(dy)
    for seed in (1, 2):
        with hopper.schedule(seed):
            again = core.nt(x), core.nn(dy)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("capability", "rows", "with_wgmma"),
    [(80, 200, False), (89, 200, False), (90, 64, False), (90, 65, True), (100, 200, False)],
)
def test_which_devices(device: CudaDevice, capability: int, rows: int, with_wgmma: bool) -> None:
    """sm_90a's instructions are on devices of 9.0 only, and need many rows."""
    if device.emulated is None:
        pytest.skip("a GPU is what it is")
    simulator = device.emulated.simulator
    problem = ref.random_problem(0, bits=4, group_size=32, out_features=32, in_features=64)
    simulator.clear_log()
    with simulator.options(compute_capability=capability):
        check_all(device, problem, rows, torch.float16)
    assert launches(simulator).keys() == (DIRECTIONS.keys() if with_wgmma else set())


@each_half
@each_width
def test_costs(
    hopper: CudaDevice, simulator: ptxsim.Simulator, bits: int, dtype: torch.dtype
) -> None:
    """The least number of products, no bank conflict, every byte of a sector used."""
    n, k, rows = 384, 320, 256  # too few steps to split, whatever the device
    problem = ref.random_problem(0, bits=bits, group_size=64, out_features=n, in_features=k)
    core = OnDevice(hopper, problem)
    # Where torch allocates it lies as on a GPU: at the start of a sector.
    core.scales = core.scales.clone()
    core.nt(ref.random_activations(0, rows, k, dtype).clone())
    core.nn(ref.random_activations(1, rows, n, dtype).clone())
    for op, launch in launches(simulator).items():
        columns, depth = (n, k) if op == "nt" else (k, n)
        blocks = rows // BLOCK_ROWS * -(-columns // BLOCK_COLUMNS)
        assert launch["grid"] == [rows // BLOCK_ROWS, -(-columns // BLOCK_COLUMNS), 1]
        counters = launch["counters"]
        # A warp has two slabs of 16 columns of the result: as many wgmmas for every 16 in depth.
        assert counters["wgmma"] == blocks * WARPS * 2 * depth // 16
        assert counters["mma_flops"] == blocks * 2 * BLOCK_ROWS * BLOCK_COLUMNS * depth
        for access in ("shared", "cp_async"):
            assert counters[f"{access}_wavefronts"] == counters[f"{access}_wavefronts_ideal"]
        assert counters["global_store_sectors"] >= counters["dram_write_sectors"]
        assert counters["global_store_sectors"] == rows * columns * 2 // 32
        read = rows * depth * 2 + n * k * bits // 8 + problem.scales.size * 5
        assert counters["dram_read_sectors"] == read // 32


# ---- faults: what the interpreter has to catch when a line of the kernel is missing ----


def _replaced(pattern: str, new: str, ptx: str) -> str:
    """The first place after the main loop's first product."""
    start = ptx.index("wgmma.mma_async")
    place = re.search(pattern, ptx[start:])
    assert place is not None
    return ptx[: start + place.start()] + new + ptx[start + place.end() :]


FAULTS = {
    # pattern, replacement, what the message says
    "no proxy fence": (r"fence\.proxy\.async[^;]*;", "", "no proxy fence"),
    "no wgmma.fence": (r"wgmma\.fence[^;]*;", "", "no wgmma.fence since"),
    "an operand is written too early": (
        r"wgmma\.wait_group\.sync\.aligned 1;",
        "",
        "in flight: a write to %r\\d+, which a wgmma is still reading",
    ),
    "sums are read too early": (
        r"wgmma\.wait_group\.sync\.aligned 0;",
        "wgmma.wait_group.sync.aligned 1;",
        "in flight",
    ),
    "no commit": (r"wgmma\.commit_group[^;]*;", "", "in flight"),
    "no barrier": (r"bar\.sync[^;]*;", "", "race|in flight|no proxy fence|uninitialised shared"),
    "a step too early": (
        r"cp\.async\.wait_group\s+1;",
        "cp.async.wait_group 3;",
        "in flight|uninitialised shared",
    ),
}


class Harness:
    """Runs PTX of one kernel in place of the library's."""

    rows, n, k, group_size = 150, 96, 480, 64

    def __init__(self, device: CudaDevice, simulator: ptxsim.Simulator, op: str) -> None:
        missing = toolchain.why_not_compiled()
        if missing:
            pytest.skip(missing)
        self.simulator, self.op = simulator, op
        self.problem = ref.random_problem(
            1, bits=4, group_size=self.group_size, out_features=self.n, in_features=self.k
        )
        self.core = OnDevice(device, self.problem)
        depth = self.k if op == "nt" else self.n
        self.operand = ref.random_activations(0, self.rows, depth, torch.float16)
        self.expected = self.core.nt(self.operand) if op == "nt" else self.core.nn(self.operand)
        self.launch = launches(simulator)[op]
        text = toolchain.ptx(f"qgemm_{op}_wgmma", 4, "90a").read_text()
        header, *entries = re.split(r"(?=\.visible \.entry )", text)
        entry = next(e for e in entries if self.launch["kernel"] in e)
        self.ptx = header + entry[: entry.index("\n}") + 3]

    def run(self, ptx: str) -> torch.Tensor:
        out = torch.full_like(self.expected, torch.nan)
        scales, packed = self.core.scales, self.core.packed
        arguments = struct.pack(
            "<QqQQqQQqQ4i",
            *(self.operand.data_ptr(), self.operand.stride(0)),
            *(packed.data_ptr(), scales.data_ptr(), scales.stride(0), 0),
            *(out.data_ptr(), out.stride(0), 0),
            *(self.rows, self.n, self.k, self.group_size // 32),
        )
        tensors = (self.operand, packed, scales, out)
        memory = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
        self.simulator.load(ptx)
        with self.simulator.regions(*memory):
            self.simulator.launch_packed(
                self.launch["kernel"],
                [*self.launch["grid"][:2], 1],
                self.launch["block"],
                arguments,
                self.launch["dynamic_shared"],
            )
        return out


@pytest.mark.parametrize("op", DIRECTIONS)
def test_faults(hopper: CudaDevice, simulator: ptxsim.Simulator, op: str) -> None:
    harness = Harness(hopper, simulator, op)
    torch.testing.assert_close(harness.run(harness.ptx), harness.expected, rtol=1e-2, atol=1e-2)
    for pattern, new, message in FAULTS.values():
        broken = _replaced(pattern, new, harness.ptx)
        with (
            simulator.options(seed=3, quantum=7),
            pytest.raises(ptxsim.SimulationError, match=message),
        ):
            harness.run(broken)

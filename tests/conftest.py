"""Two tiers, the instruction sets, and the optional data.

Default: everything not marked `full`, with few and always the same hypothesis examples; what CI
and a newcomer run. `-m full` (or LOWBITCORE_TESTS=full): everything, with many and fresh examples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Most problems here are small, and a team of threads then costs more than it brings; tests of what
# several do ask for them. Libraries read these when loaded, and commands inherit them. Threads that
# spin while others work would cost most of all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

import cuda_device
from reference import forced_isa

# The `isa` fixture is set once for all examples of a test, which is what is wanted of it.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("default", max_examples=10, derandomize=True, database=None, **_COMMON)
# What it does not say it has from the profile in use, which is the other one.
settings.register_profile("full", max_examples=150, derandomize=False, print_blob=True, **_COMMON)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("emulated", "cuda"),
        default="emulated",
        help="where the tests of the CUDA backend run: in the interpreter (default) or on a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    full = config.option.markexpr == "full" or os.environ.get("LOWBITCORE_TESTS") == "full"
    if full:
        # `-m full` means everything, not only what carries the marker.
        config.option.markexpr = ""
    settings.load_profile("full" if full else "default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        from lowbitcore import runtime

        metafunc.parametrize("isa", list(runtime.available_isas()), indirect=True)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"_cuda_device", "gpu"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.device)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, forced for the length of the test."""
    with forced_isa(request.param):
        yield request.param


@pytest.fixture(scope="session")
def _cuda_device(request: pytest.FixtureRequest) -> cuda_device.CudaDevice:
    name = request.config.getoption("--device")
    if name == "emulated":
        missing = cuda_device.why_not_emulated()
        if missing:
            pytest.skip(missing)
    elif not torch.cuda.is_available():
        pytest.skip("--device cuda: torch sees no GPU")
    return cuda_device.CudaDevice(name)


@pytest.fixture
def device(_cuda_device: cuda_device.CudaDevice) -> Iterator[cuda_device.CudaDevice]:
    """The CUDA backend, in use by `lowbitcore.ops` for the length of the test."""
    # The oracle's bounds know what the level of the CPU may lose; the scalar one loses nothing.
    with _cuda_device.in_use(), forced_isa("scalar"):
        yield _cuda_device


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Fresh torch memory is filled with NaN, so that an element never written is seen."""
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill

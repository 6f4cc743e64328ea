"""Bugs put into the CUDA kernels on purpose are caught: the tests that prove the tests."""

from __future__ import annotations

import numpy as np
import pytest

import ptxsim
import reference as ref
from cuda_device import CudaDevice
from lowbitcore import ops
from ptxsim import faults, toolchain


@pytest.fixture(scope="module")
def harness(_cuda_device: CudaDevice) -> faults.Harness:
    if _cuda_device.emulated is None:
        pytest.skip("faults are put into what the interpreter runs")
    missing = toolchain.why_not_compiled()
    if missing:
        pytest.skip(missing)
    return faults.Harness(_cuda_device.emulated.simulator)


@pytest.fixture(scope="module")
def kernels(harness: faults.Harness) -> list[faults.Kernel]:
    return faults.kernels()


def test_kernels_are_found(kernels: list[faults.Kernel]) -> None:
    assert [k.geometry.op for k in kernels] == ["nt", "nt", "nn", "nn", "grad_scales", "nt", "nn"]


def test_kernels_as_they_are(harness: faults.Harness, kernels: list[faults.Kernel]) -> None:
    for kernel in kernels:
        assert harness.error(kernel, kernel.ptx) <= faults.LIMIT, kernel.geometry.label


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_fault_is_caught(harness: faults.Harness, kernels: list[faults.Kernel], fault: str) -> None:
    for kernel in kernels:
        if fault in faults.faults_of(kernel.geometry):
            assert harness.caught(kernel, fault) is not None, kernel.geometry.label


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_without_a_place_is_an_error(fault: str) -> None:
    with pytest.raises(faults.DoesNotApply):
        faults.FAULTS[fault]("ret;")


def test_what_catches_synchronisation(
    harness: faults.Harness, kernels: list[faults.Kernel]
) -> None:
    """The interpreter, whatever the numbers are: it is refused, not computed."""
    for kernel in kernels:
        for fault in (faults.no_barrier, faults.waits_for_one_less, faults.no_commit):
            with pytest.raises(ptxsim.SimulationError, match="race|in flight"):
                harness.error(kernel, fault(kernel.ptx))


def test_layout_as_described(device: CudaDevice) -> None:
    """The harness packs by itself what the library packs."""
    problem = ref.random_problem(0, bits=4, group_size=64, out_features=64, in_features=160)
    packed = ops.prepack(
        device.put(problem.qweight()), device.put(problem.qzeros()), bits=4, group_size=64
    )
    expected = faults.packed_weight(problem.codes, problem.zeros)
    assert np.array_equal(packed.cpu().numpy().ravel()[: expected.size], expected)

"""torch's own checks of the operators, and what torch makes of layers, on the CUDA backend."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils._pytree import tree_map

import reference as ref
from cuda_device import CudaDevice
from lowbitcore import nn
from test_ops import SAMPLES

ON_TORCH = {"accumulate_hessian_", "accumulate_cross_"}  # on a GPU they are torch's products


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(device: CudaDevice, name: str) -> None:
    """Schema, fake kernel and registration of autograd. Weights in the CPU's layout are weights
    here, too, if others."""
    if device.emulated is not None and name in ON_TORCH:
        pytest.skip("the backend leaves it to torch, on a GPU")
    args, kwargs = tree_map(
        lambda item: device.put(item) if isinstance(item, torch.Tensor) else item, SAMPLES[name]()
    )
    opcheck(getattr(torch.ops.lowbitcore, name).default, args, kwargs)


def a_layer(gpu: torch.device) -> nn.QuantLinear:
    problem = ref.random_problem(6, bits=4, group_size=32, out_features=64, in_features=96)
    layer = nn.QuantLinear.from_canonical(
        problem.qweight().to(gpu),
        problem.qzeros().to(gpu),
        problem.scales_tensor().to(gpu),
        bits=4,
        group_size=32,
    )
    layer.scales.requires_grad_()
    return layer


def test_compiled(gpu: torch.device) -> None:
    pytest.importorskip("triton", reason="torch.compile needs triton on a GPU")
    layer = a_layer(gpu)
    found = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        layer.scales.grad = None
        x = ref.random_activations(0, 20, 96, torch.bfloat16).to(gpu).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, layer.scales.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast(gpu: torch.device) -> None:
    layer = a_layer(gpu)
    x = ref.random_activations(0, 20, 96, torch.float32).to(gpu)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x.bfloat16()))

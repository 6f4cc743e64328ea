"""What lies between products beside torch's operators, which pass over memory again and again.

pytest bench/bench_elementwise.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import device
import lowbitcore as lbc
from bench_qgemm import compare
from lowbitcore import losses, ops

pytestmark = pytest.mark.skipif(device.on_gpu(), reason="the core has these on the CPU alone")

# A batch of SmolLM2-135M.
TOKENS, HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, FEATURES = 1024, 576, 1536, 49152, 9, 64
Function = Callable[..., Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def norms() -> tuple[Function, Function, list[Tensor]]:
    norm = LlamaRMSNorm(HIDDEN, 1e-5).bfloat16().requires_grad_(False)
    return lambda x: ops.rms_norm(x, norm.weight, eps=1e-5), norm, [randn(TOKENS, HIDDEN)]


def gates() -> tuple[Function, Function, list[Tensor]]:
    inputs = [randn(TOKENS, INTERMEDIATE) for _ in range(2)]
    return ops.swiglu, lambda gate, up: functional.silu(gate) * up, inputs


def rotations() -> tuple[Function, Function, list[Tensor]]:
    x, (cos, sin) = randn(1, TOKENS, HEADS, FEATURES).transpose(1, 2), randn(2, 1, TOKENS, FEATURES)
    return (
        lambda x: ops.rotate(x, cos, sin),
        lambda x: apply_rotary_pos_emb(x, x[:, :1], cos, sin)[0],
        [x],
    )


def dropouts() -> tuple[Function, Function, list[Tensor]]:
    return (
        lambda x: ops.dropout(x, 0.05),
        lambda x: functional.dropout(x, 0.05),
        [randn(TOKENS, HIDDEN)],
    )


each = pytest.mark.parametrize(
    "make", [norms, gates, rotations, dropouts], ids=lambda f: f.__name__
)


def describe(benchmark: Any, op: str) -> None:
    info = {"op": op, "isa": device.name(), "device": device.model(), "dtype": "bfloat16"}
    benchmark.extra_info.update(info, threads=lbc.runtime.num_threads())


@each
def test_forward(benchmark: Any, make: Callable[[], Any]) -> None:
    ours, theirs, inputs = make()
    compare(benchmark, lambda: ours(*inputs), torch=lambda: theirs(*inputs))
    describe(benchmark, make.__name__)


@each
def test_backward(benchmark: Any, make: Callable[[], Any]) -> None:
    ours, theirs, inputs = make()
    for item in inputs:
        item.requires_grad_()

    def backward(function: Function) -> Callable[[], Any]:
        y = function(*inputs)
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    compare(benchmark, backward(ours), torch=backward(theirs))
    describe(benchmark, f"{make.__name__}_backward")


@pytest.mark.parametrize("teacher", [False, True], ids=["cross_entropy", "distillation"])
def test_losses(benchmark: Any, teacher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's a few rows at a time, which the cache holds."""
    rows = 128
    logits, other, targets = randn(rows, VOCABULARY), randn(rows, VOCABULARY), torch.arange(rows)

    def run() -> Any:
        if teacher:
            weights: dict[str, Any] = {"lambda_kl": 1.0, "lambda_ce": 0.1, "kl": "forward"}
            return losses.distillation(logits, other, targets, **weights)
        return losses.cross_entropy(logits, targets)

    def torchs() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(ops, "serves", lambda *tensors: False)
            return run()

    compare(benchmark, run, torch=torchs)
    describe(benchmark, "distillation" if teacher else "cross_entropy")

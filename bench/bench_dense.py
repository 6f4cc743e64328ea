"""Dense products of bf16 beside torch's, on processors that have no instructions for them, and
beside torch's of fp32, which take twice the memory.

pytest bench/bench_dense.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

import device
import lowbitcore.modeling  # noqa: F401  (registers our attention)
from bench_elementwise import describe
from bench_qgemm import compare
from lowbitcore import dense

pytestmark = pytest.mark.skipif(
    device.on_gpu() or dense.multiplies(torch.bfloat16),
    reason="torch has this processor's instructions for bf16",
)


class Product(NamedTuple):
    """x [m, k] times a weight [n, k]."""

    name: str
    m: int
    n: int
    k: int


# Of a batch of SmolLM2-135M; of the head as many tokens as a chunk of the loss has at least.
PRODUCTS = [
    Product("linear", 1024, 576, 1536),
    Product("adapter_down", 1024, 8, 576),
    Product("adapter_up", 1024, 576, 8),
    Product("head", 32, 49152, 576),
]
each = pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.name)


def gradient(y: Tensor, *inputs: Tensor) -> Callable[[], Any]:
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def operands(product: Product) -> tuple[Tensor, Tensor]:
    x = torch.randn(product.m, product.k, dtype=torch.bfloat16)
    return x.requires_grad_(), torch.randn(product.n, product.k, dtype=torch.bfloat16)


@torch.no_grad()
@each
def test_forward(benchmark: Any, product: Product) -> None:
    x, weight = operands(product)
    wide_x, wide_weight = x.float(), weight.float()
    compare(
        benchmark,
        lambda: dense.linear(x, weight),
        torch=lambda: functional.linear(x, weight),
        fp32=lambda: functional.linear(wide_x, wide_weight),
    )
    describe(benchmark, product.name)


@each
def test_backward(benchmark: Any, product: Product) -> None:
    x, weight = operands(product)
    wide = x.detach().float().requires_grad_()
    ours, torchs = dense.linear(x, weight), functional.linear(x, weight)
    compare(
        benchmark,
        gradient(ours, x),
        torch=gradient(torchs, x),
        fp32=gradient(functional.linear(wide, weight.float()), wide),
    )
    describe(benchmark, f"{product.name}_backward")


def test_attention_backward(benchmark: Any) -> None:
    q, k, v = (
        torch.randn(2, heads, 512, 64, dtype=torch.bfloat16, requires_grad=True)
        for heads in (9, 3, 3)
    )
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    ours, torchs = (
        AttentionInterface()[name](module, q, k, v, None)[0] for name in ("lowbitcore", "sdpa")
    )
    compare(benchmark, gradient(ours, q, k, v), torch=gradient(torchs, q, k, v))
    describe(benchmark, "attention_backward")

"""Dense products of bf16 beside torch's, on processors that have no instructions for them, and
beside torch's of fp32, which take twice the memory.

pytest bench/bench_dense.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import device
from bench_elementwise import describe
from bench_qgemm import compare
from lowbitcore import dense, ops

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


class Adapted(NamedTuple):
    """What a linear puts out and an adapter of rank 8 adds to, from m rows of k."""

    m: int
    n: int
    k: int


each_adapted = pytest.mark.parametrize(
    "shape", [Adapted(1024, 1536, 576), Adapted(1024, 192, 576)], ids=lambda s: f"N{s.n}-K{s.k}"
)


def adapters(shape: Adapted, dtype: torch.dtype) -> list[Tensor]:
    sizes = (shape.m, shape.n), (shape.m, shape.k), (8, shape.k), (shape.n, 8)
    y, x, a, b = (torch.randn(size, requires_grad=True) for size in sizes)
    return [*(item.detach().to(dtype).requires_grad_() for item in (y, x)), a, b]


def torchs_adapter(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(y, functional.linear(x, a.to(x.dtype)), b.to(x.dtype).mT, alpha=2.0)


def our_adapter(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ops.add_low_rank(y, x, a, b, scaling=2.0)


@torch.no_grad()
@each_adapted
def test_adapter(benchmark: Any, shape: Adapted) -> None:
    narrow, wide = adapters(shape, torch.bfloat16), adapters(shape, torch.float32)
    compare(
        benchmark,
        lambda: our_adapter(*narrow),
        torch=lambda: torchs_adapter(*narrow),
        fp32=lambda: torchs_adapter(*wide),
    )
    describe(benchmark, "adapter")


@each_adapted
def test_adapter_backward(benchmark: Any, shape: Adapted) -> None:
    narrow, wide = adapters(shape, torch.bfloat16), adapters(shape, torch.float32)
    compare(
        benchmark,
        gradient(our_adapter(*narrow), *narrow),
        torch=gradient(torchs_adapter(*narrow), *narrow),
        fp32=gradient(torchs_adapter(*wide), *wide),
    )
    describe(benchmark, "adapter_backward")

"""Causal attention of bf16 beside torch's, forward and backward, and beside torch's of fp32.

pytest bench/bench_attention.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import device
import lowbitcore as lbc
from bench_qgemm import compare
from lowbitcore import ops

pytestmark = pytest.mark.skipif(device.on_gpu(), reason="on a GPU attention is torch's")


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    features: int


# Of SmolLM2-135M, twice, and of LLaMA-7B.
SHAPES = [Shape(2, 9, 3, 512, 64), Shape(1, 9, 3, 1024, 64), Shape(1, 32, 32, 1024, 128)]
each_shape = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"B{s.batch}-H{s.heads}-{s.kv_heads}-T{s.tokens}-D{s.features}"
)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """As a model has them: heads lie side by side in a token's row."""
    batch, heads, kv_heads, tokens, features = shape

    def rows(count: int) -> Tensor:
        x = torch.randn(batch, tokens, count, features, dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    return rows(heads), rows(kv_heads), rows(kv_heads)


def describe(benchmark: Any, op: str, shape: Shape, products: int) -> None:
    """`products` of a head's queries by its keys were taken, half of each."""
    info = benchmark.extra_info
    info.update(op=op, isa=device.name(), device=device.model(), dtype="bfloat16")
    info.update(shape._asdict(), threads=lbc.runtime.num_threads())
    if "ms" in info:
        work = products * shape.batch * shape.heads * shape.tokens**2 * shape.features
        info["gflops"] = work / info["ms"] / 1e6


@torch.no_grad()
@each_shape
def test_attention(benchmark: Any, shape: Shape) -> None:
    q, k, v = inputs(shape)
    wide = [x.float() for x in (q, k, v)]
    compare(
        benchmark,
        lambda: ops.attention(q, k, v),
        torch=lambda: torchs(q, k, v),
        fp32=lambda: torchs(*wide),
    )
    describe(benchmark, "attention", shape, products=2)


@each_shape
def test_attention_backward(benchmark: Any, shape: Shape) -> None:
    narrow = inputs(shape)
    wide = [x.detach().float().requires_grad_() for x in narrow]

    def backward(attention: Attention, heads: Sequence[Tensor]) -> Callable[[], Any]:
        out = attention(*heads)
        d_out = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, heads, d_out, retain_graph=True)

    compare(
        benchmark,
        backward(ops.attention, narrow),
        torch=backward(torchs, narrow),
        fp32=backward(torchs, wide),
    )
    describe(benchmark, "attention_backward", shape, products=5)

"""The torch layer: registered operators, their gradients, and what they refuse."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reference as ref
from lowbitcore import ops
from lowbitcore.ops.products import fused_qgemm_nt

N, K, GROUP = 64, 96, 32
LAYOUT = {"bits": 4, "group_size": GROUP}

PROBLEM = ref.random_problem(
    0, bits=4, group_size=GROUP, out_features=N, in_features=K, g_idx="permuted"
)


def packed() -> torch.Tensor:
    return ops.prepack(PROBLEM.qweight(), PROBLEM.qzeros(), **LAYOUT)


def scales() -> torch.Tensor:
    return PROBLEM.scales_tensor()


def g_idx() -> torch.Tensor:
    index = PROBLEM.g_idx_tensor()
    assert index is not None
    return index


def x(
    rows: int = 5, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> torch.Tensor:
    return ref.random_activations(1, rows, K, dtype, layout=layout)


def dy(
    rows: int = 5, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> torch.Tensor:
    return ref.random_activations(2, rows, N, dtype, layout=layout)


def an_order() -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(4))
    return order.int(), order.argsort().int()


def bias() -> torch.Tensor:
    return ref.random_activations(3, 1, N, torch.float32)[0]


def latent() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x(), torch.rand(5, 1), torch.full((5, 1), 7.0)


# ------------------------------------------------------------------------------------------ opcheck

SAMPLES: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "pack_qweight": lambda: ((torch.from_numpy(PROBLEM.codes),), {"bits": 4}),
    "unpack_qweight": lambda: ((PROBLEM.qweight(),), {"bits": 4}),
    "pack_qzeros": lambda: ((torch.from_numpy(PROBLEM.zeros),), {"bits": 4}),
    "unpack_qzeros": lambda: ((PROBLEM.qzeros(),), {"bits": 4}),
    "prepack": lambda: ((PROBLEM.qweight(), PROBLEM.qzeros()), LAYOUT),
    "unpack": lambda: ((packed(),), {**LAYOUT, "in_features": K, "out_features": N}),
    "permute_columns": lambda: ((x(), *an_order()), {}),
    "dequantize": lambda: (
        (packed(), scales()),
        {**LAYOUT, "in_features": K, "g_idx": g_idx(), "dtype": torch.bfloat16},
    ),
    "qgemm_nt": lambda: ((x(), packed(), scales()), {**LAYOUT, "g_idx": g_idx(), "bias": bias()}),
    "qgemm_nn": lambda: (
        (dy(), packed(), scales()),
        {**LAYOUT, "in_features": K, "g_idx": g_idx()},
    ),
    "qgemm_grad_scales": lambda: ((dy(), x(), packed()), {**LAYOUT, "g_idx": g_idx()}),
    "quantize_rtn": lambda: ((x(64),), {**LAYOUT, "sym": False, "mse": True}),
    "accumulate_cross_": lambda: ((torch.eye(K), x(), x(5, torch.bfloat16)), {}),
    "accumulate_hessian_": lambda: ((torch.eye(K), x()), {}),
    "add_fake_quantized_": lambda: ((x(5, torch.bfloat16), *latent(), 4), {}),
    "fake_quantized_grads": lambda: ((x(5, torch.bfloat16), *latent(), 4), {}),
    "gptq_factorize": lambda: ((torch.eye(K),), {"percdamp": 0.01, "act_order": True}),
    "gptq_quantize": lambda: (
        (x(64), torch.arange(K, dtype=torch.int32), torch.eye(K), torch.zeros(K, dtype=torch.bool)),
        {**LAYOUT, "sym": False, "mse": False, "static_groups": False},
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    """Schema, fake kernel (static and symbolic shapes) and autograd registration."""
    args, kwargs = SAMPLES[name]()
    opcheck(getattr(torch.ops.lowbitcore, name).default, args, kwargs)


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_opcheck_differentiable(rows: int, dtype: torch.dtype) -> None:
    """The products with gradients wanted, in every dtype, without g_idx and bias, without rows."""
    grad_x, grad_dy = x(rows, dtype).requires_grad_(), dy(rows, dtype).requires_grad_()
    grad_scales = scales().requires_grad_()
    lib = torch.ops.lowbitcore
    plain = {**LAYOUT, "g_idx": None}
    opcheck(lib.qgemm_nt.default, (grad_x, packed(), grad_scales), {**plain, "bias": None})
    opcheck(
        lib.qgemm_nt.default,
        (grad_x, packed(), grad_scales),
        {**LAYOUT, "g_idx": g_idx(), "bias": bias().requires_grad_()},
    )
    opcheck(lib.qgemm_nn.default, (grad_dy, packed(), grad_scales), {**plain, "in_features": K})
    opcheck(lib.qgemm_grad_scales.default, (grad_dy, grad_x, packed()), plain)


ONCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rms_norm": lambda t: ops.rms_norm(t, torch.ones(K), eps=1e-5),
    "swiglu": lambda t: ops.swiglu(t, t),
    "attention": lambda t: ops.attention(*3 * [t.view(1, 1, 6, K)]),
    "add_low_rank": lambda t: ops.add_low_rank(
        t, t, torch.ones(2, K), torch.ones(K, 2), scaling=1.0
    ),
}


@pytest.mark.parametrize("name", ONCE)
def test_second_derivatives_are_refused(name: str) -> None:
    """Not zeros, as torch makes of an operator without gradients."""
    given = x(6).requires_grad_()
    (first,) = torch.autograd.grad(ONCE[name](given).square().sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match=f"lowbitcore::{name} can be differentiated once"):
        torch.autograd.grad(first.sum(), given)


@pytest.mark.parametrize("name", [*ONCE, "qgemm_nt", "gemm_nt"])
def test_forward_mode_is_refused(name: str) -> None:
    """Not left out, as torch does with operators that have no such derivative."""
    products = {
        **ONCE,
        "qgemm_nt": lambda t: ops.qgemm_nt(t, packed(), scales(), **LAYOUT),
        "gemm_nt": lambda t: ops.gemm_nt(t, torch.ones(N, K)),
    }
    with forward_ad.dual_level():
        products[name](x(6))  # nothing to differentiate
        with pytest.raises(ValueError, match=f"{name}: .*: expected no tangent"):
            products[name](forward_ad.make_dual(x(6), x(6)))


# ------------------------------------------------------------- with and without torch's dispatcher


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def _recorded(product: Callable[[torch.Tensor], torch.Tensor]) -> str:
    with _Recorder() as recorder:
        product(x())
    return " ".join(recorder.seen)


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _called(product: Callable[[torch.Tensor], torch.Tensor]) -> str:
    with _Functions() as functions:
        product(x())
    return " ".join(functions.seen)


def _profiled(product: Callable[[torch.Tensor], torch.Tensor]) -> str:
    with torch.profiler.profile() as profile:
        product(x())
    return " ".join(event.key for event in profile.key_averages())


def _exported(product: Callable[[torch.Tensor], torch.Tensor]) -> str:
    class Module(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return product(given)

    return str(torch.export.export(Module(), (x(),)).graph)


def _made_into_fx(product: Callable[[torch.Tensor], torch.Tensor]) -> str:
    return str(make_fx(product)(x()).graph)


def _jit_traced(product: Callable[[torch.Tensor], torch.Tensor]) -> str:
    return str(torch.jit.trace(product, x(), check_trace=False).graph)


@pytest.mark.parametrize(
    "watch", [_recorded, _called, _profiled, _exported, _made_into_fx, _jit_traced]
)
@torch.no_grad()
def test_whoever_watches_sees_the_operator(
    watch: Callable[[Callable[[torch.Tensor], torch.Tensor]], str],
) -> None:
    weight, factors = packed(), scales()
    seen = watch(lambda given: ops.qgemm_nt(given, weight, factors, **LAYOUT))
    assert "lowbitcore" in seen and "qgemm_nt" in seen
    seen = watch(lambda given: ops.qgemm_nn(given[:, :N], weight, factors, in_features=K, **LAYOUT))
    assert "lowbitcore" in seen and "qgemm_nn" in seen


def test_the_way_around_the_dispatcher_gives_the_same() -> None:
    torch_ops, layout = torch.ops.lowbitcore, {"g_idx": g_idx(), **LAYOUT}
    for options in ({}, {"dtype": torch.bfloat16}, {"layout": "strided"}, {"rows": 0}):
        given, gradient = x(**options), dy(**options)
        expected = (
            torch_ops.qgemm_nt(given, packed(), scales(), g_idx(), bias(), 4, GROUP),
            torch_ops.qgemm_nn(gradient, packed(), scales(), g_idx(), 4, GROUP, K),
            torch_ops.qgemm_grad_scales(gradient, given, packed(), g_idx(), 4, GROUP),
        )
        with torch.no_grad():
            found = (
                ops.qgemm_nt(given, packed(), scales(), bias=bias(), **layout),
                ops.qgemm_nn(gradient, packed(), scales(), in_features=K, **layout),
                ops.qgemm_grad_scales(gradient, given, packed(), **layout),
            )
        assert all(map(torch.equal, found, expected))


def test_gradients_that_are_no_data() -> None:
    """Zeros that torch does not write out, and several at once."""
    weight, factors = packed(), scales().requires_grad_()
    given = x().requires_grad_()
    y = ops.qgemm_nt(given, weight, factors, **LAYOUT)
    torch.sgn(y).sum().backward(retain_graph=True)
    for leaf in (given, factors):
        assert leaf.grad is not None and not leaf.grad.any()
    gradients = torch.stack([dy(), -3 * dy()])
    batched = torch.autograd.grad(
        y, (given, factors), gradients, retain_graph=True, is_grads_batched=True
    )
    for i, gradient in enumerate(gradients):
        alone = torch.autograd.grad(y, (given, factors), gradient, retain_graph=True)
        assert all(torch.equal(many[i], one) for many, one in zip(batched, alone, strict=True))


def test_opcheck_more_dimensions_and_strides() -> None:
    op = torch.ops.lowbitcore.qgemm_nt.default
    plain = {**LAYOUT, "g_idx": None, "bias": None}
    batched = x(6).view(2, 3, K).requires_grad_()
    opcheck(op, (batched, packed(), scales()), plain)
    for layout in ref.LAYOUTS:
        args = (x(5, layout=layout), packed(), scales())
        opcheck(op, args, plain)


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_fake_tensors_have_the_right_shapes(dtype: torch.dtype) -> None:
    """On the meta device, as model construction without memory does it."""
    layout = {**LAYOUT, "g_idx": g_idx().to("meta")}
    p, s = packed().to("meta"), scales().to("meta")
    xm, dym = x(6, dtype).view(2, 3, K).to("meta"), dy(6, dtype).view(2, 3, N).to("meta")
    y = ops.qgemm_nt(xm, p, s, **layout)
    assert (y.device.type, y.dtype, y.shape) == ("meta", dtype, (2, 3, N))
    dx = ops.qgemm_nn(dym, p, s, in_features=K, **layout)
    assert (dx.device.type, dx.dtype, dx.shape) == ("meta", dtype, (2, 3, K))
    ds = ops.qgemm_grad_scales(dym, xm, p, **layout)
    assert (ds.device.type, ds.dtype, ds.shape) == ("meta", torch.float32, (3, N))


# ------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize("layout", ["contiguous", "strided", "offset", "transposed"])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_permute_columns(dtype: torch.dtype, layout: str) -> None:
    order, inverse = an_order()
    for rows in (0, 1, 7, 8, 33):
        given = x(rows, dtype, layout).requires_grad_()
        y = ops.permute_columns(given, order, inverse)
        assert torch.equal(y, given.index_select(-1, order))
        with torch.no_grad():
            assert torch.equal(ops.permute_columns(given, order, inverse), y)
        y.backward(given)
        assert torch.equal(given.grad, given.index_select(-1, inverse))
    batched = x(6, dtype).view(2, 3, K)
    assert torch.equal(ops.permute_columns(batched, order, inverse), batched[..., order])
    for columns in (1, 2, 3, 5, 31):  # that fill no words
        order = torch.randperm(columns, dtype=torch.int32)
        given = torch.randn(3, columns).to(dtype)
        y = ops.permute_columns(given, order, order.argsort().int())
        assert torch.equal(y, given[:, order])


def test_permute_columns_refuses() -> None:
    order, inverse = an_order()
    for bad, message in (
        (order.long(), "order: expected int32"),
        (order[:-1], f"order: expected {K} elements in one dimension, got {K - 1}"),
        (order + 1, f"order: expected entries from 0 to {K - 1}, got {K}"),
        (order - 1, f"order: expected entries from 0 to {K - 1}, got -1"),
        (order.to("meta"), "order: expected a tensor on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.permute_columns(x(), bad, inverse)
    with pytest.raises(ValueError, match="x: expected float32, bfloat16 or float16"):
        ops.permute_columns(x().double(), order, inverse)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "offset", "transposed"])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_a_product_in_order(isa: str, dtype: torch.dtype, layout: str) -> None:
    order, inverse = an_order()
    for rows in (0, 1, 7, 33):
        given = x(rows, dtype, layout)
        expected = ops.qgemm_nt(
            ops.permute_columns(given, order, inverse), packed(), scales(), bias=bias(), **LAYOUT
        )
        found = fused_qgemm_nt(given, packed(), scales(), None, bias(), order, 4, GROUP, K, N)
        assert torch.equal(found, expected)


def test_a_product_in_order_refuses() -> None:
    order, _ = an_order()
    for bad, message in (
        (order.long(), "order: expected int32"),
        (order[:-1], f"order: expected {K} elements in one dimension, got {K - 1}"),
        (order + 1, f"order: expected entries from 0 to {K - 1}, got {K}"),
        (order - 1, f"order: expected entries from 0 to {K - 1}, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_qgemm_nt(x(), packed(), scales(), None, None, bad, 4, GROUP, K, N)
    with pytest.raises(ValueError, match=rf"x: expected shape \[5, {K}\], got \[5, 64\]"):
        fused_qgemm_nt(x()[:, :64], packed(), scales(), None, None, order, 4, GROUP, K, N)


# ---------------------------------------------------------------------------------------- gradients


def dense(problem: ref.Problem, scales64: torch.Tensor) -> torch.Tensor:
    """w_hat [N, K] in float64 as a differentiable function of the scales [G, N]."""
    group = torch.from_numpy(problem.group)
    integers = torch.from_numpy(problem.codes).double() - torch.from_numpy(problem.zeros)[group].T
    return scales64[group].T * integers


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@pytest.mark.parametrize("index", ref.G_IDX_KINDS)
@pytest.mark.parametrize("bits", ref.BITS)
def test_gradients_are_those_of_the_dense_weight(
    isa: str, bits: int, index: str, dtype: torch.dtype
) -> None:
    """Against float64 autograd through the dequantized weight, elementwise within the bound."""
    p = ref.random_problem(
        7, bits=bits, group_size=64, out_features=N, in_features=160, g_idx=index
    )
    leaves = (
        ref.random_activations(8, 9, 160, dtype).requires_grad_(),
        p.scales_tensor().requires_grad_(),
        bias().to(dtype).requires_grad_(),
    )
    upstream = ref.random_activations(9, 9, N, dtype)
    layout = {"bits": bits, "group_size": 64}
    weight = ops.prepack(p.qweight(), p.qzeros(), **layout)
    y = ops.qgemm_nt(leaves[0], weight, leaves[1], g_idx=p.g_idx_tensor(), bias=leaves[2], **layout)
    found = torch.autograd.grad(y, leaves, upstream)
    assert [g.dtype for g in found] == [dtype, torch.float32, dtype]

    x64, scales64, bias64 = (leaf.detach().double().requires_grad_() for leaf in leaves)
    y64 = x64 @ dense(p, scales64).T + bias64
    want = [g.numpy() for g in torch.autograd.grad(y64, (x64, scales64, bias64), upstream.double())]
    closed = ref.expect_nn(upstream, p.w_hat), ref.expect_grad_scales(upstream, leaves[0], p)
    for (expected, _), autograd in zip(closed, want, strict=False):
        np.testing.assert_allclose(expected, autograd, rtol=1e-9, atol=1e-12)
    ref.assert_close(found[0], want[0], closed[0][1])
    ref.assert_close(found[1], want[1], closed[1][1])
    magnitude = np.abs(ref.as_float64(upstream)).sum(axis=0)
    tolerance = ref.error_bound(magnitude, want[2], terms=9, dtype=dtype)
    ref.assert_close(found[2], want[2], tolerance + ref.UNIT_ROUNDOFF[dtype] * magnitude)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_the_gradients_asked_for(wanted: tuple[bool, bool, bool]) -> None:
    leaves = [
        leaf.requires_grad_(want)
        for leaf, want in zip((x(), scales(), bias()), wanted, strict=True)
    ]
    y = ops.qgemm_nt(leaves[0], packed(), leaves[1], g_idx=g_idx(), bias=leaves[2], **LAYOUT)
    y.backward(dy())
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    full = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = ops.qgemm_nt(full[0], packed(), full[1], g_idx=g_idx(), bias=full[2], **LAYOUT)
    y.backward(dy())
    for some, everything in zip(leaves, full, strict=True):
        assert some.grad is None or torch.equal(some.grad, everything.grad)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("index", ref.G_IDX_KINDS)
def test_double_backward(index: str) -> None:
    """Y is bilinear in x and the scales, so second derivatives are products as well."""
    p = ref.random_problem(7, bits=3, group_size=64, out_features=N, in_features=160, g_idx=index)
    layout = {"bits": 3, "group_size": 64}
    weight = ops.prepack(p.qweight(), p.qzeros(), **layout)
    v_x, v_s, v_b = torch.randn(5, 160), torch.randn(3, N), torch.randn(N)

    def second(inputs: tuple[torch.Tensor, ...], forward: Callable[..., torch.Tensor]):
        x_, s_, b_, upstream = inputs
        first = torch.autograd.grad(forward(x_, s_, b_), (x_, s_, b_), upstream, create_graph=True)
        # All of: d/dx, d/ds, d/db and d/d(upstream) of <gradients, v>.
        dots = [(g * v.to(g.dtype)).sum() for g, v in zip(first, (v_x, v_s, v_b), strict=True)]
        return torch.autograd.grad(sum(dots), (x_, s_, upstream))

    leaves = tuple(
        leaf.requires_grad_()
        for leaf in (
            ref.random_activations(8, 5, 160, torch.float32),
            p.scales_tensor(),
            bias(),
            dy(),
        )
    )
    found = second(
        leaves,
        lambda a, s, b: ops.qgemm_nt(a, weight, s, g_idx=p.g_idx_tensor(), bias=b, **layout),
    )
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    want = second(exact, lambda a, s, b: a @ dense(p, s).T + b)
    for got, expected in zip(found, want, strict=True):
        assert relative(got, expected) < 2e-6


@pytest.mark.parametrize("index", ["none", "permuted"])
def test_the_other_products_have_gradients_too(index: str) -> None:
    p = ref.random_problem(7, bits=4, group_size=64, out_features=N, in_features=160, g_idx=index)
    layout = {"bits": 4, "group_size": 64, "g_idx": p.g_idx_tensor()}
    weight = ops.prepack(p.qweight(), p.qzeros(), bits=4, group_size=64)
    dy_, x_, s_ = dy(), ref.random_activations(8, 5, 160, torch.float32), p.scales_tensor()
    dy64, x64, s64 = (t.double().requires_grad_() for t in (dy_, x_, s_))
    for t in (dy_, x_, s_):
        t.requires_grad_()
    v_x, v_s = torch.randn(5, 160), torch.randn(3, N)

    dx = ops.qgemm_nn(dy_, weight, s_, in_features=160, **layout)
    found = torch.autograd.grad(dx, (dy_, s_), v_x)
    want = torch.autograd.grad(dy64 @ dense(p, s64), (dy64, s64), v_x.double())
    assert all(relative(got, expected) < 2e-6 for got, expected in zip(found, want, strict=True))

    ds = ops.qgemm_grad_scales(dy_, x_, weight, **layout)
    found = torch.autograd.grad(ds, (dy_, x_), v_s)
    y64 = x64 @ dense(p, s64).T
    ds64 = torch.autograd.grad(y64, s64, dy64, create_graph=True)[0]
    want = torch.autograd.grad(ds64, (dy64, x64), v_s.double())
    assert all(relative(got, expected) < 2e-6 for got, expected in zip(found, want, strict=True))


def test_gradients_without_rows() -> None:
    leaves = [leaf.requires_grad_() for leaf in (x(0), scales(), bias())]
    ops.qgemm_nt(leaves[0], packed(), leaves[1], bias=leaves[2], **LAYOUT).sum().backward()
    assert leaves[0].grad.shape == (0, K)
    assert torch.equal(leaves[1].grad, torch.zeros(3, N))
    assert torch.equal(leaves[2].grad, torch.zeros(N))


def test_gradient_of_batches() -> None:
    flat = x(6).requires_grad_()
    batched = x(6).view(2, 3, K).requires_grad_()
    s_flat, s_batched = scales().requires_grad_(), scales().requires_grad_()
    ops.qgemm_nt(flat, packed(), s_flat, **LAYOUT).backward(dy(6))
    ops.qgemm_nt(batched, packed(), s_batched, **LAYOUT).backward(dy(6).view(2, 3, N))
    assert torch.equal(batched.grad.view(6, K), flat.grad)
    assert torch.equal(s_batched.grad, s_flat.grad)


def test_strided_scales() -> None:
    """Scales may be a view, as a fused parameter's slice is."""
    want = ops.qgemm_nt(x(), packed(), scales(), **LAYOUT)
    wide = torch.full((3, N + 5), torch.nan)
    wide[:, 2 : N + 2] = scales()
    for view in (scales().t().contiguous().t(), wide[:, 2 : N + 2]):
        assert torch.equal(ops.qgemm_nt(x(), packed(), view, **LAYOUT), want)


def test_quantizing_a_parameter_records_nothing() -> None:
    """Weights arrive as nn.Parameter; integers have no gradient."""
    weight = torch.nn.Parameter(x(64))
    found = ops.quantize_rtn(weight, **LAYOUT)
    assert not found.scales.requires_grad
    factor = ops.gptq_factorize(torch.eye(K))
    assert not ops.gptq_quantize(weight, factor, **LAYOUT).scales.requires_grad


def test_negated_views_are_read_right() -> None:
    """A lazily negated view (the imaginary part of a conjugate) has its sign only in a flag."""
    z = torch.complex(x(), x())
    negated = z.conj().imag
    assert negated.is_neg()
    want = ops.qgemm_nt(-x(), packed(), scales(), **LAYOUT)
    assert torch.equal(ops.qgemm_nt(negated, packed(), scales(), **LAYOUT), want)


# ------------------------------------------------------------------------------------------- errors

# op, what is changed in its sample call (a position or a keyword), the parts its message must have:
# op and argument, what was wanted, what came.
WRONG = [
    ("qgemm_nt", 0, lambda: x().double(), ("x", "float32", "bfloat16", "float16", "float64")),
    ("qgemm_nt", 0, lambda: x().int(), ("x", "float32", "int32")),
    ("qgemm_nt", 0, lambda: x()[:, :64], ("x|packed",)),
    ("qgemm_nt", 0, lambda: torch.tensor(1.0), ("x",)),
    ("qgemm_nt", 1, lambda: packed()[:-1], ("packed",)),
    ("qgemm_nt", 1, lambda: packed().view(torch.int8), ("packed", "uint8", "int8")),
    ("qgemm_nt", 2, lambda: scales()[:2], ("scales", "3", "2")),
    ("qgemm_nt", 2, lambda: scales().half(), ("scales", "float32", "float16")),
    ("qgemm_nt", "g_idx", lambda: g_idx()[:95], ("g_idx", "96", "95")),
    ("qgemm_nt", "g_idx", lambda: g_idx().long(), ("g_idx", "int32", "int64")),
    ("qgemm_nt", "g_idx", lambda: g_idx() + 1, ("g_idx", "0 to 2", "3")),
    ("qgemm_nt", "g_idx", lambda: g_idx() - 1, ("g_idx", "0 to 2", "-1")),
    ("qgemm_nt", "bias", lambda: bias()[:32], ("bias", "64", "32")),
    ("qgemm_nt", "bits", lambda: 5, ("bits", "2, 3, 4 or 8", "5")),
    ("qgemm_nt", "bits", lambda: 0, ("bits", "2, 3, 4 or 8", "0")),
    ("qgemm_nt", "group_size", lambda: 48, ("group_size", "32", "48")),
    ("qgemm_nt", "group_size", lambda: 0, ("group_size", "32", "0")),
    ("qgemm_nt", "group_size", lambda: -2, ("group_size", "32", "-2")),
    ("qgemm_nn", 0, lambda: dy().double(), ("dy", "float32", "float64")),
    ("qgemm_nn", 0, lambda: dy()[:, :32], ("dy", "64", "32")),
    ("qgemm_nn", 1, lambda: packed()[:-1], ("packed",)),
    ("qgemm_nn", 2, lambda: scales()[:, :32], ("scales|packed|dy",)),
    ("qgemm_nn", "in_features", lambda: 100, ("in_features", "32", "100")),
    ("qgemm_nn", "in_features", lambda: 0, ("in_features", "0")),
    ("qgemm_nn", "in_features", lambda: -96, ("in_features", "-96")),
    ("qgemm_nn", "g_idx", lambda: g_idx() + 1, ("g_idx", "0 to 2", "3")),
    ("qgemm_nn", "bits", lambda: 16, ("bits", "2, 3, 4 or 8", "16")),
    ("qgemm_grad_scales", 0, lambda: dy(4), ("dy|x", "5", "4")),
    ("qgemm_grad_scales", 0, lambda: dy().bfloat16(), ("dy", "bfloat16", "float32")),
    ("qgemm_grad_scales", 1, lambda: x()[:, :64], ("packed",)),
    ("qgemm_grad_scales", 2, lambda: packed()[1:], ("packed",)),
    ("qgemm_grad_scales", "g_idx", lambda: g_idx() + 1, ("g_idx", "0 to 2", "3")),
    ("dequantize", 0, lambda: packed().int(), ("packed", "uint8", "int32")),
    ("dequantize", 1, lambda: scales()[:1], ("scales", "3", "1")),
    ("dequantize", "in_features", lambda: 97, ("in_features", "32", "97")),
    ("dequantize", "dtype", lambda: torch.float64, ("float32", "float64")),
    ("dequantize", "bits", lambda: 7, ("bits", "2, 3, 4 or 8", "7")),
    ("prepack", 0, lambda: PROBLEM.qweight()[:, :40], ("out_features|qweight|qzeros", "40")),
    ("prepack", 0, lambda: PROBLEM.qweight().long(), ("qweight", "int32", "int64")),
    ("prepack", 0, lambda: PROBLEM.qweight()[0], ("qweight", "2")),
    ("prepack", 1, lambda: PROBLEM.qzeros()[:2], ("qzeros", "3", "2")),
    ("prepack", 1, lambda: PROBLEM.qzeros()[:, :4], ("qzeros", "8", "4")),
    ("prepack", "bits", lambda: 1, ("bits", "2, 3, 4 or 8", "1")),
    ("prepack", "group_size", lambda: 33, ("group_size", "32", "33")),
    ("unpack", 0, lambda: packed()[:-1], ("packed",)),
    ("unpack", "out_features", lambda: 65, ("out_features", "32", "65")),
    ("unpack", "in_features", lambda: 2**62, ("in_features", str(2**62))),
    ("pack_qweight", 0, lambda: torch.zeros(32, 40, dtype=torch.uint8), ("codes", "32", "40")),
    ("pack_qweight", 0, lambda: torch.zeros(32, 32), ("codes", "uint8", "float32")),
    ("pack_qweight", 0, lambda: torch.zeros(32, dtype=torch.uint8), ("codes", "2", "(32,)")),
    ("pack_qweight", "bits", lambda: 6, ("bits", "2, 3, 4 or 8", "6")),
    ("unpack_qweight", 0, lambda: PROBLEM.qweight()[:5], ("qweight", "5")),
    ("unpack_qweight", 0, lambda: PROBLEM.qweight().float(), ("qweight", "int32", "float32")),
    ("pack_qzeros", 0, lambda: torch.zeros(3, 33, dtype=torch.uint8), ("zeros", "32", "33")),
    ("unpack_qzeros", 0, lambda: PROBLEM.qzeros()[:, :3], ("qzeros", "3")),
]


def call(name: str, where: int | str, value: Any) -> Any:
    args, kwargs = SAMPLES[name]()
    if isinstance(where, int):
        args = (*args[:where], value, *args[where + 1 :])
    else:
        kwargs = {**kwargs, where: value}
    return getattr(ops, name)(*args, **kwargs)


def assert_says(raised: pytest.ExceptionInfo[ValueError], parts: tuple[str, ...]) -> None:
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert any(one in message for one in part.split("|")), f"{part!r} is not in {message!r}"


@pytest.mark.parametrize(
    ("name", "where", "value", "parts"), WRONG, ids=lambda v: v if isinstance(v, str) else ""
)
def test_wrong_arguments_are_named(
    name: str, where: int | str, value: Callable[[], Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - assert_says looks at the message
        call(name, where, value())
    assert_says(raised, (name, *parts))


@pytest.mark.parametrize("where", [0, 1, 2, "g_idx", "bias"])
@pytest.mark.parametrize("all_others_on", ["cpu", "meta"])
def test_mixed_devices_are_refused(where: int | str, all_others_on: str) -> None:
    args, kwargs = SAMPLES["qgemm_nt"]()
    other = "meta" if all_others_on == "cpu" else "cpu"
    moved = [t.to(other if position == where else all_others_on) for position, t in enumerate(args)]
    named = {
        key: t.to(other if key == where else all_others_on) if torch.is_tensor(t) else t
        for key, t in kwargs.items()
    }
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - assert_says looks at the message
        ops.qgemm_nt(*moved, **named)
    assert_says(raised, ("qgemm_nt", "cpu", "meta"))


QUANTIZE_WRONG = [
    (lambda: torch.zeros(32, 40), {}, ("in_features|weight", "32", "40")),
    (lambda: torch.zeros(33, 32), {}, ("out_features|weight", "32", "33")),
    (lambda: torch.zeros(32), {}, ("weight", "2", "(32,)")),
    (lambda: torch.zeros(0, 32), {}, ("out_features|weight", "0")),
    (lambda: torch.zeros(32, 32, dtype=torch.float64), {}, ("weight", "float32", "float64")),
    (lambda: torch.zeros(32, 32), {"bits": 5}, ("bits", "2, 3, 4 or 8", "5")),
    (lambda: torch.zeros(32, 32), {"group_size": 16}, ("group_size", "32", "16")),
    (lambda: torch.full((32, 32), torch.nan), {}, ("weight", "finite", "nan")),
]


@pytest.mark.parametrize(("weight", "change", "parts"), QUANTIZE_WRONG)
def test_quantize_rtn_names_what_is_wrong(
    weight: Callable[[], torch.Tensor], change: dict[str, int], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - assert_says looks at the message
        ops.quantize_rtn(weight(), **({"bits": 4, "group_size": 32} | change))
    assert_says(raised, ("quantize_rtn", *parts))


def test_no_argument_is_silently_converted() -> None:
    """A wrong type is the caller's mistake, not something to copy and go on with."""
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        ops.qgemm_nt(x().numpy(), packed(), scales(), **LAYOUT)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        ops.qgemm_nt(x(), packed(), scales(), bits=4.5, group_size=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4.0}, "bits: expected 2, 3, 4 or 8, got 4.0"),
        ({"bits": None}, "bits: .*got None"),
        ({"group_size": "32"}, "group_size: .*got '32'"),
        ({"group_size": 0}, "group_size: .*got 0"),
        ({"group_size": 2**31}, "group_size: .*at most 2.30, got 2147483648"),
        ({"group_size": 2**62}, "group_size: .*at most 2.30, got 4611686018427387904"),
        ({"weight": None}, "weight: expected a dense tensor, got NoneType"),
        (
            {"weight": torch.eye(64).to_sparse()},
            "weight: expected a dense tensor, got torch.sparse",
        ),
    ],
)
def test_arguments_of_the_wrong_kind(arguments: dict[str, object], message: str) -> None:
    fine = {"weight": torch.randn(64, 64), "bits": 4, "group_size": 32}
    with pytest.raises(ValueError, match="quantize_rtn: " + message):
        ops.quantize_rtn(**(fine | arguments))


def test_a_group_longer_than_the_row() -> None:
    weight = torch.randn(64, 96)
    whole = ops.quantize_rtn(weight, bits=3, group_size=-1)
    longer = ops.quantize_rtn(weight, bits=3, group_size=2**30)
    assert all(torch.equal(a, b) for a, b in zip(whole, longer, strict=True))


# ---- memory ----

_PRODUCTS = """
import sys, torch
from lowbitcore import ops, runtime
N, K = 2048, 8192
runtime.force_isa(sys.argv[1])
runtime.set_num_threads(2)

def memory(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def problem(n, k, m, dtype, form):
    packed = torch.zeros(ops.packed_size(in_features=k, out_features=n, **form), dtype=torch.uint8)
    x, dy = torch.ones(m, k, dtype=dtype), torch.ones(m, n, dtype=dtype)
    return x, dy, packed, torch.ones(k // 128, n)

for bits, dtype in ((3, torch.bfloat16), (4, torch.float32)):
    form = dict(bits=bits, group_size=128)
    products = {
        "qgemm_nt": lambda x, dy, w, s: ops.qgemm_nt(x, w, s, **form),
        "qgemm_nn": lambda x, dy, w, s: ops.qgemm_nn(dy, w, s, in_features=x.shape[1], **form),
        "grad_scales": lambda x, dy, w, s: ops.qgemm_grad_scales(dy, x, w, **form),
    }
    for m in (1, 16, 200):
        large = problem(N, K, m, dtype, form)
        for name, product in products.items():
            product(*problem(256, 1024, m, dtype, form))  # threads, and what an allocator keeps
            open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
            before = memory("VmRSS")
            result = product(*large)
            x, dy = (item.nbytes for item in large[:2])
            given = {"qgemm_nt": x, "qgemm_nn": dy, "grad_scales": x + dy}[name]
            most = 2 * (given + result.nbytes) + (4 << 20)
            print(f"{name} {bits} {m}", memory("VmHWM") - before, most, sep=",")
"""


def test_products_take_no_dense_copy(isa: str) -> None:
    """Beside what comes and goes a product takes no memory of a weight's size, which is 32 MB in 16
    bits; nor do gradients of scales."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not say how much memory was in use at most")
    script = [sys.executable, "-c", _PRODUCTS, isa]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [line.split(",") for line in done.stdout.splitlines()]
    assert len(found) == 18
    for name, peak, most in found:
        assert int(peak) <= int(most), f"{name}: {int(peak) / 1e6:.1f} MB of {int(most) / 1e6:.1f}"

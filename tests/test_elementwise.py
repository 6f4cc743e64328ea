"""Norms, rotary positions, gates and dropout against a float64 oracle and against transformers'
own, and models that compute through them."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from transformers import GemmaConfig, LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

import lowbitcore as lbc
import reference as ref
from lowbitcore import _C, ops
from lowbitcore.modeling import elementwise
from lowbitcore.skeleton import build_skeleton

EPS = 1e-5
draws = {
    "rows": st.sampled_from(ref.ROWS),
    "columns": ref.sizes,
    "layout": st.sampled_from(ref.LAYOUTS),
    "seed": ref.seeds,
}


def bound(expected: ref.F64, size: ref.F64, dtype: torch.dtype, roundings: int) -> ref.F64:
    """So many roundings to the type of what is as large as `size`, and fp32's of sums and
    exponentials."""
    return size * (1.01 * roundings * ref.UNIT_ROUNDOFF[dtype] + 64 * ref.UNIT_FP32) + 1e-6


def normed(x: ref.F64, weight: ref.F64) -> ref.F64:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def norm_gradient(dy: ref.F64, x: ref.F64, weight: ref.F64) -> tuple[ref.F64, ref.F64]:
    """And what its terms may be as large as."""
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    g = weight * dy
    along = r * r * x * (g * x).mean(-1, keepdims=True)
    most = r * r * np.abs(x) * (np.abs(g * x)).mean(-1, keepdims=True)
    return r * (g - along), r * (np.abs(g) + most)


def silu(g: ref.F64) -> ref.F64:
    return g / (1 + np.exp(-g))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(**draws)
def test_rms_norm(
    isa: str, dtype: torch.dtype, rows: int, columns: int, layout: str, seed: int
) -> None:
    x = ref.random_activations(seed, rows, columns, dtype, layout=layout).requires_grad_()
    dy = ref.random_activations(seed + 1, rows, columns, dtype, layout=layout)
    weight = ref.random_activations(seed + 2, 1, columns, dtype)[0]
    y = ops.rms_norm(x, weight, eps=EPS)
    (dx,) = torch.autograd.grad(y, x, dy)
    x64, w64 = ref.as_float64(x.detach()), ref.as_float64(weight)
    expected = normed(x64, w64)
    ref.assert_close(y.detach(), expected, bound(expected, np.abs(expected), dtype, 2))
    gradient, size = norm_gradient(ref.as_float64(dy), x64, w64)
    ref.assert_close(dx, gradient, bound(gradient, size, dtype, 1))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(**draws, scale=st.sampled_from([1.0, 40.0]))
def test_swiglu(
    isa: str, dtype: torch.dtype, rows: int, columns: int, layout: str, seed: int, scale: float
) -> None:
    gate, up, d_out = (
        ref.random_activations(seed + i, rows, columns, dtype, layout=layout) for i in range(3)
    )
    gate = (scale * gate).requires_grad_()
    up.requires_grad_()
    out = ops.swiglu(gate, up)
    found = torch.autograd.grad(out, (gate, up), d_out)
    g, u, d = (ref.as_float64(x.detach()) for x in (gate, up, d_out))
    s = 1 / (1 + np.exp(-g))
    expected = silu(g) * u
    ref.assert_close(out.detach(), expected, bound(expected, np.abs(expected), dtype, 2))
    slope = s * (1 + g * (1 - s))
    size = np.abs(d * u) * s * (1 + np.abs(g) * (1 - s))
    ref.assert_close(found[0], d * u * slope, bound(d * u * slope, size, dtype, 1))
    ref.assert_close(found[1], d * silu(g), bound(d * silu(g), np.abs(d * silu(g)), dtype, 1))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    rows=st.integers(1, 40),
    columns=st.sampled_from([64, 128]),
    shared=st.booleans(),
    rows_first=st.booleans(),
    seed=ref.seeds,
)
def test_rotation_is_that_of_transformers(
    isa: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    shared: bool,
    rows_first: bool,
    seed: int,
) -> None:
    """Bit by bit, gradients too."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x = randn(batch, rows, heads, columns).transpose(1, 2)
    if not rows_first:
        x = x.contiguous()
    x.requires_grad_()
    cos, sin = (randn(1 if shared else batch, rows, columns) for _ in range(2))
    dy = randn(batch, heads, rows, columns)
    wanted = apply_rotary_pos_emb(x, x, cos, sin)[0]
    found = ops.rotate(x, cos, sin)
    assert torch.equal(found, wanted)
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (found, wanted)]
    assert torch.equal(*gradients)


def test_what_is_not_finite_is_seen(isa: str) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(3, 64)
        x[1, 7] = value
        assert ops.rms_norm(x, torch.ones(64), eps=EPS)[1].isnan().any()
        out = ops.swiglu(x, torch.ones(3, 64))
        assert not out[1].isfinite().all() or value == -torch.inf
        assert ops.swiglu(torch.ones(3, 64), x)[1, 7].isfinite().logical_not()
        assert torch.equal(out[[0, 2]], ops.swiglu(torch.ones(2, 64), torch.ones(2, 64)))


def test_they_do_not_depend_on_threads(isa: str) -> None:
    x, up = torch.randn(700, 96).bfloat16(), torch.randn(700, 96).bfloat16()
    cos = torch.randn(1, 700, 64)
    found = []
    for count in (1, 2, 5):
        with ref.threads(count):
            torch.manual_seed(3)
            found.append(
                (
                    ops.rms_norm(x, x[0], eps=EPS),
                    ops.swiglu(x, up),
                    ops.rotate(torch.ones(1, 2, 700, 64), cos, cos),
                    ops.dropout(x, 0.4),
                )
            )
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout(isa: str, p: float) -> None:
    """Independent of places near and far, and of the seed before; the same on every level."""
    torch.manual_seed(0)
    x = torch.ones(500, 320)
    first, second = (ops.dropout(x, p) == 0 for _ in range(2))
    torch.manual_seed(0)
    with ref.forced_isa("scalar"):
        assert torch.equal(ops.dropout(x, p) == 0, first)
    count = first.numel()
    for dropped in (first, second):
        assert abs(dropped.float().mean() - p) < 5 * (p * (1 - p) / count) ** 0.5
        for axis in (0, 1):  # no row and no column stands out
            share = dropped.float().mean(axis)
            assert ((share - p).abs() < 6 * (p * (1 - p) / dropped.shape[axis]) ** 0.5).all()
    pairs = [(first, second), (first[1:], first[:-1])]
    pairs += [(first[:, i:], first[:, :-i]) for i in (1, 2, 16, 32)]
    for a, b in pairs:  # both dropped: p^2 of the time
        assert abs((a & b).float().mean() - p * p) < 6 * p / a.numel() ** 0.5


def test_operators_are_what_torch_expects() -> None:
    x = torch.randn(3, 5, 64, requires_grad=True)
    heads = torch.randn(2, 3, 5, 64, requires_grad=True)
    table = torch.randn(1, 5, 64)
    seed = torch.tensor(7)
    for operator, arguments in (
        (torch.ops.lowbitcore.rms_norm, (x, torch.ones(64), EPS)),
        (torch.ops.lowbitcore.swiglu, (x, x.detach().clone().requires_grad_())),
        (torch.ops.lowbitcore.rotate, (heads, table, table, False)),
        (torch.ops.lowbitcore.dropout, (x, seed, 1000)),
    ):
        opcheck(operator.default, arguments)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ops.rms_norm(torch.ones(2, 33), torch.ones(33), eps=EPS), "x: .* multiple of 32"),
        (lambda: ops.rms_norm(torch.ones(2, 64), torch.ones(32), eps=EPS), "weight: .*64.*, got"),
        (
            lambda: ops.rms_norm(torch.ones(2, 64), torch.ones(64).half(), eps=EPS),
            "weight: .*float32",
        ),
        (lambda: ops.rms_norm(torch.ones(2, 64), torch.ones(64), eps=-1.0), "eps: .* 0 or more"),
        (
            lambda: ops.rms_norm(torch.ones(2, 64), torch.nn.Parameter(torch.ones(64)), eps=EPS),
            "weight: .* does not ask for a gradient",
        ),
        (lambda: ops.rms_norm(torch.ones(2, 64), torch.ones(1, 64), eps=EPS), "weight: .*1 dim"),
        (lambda: ops.rms_norm(torch.ones(64).to_sparse(), torch.ones(64), eps=EPS), "x: .*dense"),
        (lambda: ops.rms_norm([1.0], torch.ones(64), eps=EPS), "x: .*tensor, got list"),
        (lambda: ops.swiglu(torch.ones(2, 64), torch.ones(2, 32)), "up: .*as gate"),
        (lambda: ops.swiglu(torch.ones(2, 3, 64), torch.ones(3, 2, 64)), "up: .*as gate"),
        (lambda: ops.swiglu(torch.ones(2, 64).int(), torch.ones(2, 64)), "gate: .*float"),
        (lambda: ops.swiglu(torch.ones(2, 64), torch.ones(2, 64).half()), "up: .*float32"),
        (lambda: ops.dropout(torch.ones(2, 64), 1.0), "p: .*below 1, got 1.0"),
        (lambda: ops.dropout(torch.ones(2, 40), 0.5), "x: .* multiple of 32"),
        (
            lambda: ops.rotate(torch.ones(1, 1, 2, 32), *[torch.ones(1, 2, 32)] * 2),
            "cos: .* multiple of 64",
        ),
        (
            lambda: ops.rotate(torch.ones(1, 1, 2, 64), *[torch.ones(1, 3, 64)] * 2),
            r"cos: .*\[1 or 1, 2, 64\]",
        ),
    ],
)
def test_mistakes_are_named(call: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
    if "gradient" not in named:
        with torch.no_grad(), pytest.raises(ValueError, match=named):  # past torch's dispatcher
            call()


def test_swiglu_of_gates_far_from_0() -> None:
    """Nothing is left of them below, as in torch: not a multiple of the least number."""
    gate = torch.tensor([-3e38, -1000.0, -88.0, -86.0, 88.0, 1000.0, 3e38, 0.0]).repeat(2, 4)
    up = torch.ones_like(gate)
    expected = torch.nn.functional.silu(gate.double())
    torch.testing.assert_close(ops.swiglu(gate, up).double(), expected, rtol=1e-5, atol=1e-35)
    gate.requires_grad_()
    ops.swiglu(gate, up).sum().backward()
    wide = gate.detach().double().requires_grad_()
    torch.nn.functional.silu(wide).sum().backward()
    torch.testing.assert_close(gate.grad.double(), wide.grad, rtol=1e-5, atol=1e-35)


def test_empty() -> None:
    assert ops.rms_norm(torch.ones(0, 64), torch.ones(64), eps=EPS).shape == (0, 64)
    assert ops.swiglu(torch.ones(2, 0, 64), torch.ones(2, 0, 64)).shape == (2, 0, 64)
    assert ops.dropout(torch.ones(0, 64), 0.5).shape == (0, 64)
    table = torch.ones(1, 0, 64)
    assert ops.rotate(torch.ones(1, 2, 0, 64), table, table).shape == (1, 2, 0, 64)


# ------------------------------------------------------------------------------------------ models

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


def filled(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    model = build_skeleton(config, dtype)
    torch.manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        value = 0.2 * torch.randn(parameter.shape) + (1.0 if parameter.dim() == 1 else 0.0)
        made = torch.nn.Parameter(value.to(dtype), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, made)
    return model


def plain(model: PreTrainedModel, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in transformers' own model."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_compute_what_transformers_computes(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, as near to fp32 as transformers is, but for half as much again."""
    config = kind(**SMALL)
    model = filled(config, dtype)
    calls: list[str] = []
    for name in ("rms_norm", "swiglu", "rotate"):
        original = getattr(ops, name)

        def counted(*args: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            calls.append(name)
            return original(*args, **more)

        monkeypatch.setattr(ops, name, counted)
    ids = torch.randint(96, (2, 12))
    with torch.no_grad():
        found = model(input_ids=ids).logits.float()
        other = plain(model, config, dtype)
        theirs = other(input_ids=ids).logits.float()
        exact = other.float()(input_ids=ids).logits
    assert (found - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-5 * exact.norm()
    assert calls.count("swiglu") == 2 and calls.count("rotate") == 4
    assert calls.count("rms_norm") == (5 if kind is LlamaConfig else 9)


def test_what_computes_otherwise_is_left_alone() -> None:
    def kinds(model: PreTrainedModel) -> set[type]:
        return {type(module) for module in model.modules()}

    other = filled(GemmaConfig(**SMALL), torch.float32)
    assert not kinds(other) & {elementwise.RmsNorm, elementwise.SwigluMlp}
    gelu = filled(LlamaConfig(**SMALL, hidden_act="gelu"), torch.float32)
    assert elementwise.SwigluMlp not in kinds(gelu) and elementwise.RmsNorm in kinds(gelu)
    llama = filled(LlamaConfig(**SMALL), torch.float32)
    assert {elementwise.RmsNorm, elementwise.SwigluMlp} <= kinds(llama)


def test_a_norm_that_trains_is_that_of_transformers() -> None:
    norm = LlamaRMSNorm(64, EPS)
    norm.__class__ = elementwise.RmsNorm
    x = torch.randn(3, 64)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(norm(x), LlamaRMSNorm(64, EPS)(x))


def test_models_can_be_copied_and_quantized() -> None:
    model = filled(LlamaConfig(**SMALL), torch.float32)
    ids = torch.randint(96, (2, 12))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copy(input_ids=ids).logits, wanted)
            assert list(map(type, copy.modules())) == list(map(type, model.modules()))
    own = plain(model, model.config, torch.float32)
    lbc.quantize_model(
        own, None, None, lbc.QuantConfig(group_size=32, method="rtn"), progress=False
    )
    assert any(type(module) is elementwise.SwigluMlp for module in own.modules())
    assert isinstance(own.model.layers[0].mlp, LlamaMLP)


def test_a_row_step_is_taken_as_it_is(isa: str) -> None:
    """The core reads rows a step apart, with NaN between them, and writes nothing there."""
    wide = torch.full((5, 80), torch.nan)
    wide[:, :64] = torch.randn(5, 64)
    result = torch.full((5, 96), 7.0)
    _C.rms_norm(wide[:, :64], torch.ones(64), EPS, result[:, :64])
    expected = normed(ref.as_float64(wide[:, :64]), np.ones(64))
    ref.assert_close(result[:, :64], expected, 1e-5 * np.abs(expected) + 1e-6)
    assert (result[:, 64:] == 7.0).all()

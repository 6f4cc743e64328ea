"""A new token through a block: each part against a float64 oracle or the operation that it stands
for, and models that generate through it."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Ernie4_5Config,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import lowbitcore as lbc
import reference as ref
from lowbitcore import _C, ops
from lowbitcore.modeling import decode
from lowbitcore.nn import LoraLinear, QuantLinear
from lowbitcore.skeleton import build_skeleton

EPS = 1e-5


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --------------------------------------------------------------------------------------- attention


def apart(heads: Tensor, layout: str) -> Tensor:
    """[B, H, T, D] of the given strides, NaN in between."""
    if layout == "rows first":
        return heads.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "apart":
        wide = torch.full((*heads.shape[:-1], heads.shape[-1] + 32), torch.nan).to(heads.dtype)
        wide[..., : heads.shape[-1]] = heads
        return wide[..., : heads.shape[-1]]
    return heads


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    rows=st.sampled_from([1, 2, 7, 63, 64, 65, 130, 200]),
    columns=st.sampled_from([32, 64, 96, 128, 256]),
    layout=st.sampled_from(["heads first", "rows first", "apart"]),
    size=st.sampled_from([0.1, 1.0, 8.0]),
    seed=ref.seeds,
)
def test_attend(
    isa: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    group: int,
    rows: int,
    columns: int,
    layout: str,
    size: float,
    seed: int,
) -> None:
    q = (size * randn(seed, batch, heads * group, 1, columns)).to(dtype)
    k = apart(randn(seed + 1, batch, heads, rows, columns, dtype=dtype), layout)
    v = apart(randn(seed + 2, batch, heads, rows, columns, dtype=dtype), layout)
    scale = columns**-0.5
    found = ops.attend(q, k, v, scale=scale)
    assert found.shape == q.shape
    q64, k64, v64 = (
        ref.as_float64(q),
        *(np.repeat(ref.as_float64(x), group, axis=1) for x in (k, v)),
    )
    scores = scale * (q64 @ k64.swapaxes(-1, -2))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = weights @ v64
    # Scores are sums of fp32; an error of a score is a relative one of its weight.
    of_scores = scale * (np.abs(q64) @ np.abs(k64).swapaxes(-1, -2)).max(-1, keepdims=True)
    relative = 2 * (columns + 4) * ref.UNIT_FP32 * of_scores + (rows + 64) * ref.UNIT_FP32
    bound = (weights @ np.abs(v64)) * relative * 2 + np.abs(expected) * ref.UNIT_ROUNDOFF[dtype]
    ref.assert_close(found, expected, 1.01 * bound + ref.SMALLEST_SUBNORMAL[dtype])


def test_attention_does_not_depend_on_threads(isa: str) -> None:
    q, k = randn(0, 2, 6, 1, 64).bfloat16(), randn(1, 2, 3, 150, 64).bfloat16()
    found = []
    for count in (1, 2, 5):
        with ref.threads(count):
            found.append(ops.attend(q, k, k, scale=0.1))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("rows", [3, 70])
def test_what_is_not_finite_is_seen(isa: str, rows: int) -> None:
    for value in (torch.nan, torch.inf):
        for changed in range(3):
            q, k, v = randn(0, 1, 2, 1, 64), randn(1, 1, 2, rows, 64), randn(2, 1, 2, rows, 64)
            k[k.abs() < 0.01] = 0.5
            (q, k, v)[changed][0, 0, -1, 5] = value
            out = ops.attend(q, k, v, scale=0.125)
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.125)
            assert not (out[0, 0].isfinite() & ~expected[0, 0].isfinite()).any()
            assert value == torch.inf or out[0, 0].isnan().any()
            assert out[0, 1].isfinite().all()


def test_scores_that_overflow(isa: str) -> None:
    """Below, they count for nothing, unless all do."""
    q, k, v = torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 130, 32), randn(0, 1, 1, 130, 32)
    q[..., 0], k[..., :100, 0] = 1e30, -1e30
    out = ops.attend(q, k, v, scale=1.0)
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, 100:].mean(0), rtol=1e-5, atol=1e-6)
    assert ops.attend(q, k[:, :, :70], v[:, :, :70], scale=1.0).isnan().all()


def test_large_scores(isa: str) -> None:
    """One key takes all, wherever it lies; sums of exponentials do not overflow."""
    for best in (0, 63, 64, 129):
        k, v = torch.zeros(1, 1, 130, 32), randn(0, 1, 1, 130, 32)
        k[0, 0, best, 0] = 1e4
        q = torch.zeros(1, 1, 1, 32)
        q[..., 0] = 1.0
        assert torch.equal(ops.attend(q, k, v, scale=1.0)[0, 0, 0], v[0, 0, best])


# ---------------------------------------------------------------------------------- a block's parts


def weight(
    seed: int,
    k: int,
    n: int,
    *,
    bits: int = 4,
    bias: bool = False,
    ranks: tuple[int, ...] = (),
    permuted: bool = False,
) -> ops.AdaptedWeight:
    quantized = ops.quantize_rtn(0.1 * randn(seed, n, k), bits=bits, group_size=32)
    layer = QuantLinear.from_canonical(
        ops.pack_qweight(quantized.codes, bits=bits),
        ops.pack_qzeros(quantized.zeros, bits=bits),
        quantized.scales,
        bits=bits,
        group_size=32,
        g_idx=shuffled(ops.trivial_g_idx(k, 32, torch.device("cpu")), seed) if permuted else None,
        bias=randn(seed + 1, n).bfloat16() if bias else None,
    )
    adapters = tuple(
        (0.1 * randn(seed + 2 * i, r, k), 0.1 * randn(seed + 1 + 2 * i, n, r), 0.5)
        for i, r in enumerate(ranks, 2)
    )
    found = layer.adapted_weight(adapters)
    assert found is not None and (found.order is not None) == permuted
    return found


def shuffled(g_idx: Tensor, seed: int) -> Tensor:
    """A group's columns apart from one another, as act-order leaves them."""
    return g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(seed))]


def product(x: Tensor, w: ops.AdaptedWeight) -> Tensor:
    ordered = x if w.order is None else x[..., w.order]
    y = ops.qgemm_nt(ordered, w.packed, w.scales, bits=w.bits, group_size=w.group_size, bias=w.bias)
    for a, b, scaling in w.adapters:
        y = ops.add_low_rank(y, x, a, b, scaling=scaling)
    return y


def norm(seed: int, width: int, dtype: torch.dtype) -> ops.Norm:
    return ops.Norm((1 + 0.3 * randn(seed, width)).to(dtype), EPS)


class _Exporter:
    """Makes the memory that it hands out, as a converting array would."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.tensor.clone().__dlpack__()


def test_arrays_live_as_long_as_the_call() -> None:
    packed, scales, bias, order, *form = weight(0, 64, 64, permuted=True)
    x, out = torch.ones(1, 64), [torch.empty(1, 64) for _ in range(3)]
    cos, sin = torch.ones(1, 64), torch.zeros(1, 64)
    found = []
    for wrap in (lambda tensor: tensor, _Exporter):
        own = (packed, wrap(scales), bias, wrap(order), *form)
        of_x = (wrap(torch.ones(1, 64)), EPS)
        _C.project_token(x, of_x, own, own, own, None, None, cos, sin, *out)
        found.append([item.clone() for item in out])
    for wanted, item in zip(*found, strict=True):
        assert torch.equal(wanted, item)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(
    batch=st.integers(1, 4),
    shared=st.booleans(),
    heads=st.sampled_from([(2, 1), (3, 3), (4, 2)]),
    width=st.sampled_from([64, 128]),
    size=st.sampled_from([96, 160]),
    bits=st.sampled_from(ref.BITS),
    bias=st.booleans(),
    ranks=st.sampled_from([(), (8,), (3, 16)]),
    permuted=st.booleans(),
    normed=st.booleans(),
    seed=ref.seeds,
)
def test_a_token_gets_what_the_operations_make_of_it(
    isa: str,
    dtype: torch.dtype,
    batch: int,
    shared: bool,
    heads: tuple[int, int],
    width: int,
    size: int,
    bits: int,
    bias: bool,
    ranks: tuple[int, ...],
    permuted: bool,
    normed: bool,
    seed: int,
) -> None:
    """Bit by bit, both halves of a block."""
    own, others = heads
    x = randn(seed, batch, 1, size, dtype=dtype)
    settings: dict[str, Any] = {"bits": bits, "bias": bias, "ranks": ranks, "permuted": permuted}
    q_proj, k_proj, v_proj = (
        weight(seed + 10 * i, size, n * width, **settings)
        for i, n in enumerate((own, others, others), 1)
    )
    q_norm, k_norm = (norm(seed + i, width, dtype) if normed else None for i in (5, 6))
    projections = ops.Projections(
        norm(seed + 7, size, dtype), q_proj, k_proj, v_proj, q_norm, k_norm
    )
    cos, sin = (randn(seed + i, 1 if shared else batch, 1, width, dtype=dtype) for i in (8, 9))

    def expected_of(w: ops.AdaptedWeight, of_heads: ops.Norm | None) -> Tensor:
        before = ops.rms_norm(x, projections.norm.weight, eps=EPS)
        y = product(before, w).view(batch, 1, -1, width)
        if of_heads is not None:
            y = ops.rms_norm(y, of_heads.weight, eps=EPS)
        return y.transpose(1, 2)

    with torch.no_grad():
        q, k, v = ops.project_token(x, projections, cos, sin)
        assert torch.equal(q, ops.rotate(expected_of(q_proj, q_norm), cos, sin))
        assert torch.equal(k, ops.rotate(expected_of(k_proj, k_norm), cos, sin))
        assert torch.equal(v, expected_of(v_proj, None))

        keys, values = (randn(seed + i, batch, others, 9, width, dtype=dtype) for i in (1, 2))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        rest = ops.RestOfBlock(
            weight(seed + 40, own * width, size, **settings),
            norm(seed + 3, size, dtype),
            weight(seed + 50, size, 192, **settings),
            weight(seed + 60, size, 192, **settings),
            weight(seed + 70, 192, size, **settings),
        )
        found = ops.finish_token(x, q, keys, values, 0.2, rest)
        attended = ops.attend(q, keys, values, scale=0.2).transpose(1, 2).flatten(2)
        h = x + product(attended, rest.o)
        n = ops.rms_norm(h, rest.norm.weight, eps=EPS)
        wanted = h + product(ops.swiglu(product(n, rest.gate), product(n, rest.up)), rest.down)
        assert torch.equal(found, wanted)


def parts(size: int = 64) -> tuple[ops.Projections, ops.RestOfBlock]:
    square = weight(1, size, size)
    own = norm(0, size, torch.float32)
    return (
        ops.Projections(own, square, square, square, None, None),
        ops.RestOfBlock(square, own, square, square, square),
    )


def project(x: Tensor, cos: Tensor, **changes: Any) -> Any:
    return ops.project_token(x, parts()[0]._replace(**changes), cos, cos)


def in_order(order: Any) -> Any:
    return project(ROW, TURN, q=parts()[0].q._replace(order=order))


def finish(
    x: Tensor, q: Tensor, keys: Tensor, values: Tensor, scale: float = 1.0, **changes: Any
) -> Any:
    return ops.finish_token(x, q, keys, values, scale, parts()[1]._replace(**changes))


ROW, TURN, HEAD = torch.ones(2, 1, 64), torch.ones(1, 1, 64), torch.ones(2, 1, 1, 64)
EIGHT = tuple(parts()[0].q)[:8]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: project(torch.ones(2, 2, 64), TURN), r"x: .*\[B, 1, K\]"),
        (lambda: project(ROW[0], TURN), "x: .*3 dimensions"),
        (lambda: project(ROW.half(), TURN), "weight: .*float16"),
        (lambda: project(ROW, torch.ones(1, 1, 32)), "cos: .*multiple of 64"),
        (lambda: project(ROW, torch.ones(3, 1, 64)), r"cos: .*\[1 or 2, 1, D\]"),
        (lambda: project(ROW, TURN.double()), "cos: .*float32"),
        (lambda: project(ROW, TURN, q=weight(1, 96, 64)), "x: .*96"),
        (lambda: project(ROW, TURN, q=parts()[0].q._replace(bits=5)), "bits: .*got 5"),
        (
            lambda: project(ROW, TURN, q=parts()[0].q._replace(packed=torch.ones(3))),
            "q_proj.packed",
        ),
        (lambda: finish(ROW, HEAD, HEAD, HEAD, up=EIGHT), "up_proj: .*9 fields, got 8"),
        (lambda: in_order(torch.arange(63).int()), "q_proj.order: .*64 elements"),
        (lambda: in_order(torch.arange(64)), "q_proj.order: .*int32, got int64"),
        (lambda: in_order(torch.arange(64).int() + 1), "order: .*from 0 to 63, got 64"),
        (lambda: in_order(torch.arange(64).int() - 1), "order: .*from 0 to 63, got -1"),
        (lambda: in_order([0]), "q_proj.order: .*a tensor, got list"),
        (lambda: project(ROW, TURN, k=parts()[0].k._replace(bits="4")), "k_proj: .*got str"),
        (lambda: project(ROW, TURN, k=parts()[0].k._replace(adapters=[])), "k_proj: .*got list"),
        (
            lambda: project(ROW, TURN, k=parts()[0].k._replace(adapters=((ROW, ROW),))),
            "k_proj's adapter: .*3 fields, got 2",
        ),
        (lambda: project(ROW, TURN, norm=(torch.ones(64),)), "norm: .*2 fields, got 1"),
        (lambda: project(ROW, TURN, k_norm=ops.Norm(torch.ones(32), EPS)), "norm: .*64 columns"),
        (
            lambda: project(
                ROW,
                TURN,
                v=parts()[0].v._replace(adapters=((torch.ones(4, 32), torch.ones(64, 4), 1.0),)),
            ),
            "a: .*64",
        ),
        (lambda: finish(ROW, HEAD, HEAD, HEAD[:1]), r"values: .*\[2, 1, 1, 64\]"),
        (lambda: finish(ROW, HEAD, HEAD[:, :, :0], HEAD[:, :, :0]), "keys: .*at least 1 row"),
        (lambda: finish(ROW, HEAD, HEAD.half(), HEAD.half()), "keys: .*float32"),
        (lambda: finish(ROW, HEAD, HEAD, HEAD, 0.0), "scale: .*above 0"),
        (lambda: finish(ROW, HEAD[:1], HEAD, HEAD), r"q: .*\[2, 64\], got \[1, 64\]"),
        (lambda: ops.attend(HEAD[..., :40], HEAD[..., :40], HEAD[..., :40], scale=1.0), "keys"),
        (lambda: ops.attend(HEAD, HEAD.repeat(1, 2, 1, 1), HEAD, scale=1.0), "keys: .*heads"),
        (lambda: ops.attend(ROW[None].transpose(1, 2), HEAD, HEAD, scale=1.0), r"q: .*1, D\]"),
    ],
)
def test_mistakes_are_named(call: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


# ------------------------------------------------------------------------------------------ models

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama-bias": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=8),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "qwen3-sliding": Qwen3Config(
        **SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
}


def quantized(
    name: str, dtype: torch.dtype = torch.bfloat16, permuted: bool = False
) -> PreTrainedModel:
    model = build_skeleton({**CONFIGS, "ernie": Ernie4_5Config(**SMALL)}[name], dtype)
    for i, (path, parameter) in enumerate(list(model.named_parameters())):
        parent, _, leaf = path.rpartition(".")
        value = 0.2 * randn(i, *parameter.shape) + (1.0 if leaf == "weight" else 0.0) * (
            parameter.dim() == 1
        )
        made = nn.Parameter(value.to(dtype), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, made)
    config = lbc.QuantConfig(group_size=32, method="rtn")
    model = lbc.quantize_model(model, None, None, config, progress=False).eval()
    if permuted:
        with_g_idx(model, shuffled)
    return model


def with_g_idx(model: PreTrainedModel, change: Callable[[Tensor, int], Tensor]) -> None:
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    for i, layer in enumerate(layers):
        found = layer.canonical()
        layer.set_canonical(**{**found, "g_idx": change(found["g_idx"], i)})


class Calls(list[str]):
    """Which calls of the core a model makes a token."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    for name in ("project_token", "finish_token"):
        original = getattr(ops, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            found.append(name)
            return original(*args)

        monkeypatch.setattr(ops, name, counted)
    return found


@torch.no_grad()
def steps(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    """Logits [B, T - 6] of tokens that come one at a time after a prompt of six."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :6], **{CACHE: cache}, use_cache=True)
    found = [
        model(input_ids=ids[:, i : i + 1], **{CACHE: cache}, use_cache=True, **more).logits
        for i in range(6, ids.shape[1])
    ]
    return torch.cat(found, 1)


# Named otherwise by versions of transformers before 5.24.
CACHE = (
    "cache"
    if "cache" in inspect.signature(inspect.unwrap(LlamaForCausalLM.forward)).parameters
    else "past_key_values"
)
IDS = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_says_the_same(
    name: str, dtype: torch.dtype, batch: int, permuted: bool, calls: Calls
) -> None:
    """In bfloat16 as nearly as its rounding lets two ways of computing agree: half as far from each
    other as either is from float32."""
    model = quantized(name, dtype, permuted)
    ids = IDS.repeat(batch, 1)
    ids[1:] = ids[1:].flip(1)
    found = steps(model, ids)
    # Windows that are full come with a mask.
    blocks = {"mistral-sliding": 2 * 1, "qwen3-sliding": 1 * 1 + 14}.get(name, 28)
    assert calls == ["project_token", "finish_token"] * blocks
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits[:, 6:]
        precise = quantized(name, torch.float32, permuted)
        exact = precise(input_ids=ids, use_cache=False).logits[:, 6:]
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    else:
        for ours, whole, right in zip(found.float(), wanted.float(), exact, strict=True):
            assert (ours - whole).norm() <= 0.5 * (whole - right).norm()


@pytest.mark.parametrize("permuted", [False, True])
def test_generated_text_is_the_same(
    permuted: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized("llama", torch.float32, permuted)
    settings: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    found = model.generate(IDS, **settings)
    assert len(calls) == 2 * 2 * 15
    monkeypatch.setattr(decode, "_parts", lambda *_: None)
    assert torch.equal(model.generate(IDS, **settings), found)
    assert len(calls) == 2 * 2 * 15


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("stacked", [1, 2])
def test_adapters(stacked: int, permuted: bool, calls: Calls) -> None:
    model = quantized("llama", torch.float32, permuted)
    for i in range(stacked):
        lbc.prepare_lora(model, rank=4, alpha=8.0, targets=None, dropout=0.1)
        for j, module in enumerate(model.modules()):
            if isinstance(module, LoraLinear):
                b: Any = module.adapters[i].b
                b.data = 0.1 * randn(j, *b.shape)
    model.eval()
    found = steps(model, IDS)
    assert len(calls) == 2 * 28
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_is_replaced_counts(calls: Calls) -> None:
    """Scales that are swapped, in place or not, and integers."""
    model = quantized("llama", torch.float32)
    before = steps(model, IDS)
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, QuantLinear)):
        if i % 3 == 0:
            layer.scales.data *= 1.3
        elif i % 3 == 1:
            layer.scales = nn.Parameter(layer.scales * 1.3, requires_grad=False)
        else:
            other = layer.canonical()
            layer.set_canonical(other["qweight"], other["qzeros"], other["scales"] * 1.3)
    after = steps(model, IDS)
    assert len(calls) == 2 * 2 * 28 and not torch.allclose(before, after, atol=0.01)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)


def hook(model: PreTrainedModel, path: str) -> list[Any]:
    seen: list[Any] = []
    model.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize(
    "path",
    ["self_attn", "self_attn.q_proj", "mlp", "mlp.down_proj", "input_layernorm"],
)
def test_hooks_are_called(path: str, calls: Calls) -> None:
    model = quantized("llama")
    seen = hook(model, f"model.layers.0.{path}")
    steps(model, IDS)
    assert len(seen) == 15 and len(calls) == 28  # of the other block


def test_states_and_attentions_are_reported(calls: Calls) -> None:
    """transformers' hooks stay from then on, and with them the long way."""
    model = quantized("llama", torch.float32)
    model.set_attn_implementation("eager")  # which alone has weights
    cache = DynamicCache(config=model.config)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        model(input_ids=IDS[:, :6], **{CACHE: cache}, use_cache=True)
        out = model(input_ids=IDS[:, 6:7], **{CACHE: cache}, use_cache=True, **asked)
        wanted = model(input_ids=IDS[:, :7], **asked)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    for states in ("hidden_states", "attentions"):
        for found, other in zip(out[states], wanted[states], strict=True):
            torch.testing.assert_close(found, other[..., -1:, :], rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("sdpa")
    steps(model, IDS)
    assert not calls


def train(model: PreTrainedModel) -> None:
    model.train()


def eager(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")


def own_forward(model: PreTrainedModel) -> None:
    """As accelerate's hooks have it."""
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            module.forward = module.forward


def wrapped(model: PreTrainedModel) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    for block in model.model.layers:
        block.self_attn = Wrapper(block.self_attn)


def subclassed(name: str) -> Any:
    def change(model: PreTrainedModel) -> None:
        for block in model.model.layers:
            module = getattr(block, name)
            module.__class__ = type("Own", (type(module),), {})

    return change


def dropping(model: PreTrainedModel) -> None:
    """As people have it who want to know how sure a model is."""
    lbc.prepare_lora(model, rank=4, dropout=0.5)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


def moved(model: PreTrainedModel) -> None:
    """Groups of other sizes, which no order of columns makes trivial."""
    with_g_idx(model, lambda g_idx, _: g_idx.clamp(min=1))


@pytest.mark.parametrize(
    "change",
    [
        train,
        eager,
        own_forward,
        wrapped,
        subclassed("self_attn"),
        subclassed("mlp"),
        subclassed("input_layernorm"),
        dropping,
        moved,
    ],
)
def test_what_is_different_takes_the_long_way(change: Any, calls: Calls) -> None:
    model = quantized("llama", torch.float32)
    change(model)
    steps(model, IDS)
    assert not calls


def test_what_is_asked_otherwise_takes_the_long_way(calls: Calls) -> None:
    model = quantized("llama", torch.float32)
    first, second = {"input_ids": IDS[:, :6]}, {"input_ids": IDS[:, 6:7]}

    def two(no_grad: bool = True, **more: Any) -> None:
        cache = DynamicCache(config=model.config)
        with torch.set_grad_enabled(not no_grad):
            model(**first, **{CACHE: cache}, use_cache=True)
            model(**second, **{CACHE: cache}, use_cache=True, **more)

    two()
    assert len(calls) == 4
    calls.clear()
    with torch.no_grad():
        model(input_ids=IDS[:, :1], use_cache=False)
        model(input_ids=IDS)
    two(no_grad=False)
    two(attention_mask=torch.tensor([[0] + 6 * [1]]))
    with torch.autocast("cpu"):
        two()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    two()
    handle.remove()
    block = model.model.layers[0]
    cache = DynamicCache(config=model.config)
    turn = torch.ones(1, 1, 64)
    for extra in ({"wanted": 1}, {"position_embeddings": (turn.half(), turn.half())}):
        given = {"position_embeddings": (turn, turn), CACHE: cache, **extra}
        with torch.no_grad():
            block(randn(0, 1, 1, 64), **given)
    assert not calls


def test_inputs_as_they_lie(calls: Calls) -> None:
    model = quantized("llama", torch.float32)
    block = model.model.layers[0]
    wide = randn(0, 3, 1, 128)
    turn = randn(1, 1, 1, 128)
    with torch.no_grad():
        for x, table in (
            (wide[..., ::2], turn[..., ::2]),
            (wide[:1, :, :64].expand(3, 1, 64), turn[..., 64:]),
        ):
            found, wanted = (
                block(a, position_embeddings=(b, b), **{CACHE: DynamicCache(config=model.config)})
                for a, b in ((x, table), (x.contiguous(), table.contiguous()))
            )
            assert torch.equal(found, wanted)
    assert len(calls) == 8


class Turned(DynamicCache):
    """Keys and values whose columns are not what lies together."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        found = super().update(*args, **kwargs)
        return tuple(x.mT.contiguous().mT for x in found)


def test_caches_as_they_lie(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("llama", torch.float32)
    wanted = steps(model, IDS)
    monkeypatch.setitem(globals(), "DynamicCache", Turned)
    torch.testing.assert_close(steps(model, IDS), wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * 2 * 28


def test_what_computes_otherwise_is_left_alone(calls: Calls) -> None:
    gemma = build_skeleton(GemmaConfig(**SMALL), torch.float32)
    assert not any(
        getattr(type(module), "made_by", None) is decode._in_two_calls for module in gemma.modules()
    )
    # Attention and MLP are written as LLaMA's; its positions turn pairs that lie together.
    ernie = quantized("ernie", torch.float32)
    with torch.no_grad():
        wanted = ernie(input_ids=IDS, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(steps(ernie, IDS), wanted, rtol=1e-4, atol=1e-4)
    assert not calls
    model = quantized("llama", torch.float32)
    block: Any = model.model.layers[0]
    dense = nn.Linear(64, 96, bias=False)
    dense.weight.data = block.mlp.up_proj.dequantize()
    block.mlp.up_proj = dense
    steps(model, IDS)
    assert len(calls) == 28  # of the other block


def test_blocks_can_be_copied(calls: Calls) -> None:
    model = quantized("qwen3", torch.float32)
    wanted = steps(model, IDS)
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(steps(copy, IDS), wanted) and len(calls) == 2 * 28
        assert list(map(type, copy.modules())) == list(map(type, model.modules()))
    assert type(model.model.layers[0]).__name__ == "Qwen3DecoderLayer"
    block = model.model.layers[0]
    block.__class__ = Own = type("Own", (type(block),), {})
    assert type(deepcopy(block)) is Own

"""Causal attention against a float64 oracle, and models that compute through it.

The oracle's bounds follow the roundings that the operation promises: scores, softmax and sums in
fp32, results rounded once; of bf16 on tiles, probabilities and the gradients of scores rounded to
bf16 as operands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.library import opcheck
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV32Config,
    FalconConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

import lowbitcore as lbc
import reference as ref
from lowbitcore import _C, ops, runtime
from lowbitcore.skeleton import build_skeleton
from lowbitcore.training import set_checkpointing

F64 = NDArray[np.float64]

TILES = ("amx", "amx_emulated")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Those that models take it on.
LEVELS = [name for name in runtime.available_isas() if name != "scalar"]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with ref.forced_isa(request.param):
        yield request.param


# -------------------------------------------------------------------------------------- the oracle


class Case(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    scale: float


class Expected(NamedTuple):
    """Each with its elementwise tolerance."""

    out: tuple[F64, F64]
    lse: tuple[F64, F64]
    dq: tuple[F64, F64]
    dk: tuple[F64, F64]
    dv: tuple[F64, F64]


LAYOUTS = ("heads first", "rows first", "fused", "columns apart")


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """[B, H, T, D] with the given strides; what lies between is NaN."""
    b, h, t, d = values.shape
    if layout == "rows first":  # what a projection leaves
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":  # a part of what one projection of q, k and v leaves
        wide = torch.full((b, t, h + 2, d + 3), torch.nan, dtype=values.dtype)
        wide[:, :, 1:-1, 2:-1] = values.transpose(1, 2)
        return wide[:, :, 1:-1, 2:-1].transpose(1, 2)
    if layout == "columns apart":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    return values


def make_case(
    *,
    batch: int = 1,
    groups: int = 1,
    group: int = 1,
    rows: int = 40,
    cols: int = 32,
    largest: float = 4.0,
    layout: str = "rows first",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Case:
    """Random heads whose scores reach about `largest`."""
    rng = np.random.default_rng(seed)

    def heads(count: int, size: float = 1.0) -> torch.Tensor:
        values = size * rng.standard_normal((batch, count, rows, cols))
        return laid_out(torch.from_numpy(values).to(dtype), layout)

    return Case(
        heads(groups * group, largest / 4),
        heads(groups),
        heads(groups),
        heads(groups * group),
        cols**-0.5,
    )


def expect(case: Case, isa: str) -> Expected:
    q, k, v, g = (ref.as_float64(x) for x in case[:4])
    unit = ref.UNIT_ROUNDOFF[case.q.dtype]
    operand = unit if isa in TILES and case.q.dtype == torch.bfloat16 else 0.0
    smallest = 1e-30 + ref.SMALLEST_SUBNORMAL[case.q.dtype]
    scale = float(np.float32(case.scale))
    group, (rows, cols) = q.shape[1] // k.shape[1], q.shape[2:]
    k_all, v_all = (np.repeat(x, group, axis=1) for x in (k, v))

    def products(a: F64, b: F64) -> F64:
        return np.einsum("bhid,bhjd->bhij", a, b)

    def over_keys(p: F64, x: F64) -> F64:
        return np.einsum("bhij,bhjd->bhid", p, x)

    def over_queries(p: F64, x: F64) -> F64:
        full = np.einsum("bhij,bhid->bhjd", p, x)
        return full.reshape(full.shape[0], -1, group, rows, cols).sum(2)

    seen = np.tril(np.ones((rows, rows), dtype=bool))
    scores = np.where(seen, scale * products(q, k_all), -np.inf)
    top = scores.max(-1, keepdims=True)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    p = np.exp(scores - top) / total
    lse = (top + np.log(total))[..., 0]

    # A score is off by its sum's error and a few roundings of what enters the exponential. A
    # probability is off by twice the row's worst score, and a few roundings of its own.
    size = np.where(seen, scale * products(np.abs(q), np.abs(k_all)), 0.0)
    worst = (ref.gamma(cols + 8) * size).max(-1, keepdims=True)
    worst = worst + 4 * ref.UNIT_FP32 * np.abs(lse)[..., None]
    off = np.expm1(2 * worst + ref.gamma(rows + 16))

    def result(value: F64, tolerance: F64) -> tuple[F64, F64]:
        return value, tolerance + 1.01 * unit * np.abs(value) + smallest

    out = over_keys(p, v_all)
    rounded = off + 1.01 * operand
    summed = ref.gamma(rows * group + 4)
    out_off = over_keys(p * (rounded + summed), np.abs(v_all))
    expected_out = result(out, out_off)

    dp = np.where(seen, products(g, v_all), 0.0)
    dp_off = ref.gamma(cols + 4) * np.where(seen, products(np.abs(g), np.abs(v_all)), 0.0)
    delta = (g * out).sum(-1, keepdims=True)
    # The backward is given the forward's result, rounded.
    delta_off = (np.abs(g) * (expected_out[1] + ref.gamma(cols + 4) * np.abs(out))).sum(
        -1, keepdims=True
    )
    ds = p * (dp - delta)
    ds_off = p * (1 + off) * (dp_off + delta_off) + (rounded + 4 * ref.UNIT_FP32) * np.abs(ds)
    ds_off = ds_off + summed * np.abs(ds)
    return Expected(
        expected_out,
        (lse, worst[..., 0] + ref.gamma(rows + 16) + 4 * ref.UNIT_FP32 * np.abs(lse)),
        result(scale * over_keys(ds, k_all), scale * over_keys(ds_off, np.abs(k_all))),
        result(scale * over_queries(ds, q), scale * over_queries(ds_off, np.abs(q))),
        result(over_queries(p, g), over_queries(p * (rounded + summed), np.abs(g))),
    )


def check(case: Case, isa: str) -> None:
    expected = expect(case, isa)
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    out = ops.attention(*leaves, scale=case.scale)
    assert out.dtype == case.q.dtype
    assert out.transpose(1, 2).is_contiguous()
    ref.assert_close(out, *expected.out)
    lse = torch.ops.lowbitcore.attention(*case[:3], case.scale)[1]
    ref.assert_close(lse, *expected.lse)
    for got, want in zip(torch.autograd.grad(out, leaves, case.d_out), expected[2:], strict=True):
        assert got.dtype == case.q.dtype
        ref.assert_close(got, *want)


# ------------------------------------------------------------------------------ against the oracle


@pytest.mark.usefixtures("poisoned_outputs")
@given(data=st.data())
def test_any_shape(isa: str, data: st.DataObject) -> None:
    check(
        make_case(
            batch=data.draw(st.integers(1, 2)),
            groups=data.draw(st.integers(1, 2)),
            group=data.draw(st.integers(1, 3)),
            rows=data.draw(st.sampled_from((1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 100, 129, 200))),
            cols=data.draw(st.sampled_from((32, 64, 96, 128))),
            largest=data.draw(st.sampled_from((1e-3, 4.0, 100.0))),
            layout=data.draw(st.sampled_from(LAYOUTS)),
            dtype=data.draw(st.sampled_from(DTYPES)),
            seed=data.draw(ref.seeds),
        ),
        isa,
    )


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 32), (33, 64), (70, 256), (545, 32), (1030, 32)], ids=str
)
@pytest.mark.parametrize("largest", [4.0, 100.0])
def test_shapes(isa: str, rows: int, cols: int, largest: float) -> None:
    """More rows than one look at the maximum takes, and than the backward takes at once."""
    check(make_case(groups=1, group=2, rows=rows, cols=cols, largest=largest), isa)


@pytest.mark.usefixtures("poisoned_outputs")
def test_no_rows_no_heads(isa: str) -> None:
    for shape in ((0, 2, 4, 32), (1, 2, 0, 32)):
        q = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
        out = ops.attention(q, q, q)
        assert out.shape == shape
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert grad.shape == shape


def test_one_key_is_all(isa: str) -> None:
    """The first query sees one key, whatever the score."""
    case = make_case(rows=35, largest=1e6)
    out = ops.attention(*case[:3], scale=1.0)
    assert torch.equal(out[:, :, 0], case.v[:, :, 0])
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [32, 128])
def test_huge_scores(isa: str, dtype: torch.dtype, cols: int) -> None:
    """However large a row's largest score, its exponential is 1. By a factor that is no power of
    two, which rounds."""
    size = 2e4 if dtype == torch.float16 else 1e5
    alike = torch.full((1, 1, 3, cols), size, dtype=dtype)
    values = torch.randn(1, 1, 3, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
    means = values.float().cumsum(2) / torch.tensor([1.0, 2.0, 3.0])[:, None]
    found = ops.attention(alike, alike, values).float()
    off = {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found, means, rtol=off, atol=off)
    case = make_case(rows=200, cols=cols, dtype=dtype, layout="heads first")
    leaves = [(x * size).requires_grad_() for x in (case.q.clamp(-3, 3), case.k.clamp(-3, 3))]
    leaves.append(case.v.detach().requires_grad_())
    out = ops.attention(*leaves)
    assert (out.abs() <= case.v.abs().amax(2, keepdim=True)).all()
    if dtype != torch.float16:  # whose largest number gradients pass
        for gradient in torch.autograd.grad(out, leaves, case.d_out):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_that_overflow(isa: str, dtype: torch.dtype) -> None:
    """Of keys whose scores are -inf nothing is left to those that see others, too; who sees no
    others has nothing."""
    case = make_case(rows=300, dtype=dtype)
    q, k = case.q.abs() * 1e3 + 1, case.k.clone()
    k[:, :, :140] = -1e38
    out = ops.attention(q, k, case.v)
    alone = ops.attention(*(x[:, :, 140:] for x in (q, k, case.v)))
    off = {torch.float32: 1e-5, torch.bfloat16: 0.01}[dtype]
    torch.testing.assert_close(out[:, :, 140:], alone, rtol=off, atol=off)
    assert out[:, :, :140].isnan().all()


def test_nan_stays_where_it_is_seen(isa: str) -> None:
    case = make_case(rows=100)
    q = case.q.clone()
    q[0, 0, 50, 3] = torch.nan
    out = ops.attention(q, case.k, case.v)
    assert out[0, 0, 50].isnan().all()
    out[0, 0, 50] = 0.0
    assert out.isfinite().all()


def test_expanded_gradient(isa: str) -> None:
    """What `sum` sends back has no strides at all."""
    case = make_case()
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    ones = torch.ones_like(case.q)
    expected = torch.autograd.grad(ops.attention(*leaves), leaves, ones)
    for got, want in zip(
        torch.autograd.grad(ops.attention(*leaves).sum(), leaves), expected, strict=True
    ):
        assert torch.equal(got, want)


def test_threads_change_nothing(isa: str) -> None:
    case = make_case(batch=2, groups=2, group=3, rows=150, cols=64)

    def run(count: int) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in case[:3]]
        with ref.threads(count):
            out = ops.attention(*leaves)
            return [out, *torch.autograd.grad(out, leaves, case.d_out)]

    one = run(1)
    for count in (2, 3):
        for got, want in zip(run(count), one, strict=True):
            assert torch.equal(got, want)


# --------------------------------------------------------------------------------- the operator


def test_opcheck(isa: str) -> None:
    case = make_case(group=2, rows=20)
    lib = torch.ops.lowbitcore
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    opcheck(lib.attention.default, (*leaves, case.scale))
    out, lse = lib.attention(*case[:3], case.scale)
    opcheck(lib.attention_backward.default, (case.d_out, *case[:3], out, lse, case.scale))


def test_watched_or_not(isa: str) -> None:
    """Without gradients the call does not go through torch's dispatcher."""
    case = make_case()
    with torch.no_grad():
        plain = ops.attention(*case[:3])
    assert torch.equal(plain, ops.attention(*case[:3]))


def test_caller_errors(isa: str) -> None:
    q, k, v = make_case(groups=2, group=2, rows=8)[:3]
    wrong = {
        "q: expected float32, bfloat16 or float16, got float64": (q.double(), k, v),
        r"k: expected the type of q \(float32\), got bfloat16": (q.float(), k, v),
        "q: expected 4 dimensions": (q[0], k, v),
        r"q: expected a positive multiple of 32 columns, at most 256, got 24": (
            q[..., :24],
            k[..., :24],
            v[..., :24],
        ),
        r"k: expected shape \[1, 2, 8, 32\], got \[1, 2, 7, 32\]": (q, k[:, :, 1:], v),
        r"v: expected shape \[1, 2, 8, 32\], got \[1, 1, 8, 32\]": (q, k, v[:, 1:]),
        "k: expected a number of heads that divides q's 3, got 2": (q[:, 1:], k, v),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=f"attention: {message}"):
            ops.attention(*arguments)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="attention: scale: expected a number above 0"):
            ops.attention(q, k, v, scale=scale)


# ------------------------------------------------------------------------------------------- models

SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 96, (2, 45), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all calls of `ops.attention` from now on."""
    shapes = []
    original = ops.attention

    def counted(q: torch.Tensor, *rest: torch.Tensor, **kwargs: float | None) -> torch.Tensor:
        shapes.append(tuple(q.shape))
        return original(q, *rest, **kwargs)

    monkeypatch.setattr(ops, "attention", counted)
    return shapes


def loaded(directory: Path, config: LlamaConfig | Qwen3Config | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES), dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return lbc.load(directory)


def logits_and_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": output.logits.detach(), **found}


def test_model_agrees_with_torch(level: str, tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    """As close to a model in fp32 as torch's own attention is, but for half as much again."""
    model = loaded(tmp_path)
    ours = logits_and_gradients(model)
    assert calls == [(2, 4, 45, 32)] * 2
    theirs = deepcopy(model)
    theirs.set_attn_implementation("sdpa")
    sdpa = logits_and_gradients(theirs)
    exact = logits_and_gradients(theirs.float())
    assert len(calls) == 2
    for name, want in exact.items():
        limit = 1.5 * (sdpa[name].float() - want).norm() + 1e-3 * want.norm()
        assert (ours[name].float() - want).norm() <= limit, name


def test_what_is_left_to_torch(level: str, tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    """Padding, a window narrower than the rows: bit for bit as sdpa."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    padding = torch.ones_like(IDS)
    padding[0, :5] = 0
    cases = [
        (loaded(tmp_path / "a"), {"attention_mask": padding}, 0),
        (loaded(tmp_path / "b", Qwen3Config(**SIZES, **window)), {}, 1),
    ]
    with torch.no_grad():
        for model, kwargs, expected in cases:
            del calls[:]
            ours = model(input_ids=IDS, use_cache=False, **kwargs).logits
            assert len(calls) == expected
            if expected == 0:
                model.set_attn_implementation("sdpa")
                assert torch.equal(ours, model(input_ids=IDS, use_cache=False, **kwargs).logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_ours(
    level: str, dtype: torch.dtype, tmp_path: Path, calls: list[tuple[int, ...]]
) -> None:
    model = loaded(tmp_path).to(dtype)
    with torch.no_grad():
        assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()
    assert calls == [(2, 4, 45, 32)] * 2


def test_the_scalar_level_leaves_it_to_torch(tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    with ref.forced_isa("scalar"):
        logits_and_gradients(loaded(tmp_path))
    assert calls == []


def test_transforms_of_torch(level: str, tmp_path: Path) -> None:
    """Which know nothing of our operators, are left torch's own."""
    model = loaded(tmp_path).float()
    parameters = {name: item.detach() for name, item in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        call = {"input_ids": IDS, "labels": IDS, "use_cache": False}
        return torch.func.functional_call(model, parameters, kwargs=call).loss

    expected = logits_and_gradients(model)
    for name, got in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-3, atol=1e-5)


def test_generates(level: str, tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    """The prompt goes through ours, a token at a time through torch's."""
    model = loaded(tmp_path)
    model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert calls == [(2, 4, 45, 32)] * 2


@pytest.mark.parametrize(("kind", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_checkpoints_keep_it(
    level: str, kind: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tmp_path).train()
    expected = logits_and_gradients(model)
    calls = []
    original = _C.attention
    monkeypatch.setattr(_C, "attention", lambda *given: calls.append(original(*given)))
    set_checkpointing(model, kind)
    for name, got in logits_and_gradients(model).items():
        assert torch.equal(got, expected[name]), name
    assert len(calls) == times * SIZES["num_hidden_layers"]


def test_other_choices_stay() -> None:
    eager = LlamaConfig(**SIZES)
    eager._attn_implementation = "eager"
    assert build_skeleton(eager, torch.bfloat16).config._attn_implementation == "eager"
    # The code of these calls torch's attention itself, or asks for it by name.
    small = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    for config in (FalconConfig(**small), DeepseekV32Config(**small)):
        assert build_skeleton(config, torch.bfloat16).config._attn_implementation == "sdpa"


def test_name_is_not_saved(tmp_path: Path) -> None:
    model = loaded(tmp_path / "dense")
    assert model.config._attn_implementation == "lowbitcore"
    model.save_pretrained(tmp_path / "theirs")
    config = lbc.QuantConfig(bits=4, group_size=32)
    quantized = lbc.quantize_model(model, None, IDS, config, progress=False)
    lbc.save(quantized, tmp_path / "ours")
    for name in ("theirs", "ours"):
        saved = json.loads((tmp_path / name / "config.json").read_text())
        saved.pop("quantization_config", None)
        assert "attn_implementation" not in json.dumps(saved)
        assert "lowbitcore" not in json.dumps(saved)
        assert AutoConfig.from_pretrained(tmp_path / name)._attn_implementation is None

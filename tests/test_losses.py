"""Losses of logits and their gradients against a float64 oracle, and torch's way beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import reference as ref
from lowbitcore import losses, ops

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make(seed: int, rows: int, columns: int, dtype: torch.dtype, size: float, layout: str) -> Case:
    rng = np.random.default_rng(seed)
    own, other = (
        ref.random_activations(seed + i, rows, columns, dtype, layout=layout).mul_(size)
        for i in range(2)
    )
    return own, other, torch.from_numpy(rng.integers(0, columns, rows))


def log_softmax(x: ref.F64) -> ref.F64:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


draws = {
    "rows": st.sampled_from([0, 1, 3, 17]),
    "columns": ref.sizes,
    "size": st.sampled_from([0.1, 3.0, 30.0]),
    "layout": st.sampled_from(ref.LAYOUTS),
    "seed": ref.seeds,
}


def check(
    found: tuple[torch.Tensor, torch.Tensor | None],
    logits: torch.Tensor,
    expected: ref.F64,
    gradient: ref.F64,
    lambdas: float,
) -> None:
    values, grads = found
    assert grads is not None and grads.dtype == logits.dtype
    # What is exponentiated is off by fp32's rounding of the largest logit.
    top = np.abs(ref.as_float64(logits)).max(initial=1.0)
    off = 256 * ref.UNIT_FP32 * top * lambdas
    ref.assert_close(values, expected, off * (1 + np.abs(expected)))
    rounded = 1.01 * ref.UNIT_ROUNDOFF[logits.dtype] * np.abs(gradient)
    ref.assert_close(grads, gradient, rounded + off * (1 + np.abs(expected))[:, None])


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(**draws)
def test_cross_entropy(
    isa: str, dtype: torch.dtype, rows: int, columns: int, size: float, layout: str, seed: int
) -> None:
    logits, _, targets = make(seed, rows, columns, dtype, size, layout)
    log_p = log_softmax(ref.as_float64(logits)) if rows else np.zeros((0, columns))
    at = np.arange(rows), targets.numpy()
    gradient = np.exp(log_p)
    gradient[at] -= 1
    check(ops.token_losses(logits, targets), logits, -log_p[at], gradient, 1.0)
    alone, nothing = ops.token_losses(logits, targets, differentiate=False)
    assert nothing is None and torch.equal(alone, ops.token_losses(logits, targets)[0])


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(**draws, lambdas=st.sampled_from([(1.0, 0.0), (1.0, 0.1), (0.0, 1.0), (0.5, 2.0)]))
def test_distillation(
    isa: str,
    dtype: torch.dtype,
    reverse: bool,
    rows: int,
    columns: int,
    size: float,
    layout: str,
    seed: int,
    lambdas: tuple[float, float],
) -> None:
    logits, teacher, targets = make(seed, rows, columns, dtype, size, layout)
    if not rows:
        return
    kl, ce = lambdas
    log_p, log_t = (log_softmax(ref.as_float64(x)) for x in (logits, teacher))
    p, p_t, at = np.exp(log_p), np.exp(log_t), (np.arange(rows), targets.numpy())
    apart = log_p - log_t
    divergence = (p * apart).sum(-1) if reverse else -(p_t * apart).sum(-1)
    gradient = kl * (p * (apart - divergence[:, None]) if reverse else p - p_t) + ce * p
    gradient[at] -= ce
    found = ops.token_losses(
        logits, targets, lambda_ce=ce, teacher=teacher, lambda_kl=kl, reverse=reverse
    )
    check(found, logits, kl * divergence - ce * log_p[at], gradient, kl + ce)


@pytest.mark.parametrize("masked", [torch.finfo(torch.bfloat16).min, -torch.inf])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_logits_count_for_nothing(
    isa: str, dtype: torch.dtype, reverse: bool, masked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that a model never says: in both, or (where KL is finite then) in one of them."""
    logits, teacher, targets = make(10, 6, 96, dtype, 3.0, "contiguous")
    logits, teacher, targets = logits.clone(), teacher.clone(), targets.clamp(max=80)
    logits[:3, 90:] = masked
    teacher[:3, 90:] = masked
    (logits if reverse else teacher)[3:, 85:93] = masked
    log_p, log_t = (log_softmax(ref.as_float64(x)) for x in (logits, teacher))
    p, p_t = np.exp(log_p), np.exp(log_t)
    weight = p if reverse else p_t
    with np.errstate(invalid="ignore"):
        apart = np.where(weight > 0, log_p - log_t, 0.0)
    divergence = (weight * apart).sum(-1) * (1 if reverse else -1)
    gradient = p * (apart - divergence[:, None]) if reverse else p - p_t
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    values, found = ops.token_losses(
        logits, targets, lambda_ce=0.0, teacher=teacher, lambda_kl=1.0, reverse=reverse
    )
    assert found is not None
    ref.assert_close(values, divergence, np.full(6, 1e-4))
    ref.assert_close(found, gradient, np.full(gradient.shape, bound))
    monkeypatch.setattr(ops, "serves", lambda *tensors: False)
    value, found = losses.distillation(
        logits,
        teacher,
        targets,
        lambda_kl=1.0,
        lambda_ce=0.0,
        kl="reverse" if reverse else "forward",
    )
    assert abs(float(value) - divergence.sum()) < 1e-3
    ref.assert_close(found, gradient, np.full(gradient.shape, bound))


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_torchs_way_is_the_same(kl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of other devices and of a vocabulary that is no multiple of 32."""
    logits, teacher, targets = make(5, 40, 320, torch.float32, 3.0, "contiguous")

    def all_of_them() -> list[Any]:
        weights: dict[str, Any] = {"lambda_kl": 1.0, "lambda_ce": 0.1, "kl": kl}
        return [
            *losses.cross_entropy(logits, targets),
            *losses.distillation(logits, teacher, targets, **weights),
            losses.negative_log_likelihood(logits, targets),
        ]

    ours = all_of_them()
    monkeypatch.setattr(ops, "serves", lambda *tensors: False)
    for found, wanted in zip(ours, all_of_them(), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_any_vocabulary() -> None:
    logits, _, targets = make(6, 9, 50, torch.float32, 1.0, "contiguous")
    value, gradient = losses.cross_entropy(logits, targets)
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(value, wanted)
    assert gradient.shape == logits.shape


def test_nan_is_seen(isa: str) -> None:
    logits, teacher, targets = make(7, 4, 96, torch.float32, 1.0, "contiguous")
    for spoiled in (logits, teacher):
        for column in (0, 40, 95):
            before = spoiled[2, column].clone()
            spoiled[2, column] = torch.nan
            for reverse in (False, True):
                values, gradient = ops.token_losses(
                    logits, targets, teacher=teacher, lambda_kl=1.0, reverse=reverse
                )
                assert gradient is not None
                assert values.isnan().tolist() == [False, False, True, False]
                assert gradient[2].isnan().any() and gradient[[0, 1, 3]].isfinite().all()
            spoiled[2, column] = before


def test_they_do_not_depend_on_threads(isa: str) -> None:
    logits, teacher, targets = make(8, 30, 160, torch.bfloat16, 2.0, "contiguous")
    found = []
    for count in (1, 2, 5):
        with ref.threads(count):
            found.append(ops.token_losses(logits, targets, teacher=teacher, lambda_kl=1.0))
    for values, gradient in found[1:]:
        assert torch.equal(values, found[0][0]) and torch.equal(gradient, found[0][1])


def test_the_operator_is_what_torch_expects() -> None:
    logits, teacher, targets = make(9, 5, 64, torch.float32, 1.0, "contiguous")
    operator = torch.ops.lowbitcore.token_losses.default
    opcheck(operator, (logits, targets, 1.0, teacher, 0.5, False, True))
    opcheck(operator, (logits, targets, 1.0, None, 0.0, False, False))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, t: ops.token_losses(x[:, :33], t), "logits: .* multiple of 32"),
        (lambda x, t: ops.token_losses(x, t[:2]), "targets: .*, got"),
        (lambda x, t: ops.token_losses(x, t + 64), "targets: .* 0 to 63, got"),
        (lambda x, t: ops.token_losses(x, t - 64), "targets: .* 0 to 63, got -"),
        (lambda x, t: ops.token_losses(x, t.int()), "targets: .*int64, got int32"),
        (lambda x, t: ops.token_losses(x, t, teacher=x[:2]), "teacher: .*, got"),
        (lambda x, t: ops.token_losses(x, t, teacher=x.half()), "teacher: .*float32"),
        (
            lambda x, t: ops.token_losses(x, t, lambda_ce=float("nan")),
            "lambda_ce: expected a number, got nan",
        ),
        (lambda x, t: ops.token_losses(x[0], t), "logits: .*2 dimensions"),
    ],
)
def test_mistakes_are_named(call: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(torch.randn(3, 64), torch.tensor([0, 5, 63]))

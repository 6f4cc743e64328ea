"""Cross-entropy and distillation, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import as_rows, check, check_dims, contiguous, result_rows
from lowbitcore.ops.operators import define, fake


def token_losses(
    logits: Tensor,
    targets: Tensor,
    *,
    lambda_ce: float = 1.0,
    teacher: Tensor | None = None,
    lambda_kl: float = 0.0,
    reverse: bool = False,
    differentiate: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``lambda_kl KL + lambda_ce CE`` of each token (arXiv 2306.08162, equations 2 and 3), and its
    gradient in the logits; on the CPU.

    Args:
        logits: float32, bfloat16 or float16 [t, V], V a multiple of 32, any strides.
        targets: int64 [t], from 0 to V - 1.
        teacher: the teacher's logits, as the student's; None: no KL.
        reverse: KL(student, teacher) in place of KL(teacher, student).

    Returns:
        Losses float32 [t], and unless ``differentiate`` is false the gradient of their sum, of the
        type of ``logits``. Between them all is float32. What comes out is not differentiable.
    """
    check("token_losses", logits=logits, targets=targets, teacher=teacher)
    check_dims("token_losses", "logits", logits, 2)
    losses, gradient = torch.ops.lowbitcore.token_losses(
        logits.detach(), targets, lambda_ce, teacher, lambda_kl, reverse, differentiate
    )
    return losses, gradient if differentiate else None


@define(
    "token_losses(Tensor logits, Tensor targets, float lambda_ce, Tensor? teacher, float lambda_kl,"
    " bool reverse, bool differentiate) -> (Tensor, Tensor)"
)
def _(
    logits: Tensor,
    targets: Tensor,
    lambda_ce: float,
    teacher: Tensor | None,
    lambda_kl: float,
    reverse: bool,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    losses, gradient = _token_losses_fake(logits, targets, differentiate)
    _C.token_losses(
        as_rows(logits),
        contiguous(targets),
        lambda_ce,
        None if teacher is None else as_rows(teacher),
        lambda_kl,
        reverse,
        losses,
        result_rows(gradient) if differentiate else None,
    )
    return losses, gradient


@fake("token_losses")
def _token_losses_fake(logits: Tensor, targets: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    *_, differentiate = terms
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    return losses, logits.new_empty(logits.shape if differentiate else 0)

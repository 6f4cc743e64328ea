"""Losses of logits, summed over tokens, with their gradients in closed form.

Logits [t, vocabulary] come in the type of the model's head, and so do gradients; all between is
float32. On the CPU that is the core's work; elsewhere, and for a vocabulary that is no multiple of
32, torch's, a few rows at a time on the CPU, which its cache can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lowbitcore import ops

Direction = Literal["forward", "reverse"]

# Elements of one intermediate tensor for each thread: 512 KB.
_CACHED_ELEMENTS = 1 << 17


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed -log p(target), float64, without a gradient."""
    if ops.serves(logits):
        losses, _ = ops.token_losses(logits, targets, differentiate=False)
        return losses.double().sum()
    size = _rows_at_once(logits)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, wanted in zip(logits.split(size), targets.split(size), strict=True):
        total += torch.nn.functional.cross_entropy(part.float(), wanted, reduction="sum")
    return total


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed -log p(target), the loss of EMEF and PEQA, and its gradient in the logits."""
    if ops.serves(logits):
        return _summed(ops.token_losses(logits, targets))

    def kernel(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(-1, dtype=torch.float32)
        loss = -log_p.gather(1, targets[:, None]).sum()
        gradient = log_p.exp_()
        gradient[_indices(targets)] -= 1
        return loss, gradient

    return _by_rows(kernel, logits, targets)


def distillation(
    logits: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    lambda_kl: float,
    lambda_ce: float,
    kl: Direction,
) -> tuple[Tensor, Tensor]:
    """lambda_kl KL + lambda_ce CE (INT2.1, 2306.08162, equations 2 and 3) summed over tokens, and
    its gradient in the student's `logits`; `teacher` are the teacher's."""
    if ops.serves(logits) and teacher.dtype == logits.dtype:
        return _summed(
            ops.token_losses(
                logits,
                targets,
                lambda_ce=lambda_ce,
                teacher=teacher,
                lambda_kl=lambda_kl,
                reverse=kl == "reverse",
            )
        )

    def kernel(logits: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_s = logits.log_softmax(-1, dtype=torch.float32)
        log_t = teacher.log_softmax(-1, dtype=torch.float32)
        scored = _indices(targets)
        loss = -lambda_ce * log_s[scored].sum()
        p_s = log_s.exp()
        if kl == "forward":  # sum of p_t (log p_t - log p_s); its gradient is p_s - p_t
            p_t = log_t.exp()
            ratio = log_t.sub_(log_s).masked_fill_(p_t == 0, 0)  # -inf there, where it is masked
            loss = loss + lambda_kl * torch.sum(p_t * ratio)
            gradient = p_s.mul_(lambda_kl + lambda_ce).sub_(p_t, alpha=lambda_kl)
        else:  # sum of p_s (log p_s - log p_t); its gradient is p_s (log p_s - log p_t - KL)
            ratio = log_s.sub_(log_t).masked_fill_(p_s == 0, 0)
            divergence = torch.sum(p_s * ratio, dim=-1, keepdim=True)
            loss = loss + lambda_kl * divergence.sum()
            gradient = p_s * ratio.sub_(divergence).mul_(lambda_kl).add_(lambda_ce)
        gradient[scored] -= lambda_ce
        return loss, gradient

    return _by_rows(kernel, logits, teacher, targets)


def _summed(found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    losses, gradient = found
    assert gradient is not None
    return losses.sum(), gradient


def _by_rows(
    kernel: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, *beside: Tensor
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(logits)
    total = logits.new_zeros((), dtype=torch.float32)
    size = _rows_at_once(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        value, gradient[rows] = kernel(logits[rows], *(item[rows] for item in beside))
        total += value
    return total, gradient


def _rows_at_once(logits: Tensor) -> int:
    if logits.device.type != "cpu":
        return max(1, len(logits))
    return max(1, torch.get_num_threads() * _CACHED_ELEMENTS // logits.shape[1])


def _indices(targets: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(targets), device=targets.device), targets

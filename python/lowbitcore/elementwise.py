"""Norms and gated MLPs of transformers' models through the core's operations.

Each makes one pass over memory of what is a pass for each of half a dozen operators otherwise, and
keeps its inputs alone for its backward.
"""

from __future__ import annotations

import inspect
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lowbitcore import ops

__all__ = ["use_own_elementwise"]

_SILU = (type(ACT2FN["silu"]), type(ACT2FN["swish"]))


def use_own_elementwise(model: PreTrainedModel) -> None:
    """Ours in the place of what computes as LLaMA does, in whatever model; the rest stays as it is.

    Modules keep their parameters and submodules under their names.
    """
    for module in model.modules():
        if _computes_as(module, LlamaRMSNorm):
            module.__class__ = RmsNorm
        elif _computes_as(module, LlamaMLP) and isinstance(module.act_fn, _SILU):
            module.__class__ = SwigluMlp


def _computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """transformers gives each model a copy of its own of such classes."""
    kind = type(module)
    return kind is known or _code(kind) == _code(known)


def _code(kind: type[nn.Module]) -> str | None:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):  # defined where there is no file
        return None


class RmsNorm(LlamaRMSNorm):  # type: ignore[misc]
    """transformers' own wherever the core's does not serve: other devices, other types, a weight
    that trains, torch.compile."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if (
            _is_ours(hidden_states, weight)
            and hidden_states.dtype == weight.dtype
            and not (weight.requires_grad and torch.is_grad_enabled())
        ):
            return ops.rms_norm(hidden_states, weight, eps=self.variance_epsilon)
        return cast(Tensor, super().forward(hidden_states))


class SwigluMlp(LlamaMLP):  # type: ignore[misc]
    """As `RmsNorm`, of an MLP whose gate goes through SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if _is_ours(gate, up) and gate.dtype == up.dtype:
            product = ops.swiglu(gate, up)
        else:
            product = self.act_fn(gate) * up
        return cast(Tensor, self.down_proj(product))


def _is_ours(*tensors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and all(
        x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[-1] % 32 == 0
        for x in tensors
    )

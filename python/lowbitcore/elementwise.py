"""Norms, rotary positions and gated MLPs of transformers' models through the core's operations.

Each makes one pass over memory of what is a pass for each of half a dozen operators otherwise, and
keeps its inputs alone for its backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from functools import cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    rotate_half,
)

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
        elif own := _with_own_rotary(cast(Any, type(module))):
            module.__class__ = own


def _computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """transformers gives each model a copy of its own of such classes."""
    return _code(type(module).forward) == _code(known.forward)


@cache
def _code(function: Hashable) -> str:
    try:
        return inspect.getsource(cast(FunctionType, function))
    except (OSError, TypeError):  # defined where there is no file
        return repr(function)


class RmsNorm(LlamaRMSNorm):  # type: ignore[misc]
    """transformers' own wherever the core's does not serve: other devices, other types, a weight
    that trains, torch.compile."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if (
            ops.serves(hidden_states, weight)
            and hidden_states.dtype == weight.dtype
            and not (weight.requires_grad and torch.is_grad_enabled())
        ):
            return ops.rms_norm(hidden_states, weight, eps=self.variance_epsilon)
        return cast(Tensor, super().forward(hidden_states))


class SwigluMlp(LlamaMLP):  # type: ignore[misc]
    """As `RmsNorm`, of an MLP whose gate goes through SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if ops.serves(gate, up) and gate.dtype == up.dtype:
            product = ops.swiglu(gate, up)
        else:
            product = self.act_fn(gate) * up
        return cast(Tensor, self.down_proj(product))


@cache
def _with_own_rotary(kind: Any) -> type[nn.Module] | None:
    """An attention whose forward calls our `_rotated` where it has called LLaMA's function, a
    global of its module; None for what does not."""
    forward, name = inspect.unwrap(kind.forward), apply_rotary_pos_emb.__name__
    if not isinstance(forward, FunctionType) or name not in forward.__code__.co_names:
        return None
    scope = forward.__globals__
    for known in (apply_rotary_pos_emb, rotate_half):
        if _code(scope.get(known.__name__)) != _code(known):
            return None
    own = FunctionType(
        forward.__code__,
        {**scope, name: _rotated},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": own, "__reduce_ex__": _reduce})


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickles cannot name a class that is made here: they say what it is made of."""
    return _empty_of, (type(module).__bases__[0],), module.__dict__


def _empty_of(kind: Any) -> nn.Module:
    own = _with_own_rotary(kind)
    assert own is not None
    return own.__new__(own)


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    if (
        ops.serves(q, k, cos, sin)
        and unsqueeze_dim == 1
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and cos.shape == sin.shape
        and cos.shape[-1] % 64 == 0
        and q.shape[2:] == k.shape[2:] == cos.shape[1:]
        and not (cos.requires_grad or sin.requires_grad)
    ):
        return ops.rotate(q, cos, sin), ops.rotate(k, cos, sin)
    found: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    return found

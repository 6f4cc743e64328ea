"""Norms, rotary positions and gated MLPs of transformers' models through the core's operations.

Each makes one pass over memory of what is a pass for each of half a dozen operators otherwise, and
keeps its inputs alone for its backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
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
        if computes_as(type(module), LlamaRMSNorm):
            module.__class__ = RmsNorm
        elif computes_as(type(module), LlamaMLP) and isinstance(module.act_fn, _SILU):
            module.__class__ = SwigluMlp
        elif _calls_rotary(kind := cast(Any, type(module))):
            module.__class__ = with_forward(kind, with_own_rotary)


def computes_as(kind: Any, known: type[nn.Module]) -> bool:
    """Whether a class's forward is written as that of a class of transformers', which gives each
    model a copy of its own of such classes."""
    return _code(kind.forward) == _code(known.forward)


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
def with_forward(kind: Any, make: Callable[[Any], Callable[..., Any]]) -> type[nn.Module]:
    """A subclass of the same name whose forward is what `make` makes of the class."""
    own = {"forward": make(kind), "made_by": make, "__reduce_ex__": _reduce}
    return type(kind.__name__, (kind,), own)


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickles cannot name a class that is made here: they say what it is made of."""
    kind: Any = type(module)
    if "made_by" not in vars(kind):  # somebody's subclass of one has a name
        return cast("tuple[Any, ...]", object.__reduce_ex__(module, protocol))
    return _empty_of, (kind.__bases__[0], kind.made_by), module.__dict__


def _empty_of(kind: Any, make: Any) -> nn.Module:
    own = with_forward(kind, make)
    return own.__new__(own)


@cache
def _calls_rotary(kind: Any) -> bool:
    """Whether an attention's forward calls LLaMA's function, a global of its module."""
    forward, name = inspect.unwrap(kind.forward), apply_rotary_pos_emb.__name__
    if not isinstance(forward, FunctionType) or name not in forward.__code__.co_names:
        return False
    return all(
        _code(forward.__globals__.get(known.__name__)) == _code(known)
        for known in (apply_rotary_pos_emb, rotate_half)
    )


def with_own_rotary(kind: Any) -> Callable[..., Any]:
    """The forward of such a one, which calls our `_rotated` instead."""
    forward = inspect.unwrap(kind.forward)
    own = FunctionType(
        forward.__code__,
        {**forward.__globals__, apply_rotary_pos_emb.__name__: _rotated},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


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

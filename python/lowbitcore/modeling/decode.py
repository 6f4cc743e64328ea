"""Blocks of transformers' models that take a new token through the core in two calls.

A token of a small model spends most of its time between products, in torch and in Python. Where a
block computes as LLaMA's does, from packed linears with or without adapters, and gets one token of
each sequence without a mask, as when it generates, that is left out. Whatever is watched goes from
module to module: so does, from then on, a model that has once been asked for its hidden states or
attentions, as transformers leaves its hooks on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from lowbitcore import ops
from lowbitcore.modeling.elementwise import (
    RmsNorm,
    SwigluMlp,
    computes_as,
    with_forward,
    with_own_rotary,
)
from lowbitcore.nn import LoraLinear, QuantLinear
from lowbitcore.ops.operators import is_plain

__all__ = ["use_own_blocks"]

# They differ in how wide a window they attend to, which keys and masks say as well, and in norms
# of heads.
_ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)
_IMPLEMENTATIONS = ("lowbitcore", "sdpa")  # of attention, which compute what the core does
_KNOWN = {
    "attention_mask",
    "cache",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "use_cache",
}


def use_own_blocks(model: PreTrainedModel) -> None:
    """For models whose norms, rotary positions and MLPs are ours already (elementwise).

    Where some blocks will do, all are given the same class, as they had before: whether one holds
    anything else, such as experts, shows when it is called.
    """
    blocks: list[Any] = [
        module
        for module in model.modules()
        if computes_as(cast(Any, type(module)), LlamaDecoderLayer)
    ]
    if any(type(x.mlp) is SwigluMlp and _is_known(cast(Any, type(x.self_attn))) for x in blocks):
        for block in blocks:
            block.__class__ = with_forward(cast(Any, type(block)), _in_two_calls)


@cache
def _is_known(attention: Any) -> bool:
    """Whether it computes as one of ours, rotary positions and all, which have been compared where
    they were replaced."""
    return vars(attention).get("made_by") is with_own_rotary and any(
        computes_as(attention, known) for known in _ATTENTIONS
    )


def _in_two_calls(kind: Any) -> Callable[..., Any]:
    original = kind.forward

    def forward(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        past = kwargs.get("cache")
        if past is None:  # its name in versions of transformers before 5.24
            past = kwargs.get("past_key_values")
        positions = kwargs.get("position_embeddings")
        if (
            not args
            and past is not None
            and positions is not None
            and kwargs.get("attention_mask") is None
            and hidden_states.dim() == 3
            and hidden_states.shape[1] == 1
            and all(kwargs[name] is None for name in kwargs.keys() - _KNOWN)
            and not block.training
            and not torch.is_autocast_enabled("cpu")
            and is_plain(hidden_states, *positions)
            and _fit(hidden_states, *positions)
            and (parts := _parts(block, positions[0].shape[-1], hidden_states.dtype)) is not None
        ):
            projections, rest = parts
            attention = block.self_attn
            q, k, v = ops.project_token(hidden_states, projections, *positions)
            keys, values = past.update(k, v, attention.layer_idx)
            return ops.finish_token(hidden_states, q, keys, values, attention.scaling, rest)
        return cast(Tensor, original(block, hidden_states, *args, **kwargs))

    return forward


def _fit(hidden_states: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these are positions of one token of each sequence, of the type of the states."""
    return (
        cos.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, len(hidden_states))
        and cos.shape[1] == 1
        and cos.dtype == sin.dtype == hidden_states.dtype
    )


def _parts(
    block: nn.Module, width: int, dtype: torch.dtype
) -> tuple[ops.Projections, ops.RestOfBlock] | None:
    """What the core takes of a block, looked up anew, as any of it may be replaced; None of one
    that has anything else, or whose modules are watched."""
    modules: dict[str, Any] = block._modules
    attention, mlp = modules["self_attn"], modules["mlp"]
    if (
        not _is_known(cast(Any, type(attention)))
        or type(mlp) is not SwigluMlp
        or attention.training  # it drops out
        or _is_watched(attention)
        or _is_watched(mlp)
        or torch_module._has_any_global_hook()
        or attention.config._attn_implementation not in _IMPLEMENTATIONS
        or attention.head_dim != width
        or width % 64 != 0
        or width > 256
    ):
        return None
    inner, gates = attention._modules, mlp._modules
    linears = [
        *(inner[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(gates[name] for name in ("gate_proj", "up_proj", "down_proj")),
    ]
    norms = [modules["input_layernorm"], modules["post_attention_layernorm"]]
    norms += [inner[name] for name in ("q_norm", "k_norm") if name in inner]
    weights, sizes = [], []
    for linear in linears:
        if (weight := _weight(linear)) is None:
            return None
        weights.append(weight)
    for norm in norms:
        if (size := _norm(norm, dtype)) is None:
            return None
        sizes.append(size)
    q, k, v, *rest = weights
    before, after, *of_heads = sizes
    q_norm, k_norm = of_heads or (None, None)
    o, *mlp_weights = rest
    return (
        ops.Projections(before, q, k, v, q_norm, k_norm),
        ops.RestOfBlock(o, after, *mlp_weights),
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether something hangs on a module's forward, which would not be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


def _norm(module: nn.Module, dtype: torch.dtype) -> ops.Norm | None:
    weight: Any = module._parameters.get("weight")
    if type(module) is not RmsNorm or _is_watched(module):
        return None
    if type(weight) is not nn.Parameter or weight.dtype != dtype or not weight.is_contiguous():
        return None
    return ops.Norm(weight, module.variance_epsilon)


def _is_master(factor: Any) -> bool:
    return type(factor) is nn.Parameter and factor.dtype == torch.float32 and factor.is_contiguous()


def _weight(module: nn.Module) -> ops.AdaptedWeight | None:
    adapters: list[tuple[Tensor, Tensor, float]] = []
    if type(module) is LoraLinear:
        modules: dict[str, Any] = module._modules
        if _is_watched(module):
            return None
        for adapter in modules["adapters"]._modules.values():
            a, b = adapter._parameters.get("a"), adapter._parameters.get("b")
            dropout = adapter._modules["dropout"]
            if dropout.training or _is_watched(dropout) or _is_watched(adapter):
                return None
            if not (_is_master(a) and _is_master(b)):
                return None
            adapters.append((a, b, adapter.scaling))
        module = modules["base"]
    if type(module) is not QuantLinear or _is_watched(module):
        return None
    return module.adapted_weight(tuple(adapters))

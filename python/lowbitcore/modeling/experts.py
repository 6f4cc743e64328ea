"""Mixtures of experts in the way that files hold them: each expert an MLP with linears of its own.

transformers stacks the weights of all experts, which no linear sees. Apart, they are measured,
packed, adapted and saved as any other linear is, under the names that files have for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import _default_apply_gate
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lowbitcore.modeling.elementwise import computes_as

# What stacked weights are made of, in this order.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def use_own_experts(model: PreTrainedModel) -> None:
    """Apart, where transformers computes as in Mixtral and files hold the experts one by one; what
    else there is stays stacked. Weights become views of the stacked ones."""
    stacked = [
        (path, cast(Any, module))
        for path, module in model.named_modules()
        if computes_as(type(module), MixtralExperts)
        and cast(Any, type(module))._apply_gate is _default_apply_gate
    ]
    names = names_in_files(model)
    if not stacked or not names:
        return
    for path, module in stacked:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _apart(module).train(module.training))
    # transformers writes whatever it does not know as it is called, and would not find it again.
    model.save_pretrained = partial(_save_pretrained, model, names)


def _save_pretrained(
    model: PreTrainedModel,
    names: Mapping[str, str],
    *args: Any,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    tensors = model.state_dict() if state_dict is None else state_dict
    renamed = {name_in_files(name, names): tensor for name, tensor in tensors.items()}
    type(model).save_pretrained(model, *args, state_dict=renamed, **kwargs)


def name_in_files(name: str, names: Mapping[str, str]) -> str:
    """A tensor's name with what files call an expert's part in place of ours (`names_in_files`)."""
    return re.sub(
        r"(\.experts\.\d+\.)(\w+)", lambda found: found[1] + names.get(found[2], found[2]), name
    )


def names_in_files(model: nn.Module) -> Mapping[str, str]:
    """What files call an expert's gate_proj, up_proj and down_proj; empty where they hold experts
    in another way."""
    found: dict[str, str] = {}
    for item in get_model_conversion_mapping(cast(PreTrainedModel, model), add_legacy=False):
        if not isinstance(item, WeightConverter):
            continue
        kinds = {type(operation) for operation in item.operations}
        for stacked, parts in _PARTS.items():
            names = [
                match[1]
                for source in item.source_patterns
                if (match := re.search(r"experts\.\*\.(\w+)\.weight$", source.replace("\\", "")))
            ]
            if (
                [pattern.rpartition(".")[2] for pattern in item.target_patterns] == [stacked]
                and len(names) == len(item.source_patterns) == len(parts)
                and kinds <= {MergeModulelist, Concatenate}
            ):
                found |= dict(zip(parts, names, strict=True))
    return found if len(found) == 3 else {}


def _apart(stacked: Any) -> Experts:
    """Of a module of transformers' with gate_up_proj [E, 2 I, H] and down_proj [E, H, I]."""
    experts = []
    for gate_up, down in zip(stacked.gate_up_proj, stacked.down_proj, strict=True):
        expert: Any = _bare(LlamaMLP)
        expert.gate_proj, expert.up_proj = map(_linear, gate_up.chunk(2))
        expert.down_proj, expert.act_fn = _linear(down), stacked.act_fn
        experts.append(expert)
    return Experts(experts)


def _linear(weight: Tensor) -> nn.Linear:
    linear: nn.Linear = _bare(nn.Linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    linear.register_parameter("bias", None)
    return linear


def _bare(kind: type[nn.Module]) -> Any:
    """A module without what its constructor makes, of thousands of experts, to throw it away."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


class Experts(nn.ModuleList):
    """The experts of one block, each with the tokens that the router sends to it."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H]; expert and weight of each token's choices [T, k]."""
        choices, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
        order = choices.argsort(stable=True)
        tokens = order // top_k_index.shape[-1]
        output, start = torch.zeros_like(hidden_states), 0
        for expert, count in zip(self, self._counts(choices), strict=False):
            if count or _linears_are_watched(expert):
                span = slice(start, start + count)
                y = expert(hidden_states[tokens[span]]) * weights[order[span]]
                output.index_add_(0, tokens[span], y.to(output.dtype))
            start += count
        return output

    def _counts(self, choices: Tensor) -> list[int]:
        """How often each expert is chosen. Without values, as `plan` has them, the first takes the
        place of all: it keeps as much as they do together."""
        if isinstance(choices, FakeTensor):
            return [len(choices)]
        return cast("list[int]", choices.bincount(minlength=len(self)).tolist())


def _linears_are_watched(expert: nn.Module) -> bool:
    """Whether something waits at its linears: it is told of no tokens, too."""
    # Asked for most experts of a token: children() takes three times as long.
    return any(cast(nn.Module, item)._forward_pre_hooks for item in expert._modules.values())

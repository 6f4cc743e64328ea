"""Models without values, and how they get them: names, shapes and ties of a source's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lowbitcore.blocks import find_blocks, plain_tensors
from lowbitcore.files import one_line
from lowbitcore.modeling import use_own_operations
from lowbitcore.modeling.experts import names_in_files
from lowbitcore.source import Source, Weights, place


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, weights: Weights | None = None
) -> PreTrainedModel:
    """The model of `config` with parameters on the meta device and real buffers, in eval mode.

    Buffers that are not saved (rotary tables) are therefore computed as transformers means them.
    Experts stay stacked where the `weights` hold them so.
    """
    config = deepcopy(config)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # inconsistent sizes in config.json
        raise ValueError(f"build_skeleton: config: {one_line(error)}") from error
    names = () if weights is None else weights.names()
    use_own_operations(model, experts=not any(n.endswith(".experts.down_proj") for n in names))
    return cast(PreTrainedModel, model.eval())


_RENAMINGS: WeakKeyDictionary[nn.Module, tuple[Mapping[str, str], list[Any]]] = WeakKeyDictionary()


def saved_name(model: nn.Module, name: str) -> str:
    """The name that files use for a model's tensor: transformers renames some on loading.

    (GPT-NeoX's `lm_head` is `embed_out` in every file, Mixtral's `experts.0.up_proj` is `w3`.)
    """
    if model not in _RENAMINGS:
        renamings = [
            conversion.reverse_transform()
            for conversion in reversed(_conversions(model))
            if type(conversion) is WeightRenaming
        ]
        _RENAMINGS[model] = names_in_files(model), renamings
    experts, renamings = _RENAMINGS[model]
    name = re.sub(
        r"(\.experts\.\d+\.)(\w+)", lambda found: found[1] + experts.get(found[2], found[2]), name
    )
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _conversions(model: nn.Module) -> list[Any]:
    """How transformers makes a model's tensors of those in files."""
    return get_model_conversion_mapping(cast(PreTrainedModel, model), add_legacy=False)


def resolve_name(model: nn.Module, weights: Weights, name: str) -> str | None:
    """The name under which the weights hold a model's tensor, or None.

    Some checkpoints lack the base model's prefix (`h.0...` for `transformer.h.0...`).
    """
    bare = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    for candidate in (name, saved_name(model, name), bare):
        if candidate in weights:
            return candidate
    return None


def find_name(model: nn.Module, weights: Weights, name: str) -> str:
    """As `resolve_name`, also by a tied copy's name; ValueError where there is none."""
    copies = [copy for copy, origin in tied_names(model).items() if origin == name]
    for candidate in (name, *copies):
        if found := resolve_name(model, weights, candidate):
            return found
    hint = ""
    if any(type(item) is not WeightRenaming for item in _conversions(model)):
        hint = " (transformers makes some of several: quantize_model takes what it has loaded)"
    raise ValueError(f"{place(weights)}: tensor {name!r} of the model is missing{hint}")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Copies that tying makes: name of the copy -> name of the parameter it shares."""
    return dict(getattr(model, "all_tied_weights_keys", {}))


def fill(
    model: nn.Module,
    weights: Weights,
    names: Iterable[str],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> None:
    """Gives the named parameters and persistent buffers of a skeleton their values.

    Floating-point ones become `dtype`. ValueError where one is missing or of another shape.
    """
    ties = tied_names(model)
    wanted = plain_tensors(model)
    for name in names:
        found = find_name(model, weights, ties.get(name, name))
        shape = weights.info(found).shape
        if shape != tuple(wanted[name].shape):
            raise ValueError(
                f"{place(weights)}: tensor {found!r}: expected shape "
                f"{list(wanted[name].shape)} by config.json, got {list(shape)}"
            )
        value = weights.tensor(found)
        if value.is_floating_point():
            value = value.to(dtype)
        set_module_tensor_to_device(
            model, name, device, value=value, dtype=value.dtype, clear_cache=False
        )


def check_depth(model: nn.Module, source: Source) -> None:
    """ValueError where the checkpoint has more blocks than its config speaks of."""
    layout = find_blocks(model)
    pattern = re.compile(rf"(?:^|\.){re.escape(layout.prefix.rpartition('.')[2])}\.(\d+)\.")
    found = [int(match[1]) for name in source.weights.names() if (match := pattern.search(name))]
    if found and max(found) >= len(layout.modules):
        raise ValueError(
            f"{source.path}: expected {len(layout.modules)} blocks by its config, got tensors of "
            f"block {max(found)}"
        )

"""Models without values, and how they get them: names, shapes and ties of a source's tensors."""

from __future__ import annotations

import re
import warnings
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
from lowbitcore.modeling.experts import name_in_files, names_in_files
from lowbitcore.source import Source, Weights, place


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, weights: Weights | None = None
) -> PreTrainedModel:
    """The model of `config` with parameters on the meta device and real buffers, in eval mode.

    Buffers that are not saved (rotary tables) are therefore computed as transformers means them.
    As the `weights` hold them, experts stay stacked, and a head that is tied by the config but not
    the same there becomes one of its own, as it does in transformers.
    """
    model = _empty_model(config, dtype)
    if weights is not None and _untied_there(model, weights):
        config = deepcopy(config)
        config.tie_word_embeddings = False
        model = _empty_model(config, dtype)
    names = () if weights is None else weights.names()
    use_own_operations(model, experts=not any(n.endswith(".experts.down_proj") for n in names))
    return cast(PreTrainedModel, model.eval())


def _empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    config = deepcopy(config)
    try:
        with init_empty_weights(include_buffers=False):
            return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))
    except Exception as error:  # inconsistent sizes in config.json
        raise ValueError(f"build_skeleton: config: {one_line(error)}") from error


def _untied_there(model: nn.Module, weights: Weights) -> bool:
    """Whether the weights hold some tied pair twice, with different values."""
    for copy, origin in tied_names(model).items():
        one, other = resolve_name(model, weights, copy), resolve_name(model, weights, origin)
        if (
            one is not None
            and other not in (one, None)
            and not torch.equal(weights.tensor(one), weights.tensor(other))
        ):
            return True
    return False


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
    name = name_in_files(name, experts)
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _conversions(model: nn.Module) -> list[Any]:
    """How transformers makes a model's tensors of those in files."""
    return get_model_conversion_mapping(cast(PreTrainedModel, model), add_legacy=False)


def resolve_name(model: nn.Module, weights: Weights, name: str) -> str | None:
    """The name under which the weights hold a model's tensor, or None."""
    return next((known for known in _known_names(model, name) if known in weights), None)


def _known_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """Those that files may have for a model's tensor: some lack the base model's prefix (`h.0...`
    for `transformer.h.0...`)."""
    bare = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    return name, saved_name(model, name), bare


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

    Floating-point ones become `dtype` (`kept_dtype`). ValueError where one is missing or of another
    shape.
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
            value = value.to(kept_dtype(model, name, dtype))
        set_module_tensor_to_device(
            model, name, device, value=value, dtype=value.dtype, clear_cache=False
        )


def kept_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor in a model of this one: transformers keeps some in float32, as most of
    what chooses experts."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if any(re.search(pattern.replace("*", ".*"), name) for pattern in kept):
        return torch.float32
    return dtype


def check_names(model: nn.Module, source: Source) -> None:
    """ValueError where a checkpoint has blocks or biases that a model by its config lacks; a
    warning of what else is left out, but for what transformers leaves out without a word."""
    layout, weights = find_blocks(model), source.weights
    known = {
        known
        for name in [*plain_tensors(model), *tied_names(model)]
        for known in _known_names(model, name)
    }
    # A packed linear's own tensors are checked where they are read.
    packed = {n.removesuffix(".qweight") for n in weights.names() if n.endswith(".qweight")}
    ignored = {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    ignored |= set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    left = [
        name
        for name in weights.names()
        if name not in known
        and (name.endswith(".bias") or name.rpartition(".")[0] not in packed)
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    block = re.compile(rf"(?:^|\.){re.escape(layout.prefix.rpartition('.')[2])}\.(\d+)\.")
    beyond = [int(match[1]) for name in left if (match := block.search(name))]
    if beyond and max(beyond) >= len(layout.modules):
        raise ValueError(
            f"{source.path}: expected {len(layout.modules)} blocks by its config, got tensors of "
            f"block {max(beyond)}"
        )
    biases = {f"{n.removesuffix('.weight')}.bias" for n in known if n.endswith(".weight")}
    for name in [name for name in left if name in biases]:
        if weights.tensor(name).any():  # zeros are usual there
            raise ValueError(
                f"{source.path}: {name}: expected none, or zeros, by config.json, got others"
            )
        left.remove(name)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(
            f"{source.path}: left out, since {type(model).__name__} has no place for it: "
            f"{left[0]}{more}",
            stacklevel=3,
        )

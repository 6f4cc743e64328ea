"""A packed model as an ordinary one of 16 bits, for programs that know no packed weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbitcore import files
from lowbitcore.blocks import (
    adapter_stacks,
    as_stored,
    linear_weight,
    plain_tensors,
    quantized_linears,
    without_adapters,
)
from lowbitcore.formats.checkpoint import Entry
from lowbitcore.model import check_saving, origin_tokenizer, write_model
from lowbitcore.nn import LowRank, QuantLinear
from lowbitcore.skeleton import build_skeleton, saved_name, tied_names

# Beside files of a model that is not whole yet.
_UNFINISHED = ".unfinished"


def save_dequantized(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a quantized model as an ordinary directory of the model's dtype: what transformers
    loads, and PEFT puts adapters of `save_adapter` on.

    Weights are ``scales * (q - zeros)`` with the scales in use, and ``(alpha / r) B A`` of every
    adapter on the model is added to them: to have these apart, write the model before they are on
    it. One linear at a time is dense in memory. Without `tokenizer`, that of the directory the
    model was loaded from is copied, if it has one. Raises ValueError where nothing is quantized or
    adapted, where the dtype cannot hold a weight, and for an `out` that holds anything but what a
    call that was interrupted has left.
    """
    check_saving("save_dequantized", model, out, tokenizer, max_shard_bytes)
    directory = Path(out)
    unfinished = directory / _UNFINISHED
    if not unfinished.exists():
        files.check_free(f"save_dequantized: {out}", directory)
    stacks = adapter_stacks(model)
    with without_adapters(model):
        linears: dict[str, nn.Module] = dict(quantized_linears(model))
        linears |= {path: model.get_submodule(path) for path in stacks}
        if not linears:
            raise ValueError("save_dequantized: model: expected a quantized one, got a plain one")
        config = deepcopy(model.config)
        config.dtype = model.dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        origin = build_skeleton(config, model.dtype)
        entries = [
            Entry(
                saved_name(model, f"{path}.weight"),
                model.dtype,
                tuple(origin.get_submodule(path).weight.shape),
                partial(_dense, path, linear, stacks.get(path, []), origin.get_submodule(path)),
            )
            for path, linear in linears.items()
        ]
        entries += [
            Entry.of(saved_name(model, f"{path}.bias"), linear.bias.detach().to(model.dtype))
            for path, linear in linears.items()
            if isinstance(linear, QuantLinear) and linear.bias is not None
        ]
        merged, ties = {f"{path}.weight" for path in linears}, tied_names(model)
        entries += [
            Entry.of(saved_name(model, name), tensor.detach())
            for name, tensor in plain_tensors(model).items()
            if name not in ties and name not in merged
        ]
        directory.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        files.remove_leftovers(directory)
        write_model(
            directory,
            entries,
            model_config=config,
            gptq_config=None,
            generation_config=model.generation_config,
            tokenizer=origin_tokenizer(model) if tokenizer is None else tokenizer,
            max_shard_bytes=max_shard_bytes,
        )
        unfinished.unlink()


@torch.no_grad()
def _dense(
    path: str, linear: nn.Module, adapters: Sequence[LowRank], origin: nn.Module
) -> torch.Tensor:
    """A linear's weight, and what adapters add to it, as the module `origin` has it."""
    if isinstance(linear, QuantLinear):
        weight = linear.dequantize(torch.float32)
    else:
        weight = linear_weight(linear).float()
    for adapter in adapters:
        weight = weight + adapter.scaling * adapter.b @ adapter.a
    dtype = cast(torch.Tensor, origin.weight).dtype
    stored = weight.to(dtype)
    if not torch.isfinite(stored).all():
        raise ValueError(f"save_dequantized: {path}: expected weights that fit {dtype}")
    return as_stored(origin, stored)

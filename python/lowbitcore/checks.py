"""Checks of arguments that many functions share; each raises ValueError with what was expected."""

from __future__ import annotations

import os

import torch
from transformers import PretrainedConfig, PreTrainedModel


def check_kind(where: str, value: object, kind: type) -> None:
    """ValueError where a caller passes another kind of object than `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected a {kind.__name__}, got {type(value).__name__}")


def check_path(where: str, value: object) -> None:
    """ValueError for anything else than a path."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{where}: expected a path, got {type(value).__name__}")


def check_integer(where: str, value: object, *, least: int) -> None:
    """ValueError for anything else than an integer of at least so much."""
    if type(value) is not int or value < least:
        raise ValueError(f"{where}: expected an integer of at least {least}, got {value!r}")


def check_tokens(where: str, ids: torch.Tensor, model: PreTrainedModel) -> None:
    """ValueError where a tokenizer makes tokens that the model does not have."""
    size = model.get_input_embeddings().weight.shape[0]
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= size:
        raise ValueError(
            f"{where}: expected a tokenizer of the model's {size} tokens, got token {largest}"
        )


def max_length(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model with this config can take; None: any."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


def check_length(argument: str, length: int, config: PretrainedConfig) -> None:
    """ValueError for a sequence longer than a model with this config can take."""
    limit = max_length(config)
    if limit is not None and length > limit:
        raise ValueError(f"{argument}: expected at most {limit} for this model, got {length}")


def check_unicode(where: str, text: str) -> None:
    """ValueError unless the text can be encoded: a command line may hand over stray bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: expected Unicode, got stray bytes at {error.start}") from error

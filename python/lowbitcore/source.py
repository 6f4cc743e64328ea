"""What a model is read from: a Hugging Face directory, a `.gguf` file or a hub id."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lowbitcore.files import one_line, read_json
from lowbitcore.formats import peft, scales
from lowbitcore.formats.checkpoint import Checkpoint, TensorInfo
from lowbitcore.formats.gguf import GgufFile
from lowbitcore.formats.gptq import GptqConfig


class Weights(Protocol):
    """Tensors by Hugging Face name, read one at a time."""

    def __contains__(self, name: object) -> bool: ...
    def names(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def tensor(self, name: str) -> torch.Tensor: ...
    def fingerprint(self) -> str: ...


def place(weights: Weights) -> str:
    """Where they come from, for messages."""
    return str(getattr(weights, "directory", None) or getattr(weights, "path", "weights"))


class Source(NamedTuple):
    """A model on disk: its configuration and its tensors, nothing of them in memory yet."""

    path: Path
    config: PretrainedConfig
    dtype: torch.dtype  # of the weights that are not quantized
    gptq: GptqConfig | None
    weights: Weights


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a Hugging Face directory, a `.gguf` file or a hub id; reads headers and config only.

    Raises ValueError (one line) for what is no causal language model.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"path: expected a directory, a .gguf file or a hub id, got {path!r}")
    local = Path(path)
    if _is_gguf(local):
        gguf_file = _open_gguf(local)
        config = _causal_config(gguf_file.config, local)
        return Source(local, config, gguf_file.dtype, None, gguf_file)
    local = local_path(path)
    if not local.is_dir():
        raise ValueError(f"{path}: expected a model directory, a .gguf file or a hub id")
    gptq_config = _gptq_config(_read_json_config(local), local)
    config = _directory_config(local)
    weights = Checkpoint(local)
    if any(name.endswith(".adapters.0.a") for name in weights.names()):
        raise ValueError(
            f"{local}: holds adapters among its weights, as save_pretrained writes them: expected "
            "a model written by lowbitcore.save, and they by save_adapter"
        )
    if gptq_config is not None and not any(n.endswith(".qweight") for n in weights.names()):
        raise ValueError(f"{local}: quantization_config says gptq, but there is no qweight")
    return Source(local, config, _main_dtype(config, weights), gptq_config, weights)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Where a model lies on this disk: what a hub id names is fetched."""
    local = Path(path)
    return local if local.exists() or _is_gguf(local) else _download(str(path))


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and not path.is_dir()


def _open_gguf(path: Path) -> GgufFile:
    """Kept: reading the header of a file takes seconds, most of them for its tokenizer."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    state = path.stat()
    return _read_gguf(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_gguf(path: Path, size: int, modified: int) -> GgufFile:
    return GgufFile(path)


_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def _download(hub_id: str, patterns: Sequence[str] = _MODEL_FILES) -> Path:
    # A path that does not exist is a typo more often than a hub id.
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise ValueError(f"{hub_id}: no such model directory or file")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # network, unknown id, gated: all end here
        raise ValueError(
            f"{hub_id}: no such directory, and not available from the hub: {one_line(error)}"
        ) from error


def read_config(path: str | os.PathLike[str]) -> PretrainedConfig:
    """The config of a causal language model, whose directory need hold no more than that."""
    local = Path(path)
    if _is_gguf(local) or local.is_file():
        return open_source(path).config
    return _directory_config(local if local.is_dir() else _download(str(path), ["config.json"]))


def _directory_config(directory: Path) -> PretrainedConfig:
    _read_json_config(directory)  # for its messages
    try:
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers raises many kinds, with messages of many lines
        raise ValueError(f"{directory}: config.json is not usable: {one_line(error)}") from error
    return _causal_config(config, directory)


def _read_json_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        hint = ""
        if (directory / ".partial").is_dir():
            hint = " (an unfinished quantization: resume it)"
        elif any((directory / name).is_file() for name in (peft.CONFIG_FILE, scales.FILE)):
            hint = " (what training left: give its model, and this with --adapter)"
        raise ValueError(f"{directory}: not a model directory: no config.json{hint}")
    return read_json(path)


def _gptq_config(raw: dict[str, Any], directory: Path) -> GptqConfig | None:
    where = directory / "config.json"
    value = raw.get("quantization_config")
    if value is None:
        # AutoGPTQ's older files keep it only here.
        where = directory / "quantize_config.json"
        if not where.is_file():
            return None
        value = read_json(where)
    return GptqConfig.from_dict(value, where=f"{where}: quantization_config")


def _causal_config(config: PretrainedConfig, path: Path) -> PretrainedConfig:
    """A copy without quantization_config, checked to be of a causal language model."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    architectures = config.architectures or [name]
    known = isinstance(architectures, list) and name in architectures
    if name is None or not known or config.is_encoder_decoder:
        raise ValueError(
            f"{path}: not a causal language model: model_type {config.model_type!r}, "
            f"architectures {config.architectures}"
        )
    config = deepcopy(config)
    config.architectures = [name]
    # transformers must not start its own GPTQ loader on our skeleton.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _main_dtype(config: PretrainedConfig, weights: Weights) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for name in weights.names():
        info = weights.info(name)
        if info.dtype.is_floating_point and not name.endswith(".scales"):
            return info.dtype
    return torch.float32


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model directory, `.gguf` file or hub id; ValueError where it has none."""
    local = Path(path)
    try:
        if _is_gguf(local):
            return _open_gguf(local).tokenizer()
        return AutoTokenizer.from_pretrained(local if local.exists() else str(path))
    except Exception as error:  # transformers raises many kinds, with messages of many lines
        raise ValueError(f"{path}: no usable tokenizer: {one_line(error)}") from error


def tokenizer_if_any(path: str | os.PathLike[str]) -> Any:
    """None where there is none: a model without a tokenizer is a model all the same."""
    try:
        return load_tokenizer(path)
    except ValueError:
        return None


def load_generation_config(source: Source) -> GenerationConfig:
    """The directory's generation_config.json, or what the model's config implies."""
    path = source.path / "generation_config.json"
    if path.is_file():
        try:
            return GenerationConfig.from_pretrained(source.path)
        except Exception as error:  # whatever strange values do to transformers
            raise ValueError(f"{path}: not a generation config: {one_line(error)}") from error
    return GenerationConfig.from_model_config(source.config)

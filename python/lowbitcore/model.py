"""Models: opening sources, building and filling skeletons, finding blocks, loading and saving."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from lowbitcore.attention import use_own_attention
from lowbitcore.decode import use_own_blocks
from lowbitcore.dense import use_own_linears
from lowbitcore.elementwise import use_own_elementwise
from lowbitcore.formats import checkpoint, gptq, peft, scales
from lowbitcore.formats.checkpoint import Checkpoint, Entry, TensorInfo
from lowbitcore.formats.gguf import GgufFile
from lowbitcore.formats.gptq import GptqConfig
from lowbitcore.head import use_own_head
from lowbitcore.nn import LoraLinear, QuantLinear
from lowbitcore.runtime import resolve_device


class Weights(Protocol):
    """Tensors by Hugging Face name, read one at a time."""

    def __contains__(self, name: object) -> bool: ...
    def names(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def tensor(self, name: str) -> torch.Tensor: ...
    def fingerprint(self) -> str: ...


class Source(NamedTuple):
    """A model on disk: its configuration and its tensors, nothing of them in memory yet."""

    path: Path
    config: PretrainedConfig
    dtype: torch.dtype  # of the weights that are not quantized
    gptq: GptqConfig | None
    weights: Weights


class BlockLayout(NamedTuple):
    """The transformer blocks of a model: `prefix` is the path of the list, e.g. `model.layers`."""

    prefix: str
    modules: nn.ModuleList


# --- Opening ---------------------------------------------------------------------------------


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
    if not local.exists():
        local = _download(str(path))
    if not local.is_dir():
        raise ValueError(f"{path}: expected a model directory, a .gguf file or a hub id")
    gptq_config = _gptq_config(_read_json_config(local), local)
    config = _directory_config(local)
    weights = Checkpoint(local)
    if gptq_config is not None and not any(n.endswith(".qweight") for n in weights.names()):
        raise ValueError(f"{local}: quantization_config says gptq, but there is no qweight")
    return Source(local, config, _main_dtype(config, weights), gptq_config, weights)


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
            f"{hub_id}: no such directory, and not available from the hub: {_one_line(error)}"
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
        raise ValueError(f"{directory}: config.json is not usable: {_one_line(error)}") from error
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
    return checkpoint.read_json(path)


def _gptq_config(raw: dict[str, Any], directory: Path) -> GptqConfig | None:
    where = directory / "config.json"
    value = raw.get("quantization_config")
    if value is None:
        # AutoGPTQ's older files keep it only here.
        where = directory / "quantize_config.json"
        if not where.is_file():
            return None
        value = checkpoint.read_json(where)
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model directory, `.gguf` file or hub id; ValueError where it has none."""
    local = Path(path)
    try:
        if _is_gguf(local):
            return _open_gguf(local).tokenizer()
        return AutoTokenizer.from_pretrained(local if local.exists() else str(path))
    except Exception as error:  # transformers raises many kinds, with messages of many lines
        raise ValueError(f"{path}: no usable tokenizer: {_one_line(error)}") from error


# --- Skeletons -------------------------------------------------------------------------------


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with parameters on the meta device and real buffers, in eval mode.

    Buffers that are not saved (rotary tables) are therefore computed as transformers means them.
    """
    config = deepcopy(config)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # inconsistent sizes in config.json
        raise ValueError(f"build_skeleton: config: {_one_line(error)}") from error
    use_own_operations(model)
    return cast(PreTrainedModel, model.eval())


def use_own_operations(model: PreTrainedModel) -> None:
    """The core's attention, norms, rotary positions and gates in the place of transformers', and
    quicker linears and head, where they compute the same."""
    use_own_attention(model)
    use_own_elementwise(model)
    use_own_blocks(model)
    use_own_linears(model)
    use_own_head(model)


_RENAMINGS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def saved_name(model: nn.Module, name: str) -> str:
    """The name that files use for a model's tensor: transformers renames some on loading.

    (GPT-NeoX's `lm_head` is `embed_out` in every file.)
    """
    if model not in _RENAMINGS:
        _RENAMINGS[model] = [
            conversion.reverse_transform()
            for conversion in reversed(_conversions(model))
            if type(conversion) is WeightRenaming
        ]
    for renaming in _RENAMINGS[model]:
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
    raise ValueError(f"{_where(weights)}: tensor {name!r} of the model is missing{hint}")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Copies that tying makes: name of the copy -> name of the parameter it shares."""
    return dict(getattr(model, "all_tied_weights_keys", {}))


def plain_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict but for packed linears', which would unpack them, all at once."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantLinear):
            module._save_to_state_dict(found, f"{path}." if path else "", keep_vars=True)
    return found


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
                f"{_where(weights)}: tensor {found!r}: expected shape "
                f"{list(wanted[name].shape)} by config.json, got {list(shape)}"
            )
        value = weights.tensor(found)
        if value.is_floating_point():
            value = value.to(dtype)
        set_module_tensor_to_device(
            model, name, device, value=value, dtype=value.dtype, clear_cache=False
        )


def _where(weights: Weights) -> str:
    return str(getattr(weights, "directory", None) or getattr(weights, "path", "weights"))


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces the submodule at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


# --- Blocks ----------------------------------------------------------------------------------


def find_blocks(model: nn.Module) -> BlockLayout:
    """The list of same-class blocks that holds most of the linears' parameters.

    Raises ValueError where there is none.
    """
    best: tuple[int, BlockLayout] | None = None
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(item) for item in module}) != 1:
            continue
        size = sum(_linear_size(item) for item in module.modules())
        # Outer lists come first, so a list of experts in a block never wins over the blocks.
        if size > (best[0] if best else 0):
            best = (size, BlockLayout(prefix, module))
    if best is None:
        raise ValueError(f"find_blocks: {type(model).__name__} has no list of blocks with linears")
    return best[1]


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


def _linear_size(module: nn.Module) -> int:
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.numel()
    return module.in_features * module.out_features if isinstance(module, QuantLinear) else 0


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an nn.Linear or Conv1D, whose weight is [in, out]."""
    rows, columns = cast(torch.Tensor, module.weight).shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def quantizable(block: nn.Module) -> dict[str, nn.Module]:
    """Linears of a block with both dimensions multiples of 32, by path inside the block."""
    return {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and all(size % 32 == 0 for size in linear_shape(module))
    }


def not_quantizable(block: nn.Module) -> dict[str, str]:
    """What holds matrices in a block but stays in 16 bits: path inside the block -> reason."""
    reasons = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            in_features, out_features = linear_shape(module)
            if in_features % 32 or out_features % 32:
                reasons[path] = f"{out_features} x {in_features}: not multiples of 32"
        else:
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                if parameter.dim() > 2:
                    reasons[name] = f"a parameter of {parameter.dim()} dimensions, not a linear"
    return reasons


def check_kind(where: str, value: object, kind: type) -> None:
    """ValueError where a caller passes another kind of object than `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected a {kind.__name__}, got {type(value).__name__}")


def check_tokens(where: str, ids: torch.Tensor, model: PreTrainedModel) -> None:
    """ValueError where a tokenizer makes tokens that the model does not have."""
    size = model.get_input_embeddings().weight.shape[0]
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= size:
        raise ValueError(
            f"{where}: expected a tokenizer of the model's {size} tokens, got token {largest}"
        )


def check_length(argument: str, length: int, config: PretrainedConfig) -> None:
    """ValueError for a sequence longer than a model with this config can take."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"{argument}: expected at most {limit} for this model, got {length}")


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """All QuantLinear of a model by path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)
    }


def adapted_linears(model: nn.Module) -> dict[str, LoraLinear]:
    """All linears with adapters, by path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)
    }


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The bare linears stand in their places for as long as this lasts."""
    linears = adapted_linears(model)
    for path, linear in linears.items():
        set_module(model, path, linear.base)
    try:
        yield
    finally:
        for path, linear in linears.items():
            set_module(model, path, linear)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode for as long as this lasts: nothing is dropped."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# --- Loading ---------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Loads a GPTQ or plain 16-bit directory, a hub id or a `.gguf`, ready for inference.

    `dtype` is that of activations and of all weights that are not quantized; "auto" is the
    checkpoint's own. Raises ValueError (one line) for whatever does not fit together, and for a
    device that cannot be computed on.
    """
    device = resolve_device(device)
    source = open_source(path)
    chosen = chosen_dtype(dtype, source.dtype)
    model = build_skeleton(source.config, chosen)
    check_depth(model, source)
    if source.gptq is not None:
        _place_quantized(model, source, chosen, device)
    ties = tied_names(model)
    names = [name for name in plain_tensors(model) if name not in ties]
    fill(model, source.weights, names, dtype=chosen, device=device)
    model.tie_weights()
    if source.gptq is not None:
        # Its presence must not make transformers look for a quantizer: a plain dict does not. The
        # state_dict has v2 zeros, whatever the file had.
        model.config.quantization_config = replace(source.gptq, checkpoint_format=gptq.V2).to_dict()
    model.generation_config = load_generation_config(source)
    model.config.name_or_path = str(source.path)
    return cast(PreTrainedModel, model.to(device).eval())  # the packed linears, too


def chosen_dtype(dtype: torch.dtype | str, default: torch.dtype) -> torch.dtype:
    """What `load`'s argument says; "auto" means the default."""
    if dtype == "auto":
        dtype = default
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"load: dtype: expected auto, float32, bfloat16 or float16, got {dtype}")
    return parsed


def load_generation_config(source: Source) -> GenerationConfig:
    """The directory's generation_config.json, or what the model's config implies."""
    path = source.path / "generation_config.json"
    if path.is_file():
        try:
            return GenerationConfig.from_pretrained(source.path)
        except Exception as error:  # whatever strange values do to transformers
            raise ValueError(f"{path}: not a generation config: {_one_line(error)}") from error
    return GenerationConfig.from_model_config(source.config)


def _place_quantized(
    model: PreTrainedModel, source: Source, dtype: torch.dtype, device: torch.device
) -> None:
    """Replaces every linear that the file holds as qweight by a filled QuantLinear."""
    config, weights = cast(GptqConfig, source.gptq), source.weights
    stems = {n.removesuffix(".qweight") for n in weights.names() if n.endswith(".qweight")}
    linears = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    for path, module in linears:
        found = resolve_name(model, weights, f"{path}.qweight")
        if found is None:
            continue
        stem = found.removesuffix(".qweight")
        stems.discard(stem)
        in_features, out_features = linear_shape(module)
        set_module(
            model,
            path,
            read_quant_linear(
                weights,
                stem,
                config,
                in_features=in_features,
                out_features=out_features,
                bias=module.bias is not None,
                dtype=dtype,
                device=device,
            ),
        )
    if stems:
        raise ValueError(
            f"{source.path}: {min(stems)}.qweight: {type(model).__name__} has no such linear"
        )


def read_quant_linear(
    weights: Weights,
    stem: str,
    config: GptqConfig,
    *,
    in_features: int,
    out_features: int,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> QuantLinear:
    """One linear from GPTQ tensors `stem.qweight`, ..., packed on `device`; its bias becomes
    `dtype`."""
    names = [*gptq.SUFFIXES, "bias"] if bias else list(gptq.SUFFIXES)
    if not bias and f"{stem}.bias" in weights and weights.tensor(f"{stem}.bias").any():
        # Zeros are usual where the model has none.
        raise ValueError(
            f"{_where(weights)}: {stem}.bias: expected none, or zeros, by config.json, got others"
        )
    if bias and f"{stem}.bias" not in weights:
        raise ValueError(f"{_where(weights)}: {stem}.bias: missing")
    where = f"{_where(weights)}: {stem}"
    wanted_bytes = in_features * out_features * config.bits // 8
    if f"{stem}.qweight" in weights and weights.info(f"{stem}.qweight").nbytes != wanted_bytes:
        shape = list(weights.info(f"{stem}.qweight").shape)
        raise ValueError(
            f"{where}.qweight: expected {config.bits}-bit weights of {out_features} x "
            f"{in_features} by config.json, got shape {shape}"
        )
    tensors = {
        name: weights.tensor(f"{stem}.{name}") for name in names if f"{stem}.{name}" in weights
    }
    parts = gptq.decode_linear(
        tensors, config, in_features=in_features, out_features=out_features, where=where
    )
    parts = {name: None if item is None else item.to(device) for name, item in parts.items()}
    bias_value = parts["bias"]
    return QuantLinear.from_canonical(
        cast(torch.Tensor, parts["qweight"]),
        cast(torch.Tensor, parts["qzeros"]),
        cast(torch.Tensor, parts["scales"]),
        bits=config.bits,
        group_size=config.group_size,
        g_idx=parts["g_idx"],
        bias=None if bias_value is None else bias_value.to(dtype),
    )


# --- Saving ----------------------------------------------------------------------------------


def save(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a quantized model as a GPTQ directory that others can load too.

    An earlier quantized model in `out` is replaced; a 16-bit one is refused, and so is one with a
    correction that was fitted to other integers. Adapters are left out: `save_adapter` writes them,
    and what `QuantConfig.rank` made belongs in `out/correction`.

    Without `tokenizer`, that of the directory the model was loaded from is copied, if it has one.
    Every file but the tokenizer's is written atomically, and config.json last. Raises ValueError
    where the model is not quantized or fp16 cannot hold a scale, OSError where the disk is full.
    """
    check_kind("save: model", model, PreTrainedModel)
    if not isinstance(out, str | os.PathLike):
        raise ValueError(f"save: out: expected a path, got {type(out).__name__}")
    if tokenizer is not None:
        check_kind("save: tokenizer", tokenizer, PreTrainedTokenizerBase)
    with without_adapters(model):
        _save(model, Path(out), tokenizer, max_shard_bytes)


def _save(model: PreTrainedModel, out: Path, tokenizer: Any, max_shard_bytes: int | None) -> None:
    linears = quantized_linears(model)
    value = getattr(model.config, "quantization_config", None)
    if not linears or value is None:
        got = "one whose quantization did not end" if linears else "none of its linears quantized"
        raise ValueError(f"save: model: expected a quantized one, got {got}")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"save: max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    present, weights = out / "config.json", out / checkpoint.SINGLE_FILE
    if present.is_file():
        plain = "quantization_config" not in checkpoint.read_json(present)
    else:  # or a save was killed
        names = Checkpoint.from_file(weights).names() if weights.is_file() else [".qweight"]
        plain = not any(name.endswith(".qweight") for name in names)
    if plain:
        raise ValueError(f"save: {out}: expected no 16-bit model there, got one: not overwritten")
    config = GptqConfig.from_dict(value, where="save: model.config.quantization_config")
    any_zero = any(
        gptq.has_zero(linear.canonical()["qzeros"], bits=config.bits) for linear in linears.values()
    )
    config = replace(
        config, checkpoint_format=gptq.choose_format(sym=config.sym, any_zero=any_zero)
    )
    # Ranges are checked before the first byte is written.
    for path, linear in linears.items():
        gptq.half_scales(linear.scales.detach(), where=f"save: {path}")
    config = _with_hash(config, {path: lin.canonical for path, lin in linears.items()})
    correction = peft.find_correction(out)
    if correction is not None:
        base = peft.read(correction).metadata.get("base_sha256")
        if base != config.meta["base_sha256"]:
            raise ValueError(f"save: {correction}: belongs to other integers: move or delete it")
    entries: list[Entry] = []
    ties = tied_names(model)
    for path, linear in linears.items():
        entries += quantized_entries(saved_name(model, path), linear.canonical, config)
    entries += [
        Entry.of(saved_name(model, name), tensor.detach())
        for name, tensor in plain_tensors(model).items()
        if name not in ties
    ]
    model_config = deepcopy(model.config)
    model_config.dtype = model.dtype
    write_model(
        out,
        entries,
        model_config=model_config,
        gptq_config=config,
        generation_config=model.generation_config,
        tokenizer=_origin_tokenizer(model) if tokenizer is None else tokenizer,
        max_shard_bytes=max_shard_bytes,
    )


def _origin_tokenizer(model: PreTrainedModel) -> Any:
    origin = getattr(model.config, "name_or_path", "")
    if not origin or not Path(origin).exists():
        return None
    try:
        return load_tokenizer(origin)
    except ValueError:
        return None  # a model without a tokenizer is a model all the same


def quantized_entries(
    path: str, canonical: Callable[[], Mapping[str, torch.Tensor]], config: GptqConfig
) -> list[Entry]:
    """What to write for one linear; `canonical` (v2 zeros) is called once for each tensor."""

    def loader(name: str) -> Callable[[], torch.Tensor]:
        def load_one() -> torch.Tensor:
            tensor = canonical()[name]
            if name == "scales":
                return gptq.half_scales(tensor.detach().float(), where=path)
            if name == "qzeros" and config.checkpoint_format == gptq.V1:
                return gptq.v2_to_v1(tensor, bits=config.bits)
            return tensor

        return load_one

    return [
        Entry(
            f"{path}.{name}",
            torch.float16 if name == "scales" else tensor.dtype,
            tuple(tensor.shape),
            loader(name),
        )
        for name, tensor in canonical().items()
    ]


def base_hash(canonical: Mapping[str, Callable[[], Mapping[str, torch.Tensor]]]) -> str:
    """SHA-256 over qweight, qzeros (v2) and g_idx of all linears in sorted order of path."""
    digest = hashlib.sha256()
    for path in sorted(canonical):
        tensors = canonical[path]()
        for name in ("qweight", "qzeros", "g_idx"):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def packed_hash(model: PreTrainedModel) -> str | None:
    """The base_hash of a model, computed once and kept in its config; None if nothing is packed."""
    linears = quantized_linears(model)
    if not linears:
        return None
    config = model.config.quantization_config
    meta = config.setdefault("meta", {})
    replaced = [linear for linear in linears.values() if linear.integers_replaced]
    if "base_sha256" not in meta or replaced:
        for linear in replaced:
            linear.integers_replaced = False
        with without_adapters(model):
            named = quantized_linears(model)
            meta["base_sha256"] = base_hash({name: x.canonical for name, x in named.items()})
    return str(meta["base_sha256"])


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and up to 4,096 values of each tensor of a state_dict."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 4096)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_digest(config: PretrainedConfig) -> str:
    """SHA-256 over what a config says of a model, but for its name, its types and how it is
    quantized."""
    settings = config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "quantization_config"):
        settings.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def check_base(base: str, own: str | None, where: object) -> None:
    """ValueError where `base`, the hash that a file was made for, is not the model's own."""
    if base != own:
        raise ValueError(f"{where}: belongs to another base: its integers are not this model's")


def _with_hash(
    config: GptqConfig, canonical: Mapping[str, Callable[[], Mapping[str, torch.Tensor]]]
) -> GptqConfig:
    return replace(config, meta={**config.meta, "base_sha256": base_hash(canonical)})


def write_model(
    out: str | os.PathLike[str],
    entries: list[Entry],
    *,
    model_config: PretrainedConfig,
    gptq_config: GptqConfig,
    generation_config: GenerationConfig | None,
    tokenizer: Any,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a model directory; config.json comes last, so nothing half-written loads."""
    directory = Path(out)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: expected a directory, got a file")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    checkpoint.write_shards(directory, entries, max_shard_bytes=max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if generation_config is not None:
        generation = generation_config.to_diff_dict()
        checkpoint.write_json(directory / "generation_config.json", generation)
    quantization = gptq_config.to_dict()
    checkpoint.write_json(directory / "quantize_config.json", quantization)
    config = deepcopy(model_config)
    config.quantization_config = quantization
    config.architectures = config.architectures or [
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    ]
    checkpoint.write_json(directory / "config.json", _config_dict(config))


def _config_dict(config: PretrainedConfig) -> dict[str, Any]:
    value = config.to_diff_dict()
    value.pop("_name_or_path", None)
    return cast(dict[str, Any], value)

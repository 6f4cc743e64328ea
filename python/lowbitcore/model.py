"""Loading models, quantized or not, and saving quantized ones as GPTQ checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from lowbitcore import files
from lowbitcore.blocks import (
    linear_shape,
    plain_tensors,
    quantized_linears,
    set_module,
    without_adapters,
)
from lowbitcore.checks import check_integer, check_kind, check_path
from lowbitcore.formats import checkpoint, gptq, peft
from lowbitcore.formats.checkpoint import Checkpoint, Entry
from lowbitcore.formats.gptq import GptqConfig
from lowbitcore.nn import QuantLinear
from lowbitcore.provenance import base_hash, note_packed_hash
from lowbitcore.runtime import resolve_device
from lowbitcore.skeleton import (
    build_skeleton,
    check_names,
    fill,
    resolve_name,
    saved_name,
    tied_names,
)
from lowbitcore.source import (
    Source,
    Weights,
    load_generation_config,
    open_source,
    place,
    tokenizer_if_any,
)

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
    model = build_skeleton(source.config, chosen, source.weights)
    check_names(model, source)
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
        if base := source.gptq.meta.get("base_sha256"):
            note_packed_hash(model, str(base))
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
    where = f"{place(weights)}: {stem}"
    tensors: dict[str, torch.Tensor] = {}
    for name in (*gptq.SUFFIXES, *(["bias"] if bias else [])):
        if f"{stem}.{name}" in weights:
            tensors[name] = weights.tensor(f"{stem}.{name}").to(device)
        elif name != "g_idx":
            raise ValueError(f"{where}.{name}: missing")
    if bias:
        tensors["bias"] = tensors["bias"].to(dtype)
    try:
        layer = QuantLinear(
            in_features,
            out_features,
            bits=config.bits,
            group_size=config.group_size,
            bias=bias,
            device="meta",
        )
        layer.set_canonical(**gptq.with_v2_zeros(tensors, config))
    except ValueError as error:
        raise ValueError(
            f"{where}.{str(error).removeprefix('QuantLinear: ')} (by config.json {config.bits} "
            f"bits, group_size {config.group_size})"
        ) from error
    return layer


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
    check_saving("save", model, out, tokenizer, max_shard_bytes)
    with without_adapters(model):
        _save(model, Path(out), tokenizer, max_shard_bytes)


def check_saving(
    where: str, model: object, out: object, tokenizer: object, max_shard_bytes: object
) -> None:
    """ValueError for what no model can be written from, or to."""
    check_kind(f"{where}: model", model, PreTrainedModel)
    check_path(f"{where}: out", out)
    if tokenizer is not None:
        check_kind(f"{where}: tokenizer", tokenizer, PreTrainedTokenizerBase)
    if max_shard_bytes is not None:
        check_integer(f"{where}: max_shard_bytes", max_shard_bytes, least=1)


def _save(model: PreTrainedModel, out: Path, tokenizer: Any, max_shard_bytes: int | None) -> None:
    linears = quantized_linears(model)
    value = getattr(model.config, "quantization_config", None)
    if not linears or value is None:
        got = "one whose quantization did not end" if linears else "none of its linears quantized"
        raise ValueError(f"save: model: expected a quantized one, got {got}")
    present, weights = out / "config.json", out / checkpoint.SINGLE_FILE
    if present.is_file():
        plain = "quantization_config" not in files.read_json(present)
    else:  # or a save was killed
        names = Checkpoint.from_file(weights).names() if weights.is_file() else [".qweight"]
        plain = not any(name.endswith(".qweight") for name in names)
    if plain:
        raise ValueError(f"save: {out}: expected no 16-bit model there, got one: not overwritten")
    config = GptqConfig.from_dict(value, where="save: model.config.quantization_config")
    for path, linear in linears.items():
        if (linear.bits, linear.group_size) != (config.bits, config.group_size):
            raise ValueError(
                f"save: {path}: expected {config.bits} bits and group_size {config.group_size} by "
                f"model.config, got {linear.bits} and {linear.group_size}: is its config another "
                "model's, too?"
            )
    any_zero = any(
        gptq.has_zero(linear.canonical()["qzeros"], bits=config.bits) for linear in linears.values()
    )
    config = replace(
        config, checkpoint_format=gptq.choose_format(sym=config.sym, any_zero=any_zero)
    )
    # Ranges are checked before the first byte is written.
    for path, linear in linears.items():
        gptq.half_scales(linear.scales.detach(), where=f"save: {path}")
    base = base_hash({path: linear.canonical for path, linear in linears.items()})
    config = replace(config, meta={**config.meta, "base_sha256": base})
    correction = peft.find_correction(out)
    if correction is not None and peft.read(correction).metadata.get("base_sha256") != base:
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
        tokenizer=origin_tokenizer(model) if tokenizer is None else tokenizer,
        max_shard_bytes=max_shard_bytes,
    )


def origin_tokenizer(model: PreTrainedModel) -> Any:
    """That of the directory the model was loaded from, if it has one."""
    origin = getattr(model.config, "name_or_path", "")
    if not origin or not Path(origin).exists():
        return None
    return tokenizer_if_any(origin)


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


def write_model(
    out: str | os.PathLike[str],
    entries: list[Entry],
    *,
    model_config: PretrainedConfig,
    gptq_config: GptqConfig | None,
    generation_config: GenerationConfig | None,
    tokenizer: Any,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a model directory; config.json comes last, so nothing half-written loads."""
    directory = Path(out)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: expected a directory, got a file")
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.write_shards(
        directory,
        entries,
        max_shard_bytes=max_shard_bytes,
        # Where the disk is full before, what is there stays a model.
        before_replacing=lambda: (directory / "config.json").unlink(missing_ok=True),
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if generation_config is not None:
        generation = generation_config.to_diff_dict()
        files.write_json(directory / "generation_config.json", generation)
    config = deepcopy(model_config)
    if gptq_config is not None:
        config.quantization_config = gptq_config.to_dict()
        files.write_json(directory / "quantize_config.json", config.quantization_config)
    config.architectures = config.architectures or [
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    ]
    stored = config.to_diff_dict()
    stored.pop("_name_or_path", None)
    files.write_json(directory / "config.json", stored)

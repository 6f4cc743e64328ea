"""Quantizing models in memory; `streaming` does the same to checkpoints, with the same engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lowbitcore.blocks import (
    BlockLayout,
    adapted_linears,
    evaluating,
    find_blocks,
    quantizable,
    quantized_linears,
    set_module,
)
from lowbitcore.calibration import (
    Calibration,
    checked_windows,
)
from lowbitcore.checks import check_kind
from lowbitcore.engine import Report, all_finite, check_weights, engine_for
from lowbitcore.formats import gptq, peft
from lowbitcore.lora import add_adapter
from lowbitcore.modeling import use_own_operations
from lowbitcore.quant_config import QuantConfig
from lowbitcore.runtime import resolve_device


def compute_dtype(model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of calibration forwards: bfloat16 where that loses nothing and is fast.

    bf16 weights run as they are on CUDA and on CPUs with AVX512-BF16 or AMX (Zen 5, 2 cores: 310 to
    390 GFLOP/s against 70 to 100 in fp32); everything else, fp16 included, runs in fp32.
    """
    fast = (
        device.type == "cuda"
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if model_dtype == torch.bfloat16 and fast else torch.float32


def calibration_for(
    config: QuantConfig,
    calibration: Any,
    load_tokenizer: Callable[[], Any],
    model_config: Any,
) -> torch.Tensor:
    """The checked windows, int64 [n, length]; none where the method uses none."""
    check_kind("quantize: config", config, QuantConfig)
    if config.method == "rtn":
        return torch.empty(0, 0, dtype=torch.int64)
    return checked_windows(calibration, load_tokenizer, model_config)


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel,
    tokenizer: Any,
    calibration: Any,
    config: QuantConfig,
    *,
    progress: bool = True,
) -> PreTrainedModel:
    """Quantizes the linears of a model's blocks in place, where the model is, and returns it.

    `calibration`: int64 [n, length], a list of 1-D tensors of one length, or the path of a text
    file (128 windows of up to 2048 tokens; the only use of `tokenizer`); unused by method "rtn".
    `model.quantization_report` says what was done. Raises ValueError for bad input, and where
    states come out that are not finite; a model in which blocks were quantized by then is of no
    further use.
    """
    check_kind("quantize_model: model", model, PreTrainedModel)
    if model.get_output_embeddings() is None:
        got = type(model).__name__
        raise ValueError(f"quantize_model: model: expected a causal language model, got a {got}")
    if quantized_linears(model):
        raise ValueError("quantize_model: model: expected an unquantized one, got a quantized one")
    if adapted_linears(model):
        raise ValueError(
            "quantize_model: model: expected one without adapters, got some (save_dequantized "
            "merges them into its weights)"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        got = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"quantize_model: model: expected it on one device, got {got}")
    device = resolve_device(devices.pop())
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"quantize_model: model: expected float32 or 16 bits, got {model.dtype}")
    layout = find_blocks(model)
    windows = calibration_for(config, calibration, lambda: tokenizer, model.config)
    # Here and not block by block: an error should leave the caller's model as it was.
    for index, block in enumerate(layout.modules):
        check_weights(f"{layout.prefix}.{index}", quantizable(block))
        for name, parameter in block.named_parameters():
            if parameter.dim() > 2 and not all_finite(parameter):  # experts, not yet apart
                raise ValueError(f"quantize: {layout.prefix}.{index}.{name}: holds NaN or Inf")
    use_own_operations(model)
    dtype = compute_dtype(model.dtype, device)
    report = Report(tokens=windows.numel())
    with evaluating(model):
        first = layout.modules[0]
        kept = _to_compute(first, model.dtype, dtype)
        with report.timing("forward"):
            state = None
            if config.method != "rtn":
                state = Calibration(model, layout, windows.to(device), dtype)
        engine = engine_for(config, state, layout, dtype, report)
        for index in each_block(layout, progress):
            block = layout.modules[index]
            if index:
                kept = _to_compute(block, model.dtype, dtype)
            linears = engine.quantize(index)
            for path, (linear, _) in linears.items():
                set_module(block, path, linear)
            _restore(block, kept, model.dtype)
            for path, (_, correction) in linears.items():
                if correction is not None:
                    a, b, scaling = peft.settled(correction)
                    adapter = add_adapter(block, path, rank=len(a), scaling=scaling)
                    adapter.a.copy_(a)
                    adapter.b.copy_(b)
                    adapter.requires_grad_(False)
    excluded = gptq.exclusions(layout.prefix, len(layout.modules), report.skipped)
    stored = replace(config.gptq_config(), excluded=excluded)
    model.config.quantization_config = stored.to_dict()
    model.quantization_report = report
    return model


def each_block(layout: BlockLayout, progress: bool) -> Iterator[int]:
    bar = tqdm(range(len(layout.modules)), desc="quantizing", unit="block", disable=not progress)
    return iter(bar)


def _to_compute(block: nn.Module, model_dtype: torch.dtype, dtype: torch.dtype) -> list[str]:
    """Widens a block's parameters to the compute dtype; the names of those it changed."""
    if model_dtype == dtype:
        return []
    names = [name for name, item in block.named_parameters() if item.dtype == model_dtype]
    for name in names:
        block.get_parameter(name).data = block.get_parameter(name).data.to(dtype)
    return names


def _restore(block: nn.Module, names: Sequence[str], model_dtype: torch.dtype) -> None:
    remaining = dict(block.named_parameters())
    for name in names:
        if name in remaining:  # quantized weights are gone
            remaining[name].data = remaining[name].data.to(model_dtype)

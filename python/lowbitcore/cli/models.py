"""Commands that make, measure and describe models."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowbitcore.cli.app import (
    AdapterBits,
    Adapters,
    Device,
    Dtype,
    Json,
    Model,
    app,
    emit,
    load_model,
    megabytes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lowbitcore.engine import Report
    from lowbitcore.quant_config import QuantConfig
    from lowbitcore.summary import Summary


# Options of quantize that say nothing to --method rtn.
_OF_GPTQ = (
    *("act_order", "no_true_sequential", "damp", "calib", "samples", "length", "seed"),
    *("rank", "adapter_bits", "tune_epochs"),
)


@app.command()
def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Directory to write; must be new or unfinished."),
    ],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")],
    group_size: Annotated[int, typer.Option(help="A multiple of 32, or -1 for whole rows.")] = 64,
    method: Annotated[Literal["gptq", "rtn"], typer.Option(help="rtn needs no data.")] = "gptq",
    sym: Annotated[bool, typer.Option("--sym", help="Symmetric grids (vLLM wants them).")] = False,
    act_order: Annotated[
        Literal["static", "dynamic", "none"],
        typer.Option(help="Order of columns: static keeps plain groups, dynamic writes g_idx."),
    ] = "static",
    no_true_sequential: Annotated[
        bool,
        typer.Option(
            "--no-true-sequential", help="Calibrate a block's linears all on unquantized inputs."
        ),
    ] = False,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|hf:NAME|self",
            help="Calibration text: a file, a hub data set, or text the model writes itself.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens in a window (default: 2048, or what the model can take)."),
    ] = None,
    rank: Annotated[
        int,
        typer.Option(
            help="Of an adapter in OUT/correction, fitted along with the integers, which are then "
            "to be used with it (--adapter OUT/correction).",
            min=0,
        ),
    ] = 0,
    adapter_bits: AdapterBits = 8,
    tune_epochs: Annotated[
        int,
        typer.Option(
            help="Passes over the calibration windows, a step each, in which each block's "
            "integers, scales and adapter train to put out what the 16-bit block does (try 4).",
            min=0,
        ),
    ] = 0,
    damp: Annotated[float, typer.Option(help="Damping, a fraction of the mean diagonal.")] = 0.01,
    seed: Annotated[
        int, typer.Option(help="Of the calibration windows.", min=0, max=2**32 - 1)
    ] = 0,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run was.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model into a GPTQ checkpoint, block by block."""
    from lowbitcore.quant_config import QuantConfig
    from lowbitcore.runtime import resolve_device
    from lowbitcore.streaming import check_output, quantize_checkpoint

    if method == "rtn":
        for name in _OF_GPTQ:
            given = context.get_parameter_source(name)
            if given is not None and given.name == "COMMANDLINE":
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: expected none with --method rtn, which uses no data")
    config = QuantConfig(
        bits=bits,
        group_size=group_size,
        sym=sym,
        method=method,
        act_order=act_order,
        true_sequential=not no_true_sequential,
        percdamp=damp,
        rank=rank,
        adapter_bits=adapter_bits,
        tune_epochs=tune_epochs,
    )
    resolve_device(device)  # before text is made for it
    check_output(out, resume=resume)
    windows = None
    if method == "gptq":
        if calib is None:
            raise ValueError("--calib: expected a text file, hf:NAME or self (or --method rtn)")
        windows = _calibration(model, calib, samples, length, seed, device)
    start = time.perf_counter()
    report = quantize_checkpoint(model, out, windows, config, device=device, resume=resume)
    seconds = time.perf_counter() - start
    emit(as_json, *_describe_report(report, config, out, seconds))


def _calibration(
    model: str, calib: str, samples: int, length: int | None, seed: int, device: str
) -> Tensor:
    from lowbitcore import data
    from lowbitcore.calibration import default_length
    from lowbitcore.checks import check_length
    from lowbitcore.source import load_tokenizer, open_source

    source = open_source(model)
    if source.gptq is not None:  # said before the model writes text for hours
        raise ValueError(f"{model}: is quantized already")
    length = default_length(source.config) if length is None else length
    check_length("--length", length, source.config)
    tokenizer = load_tokenizer(model)
    if calib == "self":
        writer = load_model(model, "auto", device)
        return data.sample_from_model(writer, tokenizer, samples=samples, length=length, seed=seed)
    texts = data.hub_texts(calib[3:]) if calib.startswith("hf:") else data.read_texts(calib)
    return data.calibration_windows(texts, tokenizer, samples=samples, length=length, seed=seed)


def _describe_report(
    report: Report, config: QuantConfig, out: Path, seconds: float
) -> tuple[dict[str, Any], list[str]]:
    from lowbitcore.formats import peft

    losses = [item.loss for item in report.linears if item.loss is not None]
    raised = report.raised_damping(config)
    result = {
        "out": str(out),
        "linears": len(report.linears),
        "skipped": report.skipped,
        "raised_damping": {item.path: item.percdamp for item in raised},
        "mean_loss": sum(losses) / len(losses) if losses else None,
        "blocks": [asdict(item) for item in report.blocks],
        "bytes": report.bytes,
        "phases": report.seconds,
        "seconds": seconds,
    }
    lines = [
        f"{out}: {len(report.linears)} linears, {megabytes(report.bytes['original'])} -> "
        f"{megabytes(report.bytes['quantized'])}, {seconds:.1f} s "
        f"({', '.join(f'{name} {value:.1f}' for name, value in report.seconds.items())})"
    ]
    if losses:
        untuned = ", before tuning" if report.blocks else ""
        lines.append(
            f"mean relative error of the linears' outputs{untuned}: {result['mean_loss']:.4f}"
        )
    if report.blocks:
        before, after = (
            mean(getattr(item, name) for item in report.blocks) for name in ("before", "error")
        )
        lines.append(f"mean relative error of the blocks' outputs: {before:.4f}, tuned {after:.4f}")
    lines += [f"tuning made no better: {item.path}" for item in report.blocks if item.stayed]
    silent = sum(item.loss is None for item in report.linears) if config.method == "gptq" else 0
    if silent:
        lines.append(f"rounded to nearest, as no calibration token came to them: {silent} linears")
    if config.rank:
        lines.append(f"to be used with its correction: --adapter {out / peft.CORRECTION}")
    lines += [f"damping of {item.path} was raised to {item.percdamp}" for item in raised]
    lines += [f"kept in 16 bits: {path} ({reason})" for path, reason in report.skipped.items()]
    return result, lines


@app.command()
def dequantize(
    model: Annotated[str, typer.Argument(metavar="QMODEL", help="A quantized model directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; new.")],
    adapter: Adapters = None,
    dtype: Annotated[
        Literal["auto", "bf16", "fp32"],
        typer.Option(help="Type of the weights (auto: that of those which are not quantized)."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Write a quantized model as an ordinary one, for programs that know no packed weights.

    Adapters that are given are merged into it. PEFT puts them on a model written without them.
    """
    from lowbitcore.dequantize import save_dequantized

    save_dequantized(load_model(model, dtype, "cpu", adapter), out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    emit(as_json, {"out": str(out), "bytes": size}, [f"{out}: {megabytes(size)}"])


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="A text, or .json/.jsonl of texts, which are joined.")],
    context: Annotated[
        int | None,
        typer.Option(help="Tokens in a window (default: 1024, or what the model can take)."),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="At most so many windows.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows (default: context, no overlap).")
    ] = None,
    adapter: Adapters = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity on a text.

    The text is cut into full windows, each scored on its last context - 1 tokens."""
    from lowbitcore import data
    from lowbitcore.evaluate import perplexity
    from lowbitcore.source import load_tokenizer

    content = "\n\n".join(data.read_texts(text))
    result = perplexity(
        load_model(model, dtype, device, adapter),
        load_tokenizer(model),
        content,
        context=context,
        windows=windows,
        stride=stride,
    )
    line = f"perplexity {result.ppl:.3f} ({result.tokens} tokens in {result.windows} windows)"
    emit(as_json, result._asdict(), [line])


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in a chat.")] = False,
    adapter: Adapters = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, greedily."""
    from transformers import TextStreamer

    from lowbitcore.generate import complete
    from lowbitcore.source import load_tokenizer

    loaded = load_model(model, dtype, device, adapter)
    tokenizer = load_tokenizer(model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    text, tokens = complete(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat, streamer=streamer
    )
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens, {tokens / seconds:.1f} a second", file=sys.stderr)
    emit(as_json, {"text": text, "tokens": tokens, "seconds": seconds}, [])


@app.command()
def info(
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="A model, as elsewhere.")
    ] = None,
    device: Annotated[
        bool, typer.Option("--device", help="What this machine and build can do.")
    ] = False,
    adapter: Adapters = None,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds and who can load it, or what this machine can do."""
    if device == (path is not None):
        raise ValueError("info: expected either PATH or --device")
    if device and adapter:
        raise ValueError("info: --adapter: expected PATH with it, not --device")
    if path is None:
        emit(as_json, *_describe_device())
    else:
        emit(as_json, *_describe_model(path, adapter or []))


def _describe_device() -> tuple[dict[str, Any], list[str]]:
    import torch

    from lowbitcore import __version__, runtime

    devices, why_no_cuda = runtime.cuda_devices(), runtime.why_no_cuda()
    result = {
        "version": __version__,
        "isa": runtime.isa(),
        "available_isas": runtime.available_isas(),
        "isa_reason": runtime.isa_reason(),
        "threads": runtime.num_threads(),
        "cuda": runtime.cuda_status(),
        "cuda_devices": [device._asdict() for device in devices],
        "why_no_cuda": why_no_cuda,
        "torch": torch.__version__,
        "cmake_dir": runtime.cmake_dir(),
    }
    return result, [
        f"lowbitcore {__version__}, torch {torch.__version__}",
        f"instruction set: {result['isa']} ({result['isa_reason']}; available: "
        f"{', '.join(runtime.available_isas())})",
        f"threads: {result['threads']}",
        f"CUDA: {result['cuda']}",
        *(
            f"  cuda:{index}: {item.name}, {item.architecture}, {item.memory / 1e9:.1f} GB, "
            f"{item.why_not or 'has kernels'}"
            for index, item in enumerate(devices)
        ),
        f"--device cuda: {'yes' if why_no_cuda is None else f'no: {why_no_cuda}'}",
        f"CMake package: {result['cmake_dir']}",
    ]


def _describe_model(path: str, adapters: list[str]) -> tuple[dict[str, Any], list[str]]:
    from lowbitcore.formats.gptq import compatible_loaders
    from lowbitcore.summary import summarize

    summary = summarize(path)
    result: dict[str, Any] = summary._asdict()
    lines = [
        f"{path}: {summary.architecture}, {summary.parameters / 1e6:,.1f} M parameters, "
        f"{megabytes(summary.total_bytes)} of tensors"
    ]
    if summary.gptq is None and adapters:
        raise ValueError(f"--adapter: expected a quantized model with it, got {path}")
    if summary.gptq is None:
        lines.append(f"not quantized ({summary.dtype})")
    else:
        config = summary.gptq
        result["gptq"] = config.to_dict()
        loaders = compatible_loaders(config, summary.in_features, summary.experts)
        result["loaders"] = {item.name: item.reason or "loads" for item in loaders}
        lines += [
            f"{config.bits} bits, group_size {config.group_size}, "
            f"{'symmetric' if config.sym else 'asymmetric'}, desc_act {config.desc_act}, "
            f"{config.checkpoint_format}",
            f"{summary.quantized_linears} quantized linears with "
            f"{summary.quantized_weights / 1e6:,.1f} M weights in "
            f"{megabytes(summary.quantized_bytes)}: {summary.effective_bits:.3f} bits a weight, "
            f"{16 / summary.effective_bits:.2f} times smaller than 16 bits",
            *_describe_adapters(path, summary, adapters, result),
            f"whole model: {summary.total_bytes * 8 / summary.parameters:.3f} bits a parameter",
            f"trainable by PEQA (scales): {summary.scales / 1e6:,.3f} M",
            "who can load it:",
        ]
        lines += [f"  {item.name}: {item.reason or 'yes'}" for item in loaders]
    return result, lines


def _describe_adapters(
    path: str, summary: Summary, adapters: list[str], result: dict[str, Any]
) -> Iterator[str]:
    from lowbitcore.formats import peft
    from lowbitcore.source import local_path
    from lowbitcore.summary import adapter_bytes

    correction = peft.find_correction(local_path(path))
    if correction is not None and not adapters:
        yield f"to be used with its correction: --adapter {correction}"
    total = summary.quantized_bytes
    for directory in adapters:
        size = adapter_bytes(directory, summary)
        total += size
        bits = result["bits_with_adapters"] = 8 * total / summary.quantized_weights
        yield f"with {directory}, {megabytes(size)}: {bits:.3f} bits a weight"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for models, chart and results.")] = Path(
        "lowbitcore-demo"
    ),
    minutes: Annotated[float, typer.Option(help="What training the 2-bit model may take.")] = 5.0,
    calib: Annotated[
        str,
        typer.Option(
            metavar="FILE|hf:NAME|self", help="Calibration text; self: the model writes it."
        ),
    ] = "self",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Quantize a real model to 4, 3 and 2 bits, and repair it (10 to 20 minutes)."""
    from lowbitcore.demo import run

    if not (minutes > 0 and minutes < float("inf")):
        raise ValueError(f"--minutes: expected a positive number, got {minutes}")
    result, lines = run(
        out,
        lambda model: _calibration(model, calib, 32, 256, 0, device),
        minutes=minutes,
        device=device,
    )
    emit(as_json, result, lines)

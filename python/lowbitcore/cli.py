"""The command line: results on stdout, progress on stderr; ``--json`` ends with one object."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from transformers import PreTrainedModel

    from .quantize import QuantConfig, Report
    from .recipes import Recipe

app = typer.Typer(
    help="Fine-tune and repair low-bit language models while they stay packed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it and exit."
        ),
    ] = False,
) -> None:
    pass


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model directory (16-bit or quantized), a hub id or a .gguf file."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, last on stdout.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to compute.")]
Dtype = Annotated[
    Literal["auto", "bf16", "fp32"],
    typer.Option(help="Type of activations and of all weights that are not packed."),
]


def _emit(as_json: bool, result: dict[str, Any], lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
    if as_json:
        print(json.dumps(result))


Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="A LoRA adapter (ours or PEFT's) or a scales file's directory; more are stacked.",
    ),
]


def _load(model: str, dtype: str, device: str, adapter: list[str] | None = None) -> PreTrainedModel:
    from . import model as models
    from . import runtime
    from .adapters import load_adapter

    if device == "cuda":
        raise ValueError(
            f"--device: expected cpu (CUDA: {runtime.cuda_status()}; there are no kernels for it "
            "yet), got cuda"
        )
    names = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}
    loaded = models.load(model, dtype=names[dtype], device=device)
    for directory in adapter or []:
        load_adapter(loaded, directory)
    loaded.eval()
    return loaded


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


# ---- quantize ------------------------------------------------------------------------------------


@app.command()
def quantize(
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
    damp: Annotated[float, typer.Option(help="Damping, a fraction of the mean diagonal.")] = 0.01,
    seed: Annotated[
        int, typer.Option(help="Of the calibration windows.", min=0, max=2**63 - 1)
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run was.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model into a GPTQ checkpoint, block by block."""
    from .quantize import QuantConfig
    from .streaming import check_output, quantize_checkpoint

    config = QuantConfig(
        bits=bits,
        group_size=group_size,
        sym=sym,
        method=method,
        act_order=act_order,
        true_sequential=not no_true_sequential,
        percdamp=damp,
    )
    check_output(out, resume=resume)  # before text is made for it
    windows = None
    if method == "gptq":
        if calib is None:
            raise ValueError("--calib: expected a text file, hf:NAME or self (or --method rtn)")
        windows = _calibration(model, calib, samples, length, seed)
    elif calib is not None:
        raise ValueError("--calib: expected none with --method rtn, which uses no data")
    start = time.perf_counter()
    report = quantize_checkpoint(model, out, windows, config, resume=resume)
    seconds = time.perf_counter() - start
    _emit(as_json, *_describe_report(report, config, out, seconds))


def _calibration(model: str, calib: str, samples: int, length: int | None, seed: int) -> Tensor:
    from . import data
    from . import model as models
    from .summary import summarize

    limit = summarize(model).max_length
    if length is None:
        length = min(2048, limit or 2048)
    elif limit is not None and length > limit:
        raise ValueError(f"--length: expected at most {limit} for this model, got {length}")
    tokenizer = models.load_tokenizer(model)
    if calib == "self":
        writer = _load(model, "auto", "cpu")
        return data.sample_from_model(writer, tokenizer, samples=samples, length=length, seed=seed)
    texts = data.hub_texts(calib[3:]) if calib.startswith("hf:") else data.read_texts(calib)
    return data.calibration_windows(texts, tokenizer, samples=samples, length=length, seed=seed)


def _describe_report(
    report: Report, config: QuantConfig, out: Path, seconds: float
) -> tuple[dict[str, Any], list[str]]:
    losses = [item.loss for item in report.linears if item.loss is not None]
    raised = report.raised_damping(config)
    result = {
        "out": str(out),
        "linears": len(report.linears),
        "skipped": report.skipped,
        "raised_damping": {item.path: item.percdamp for item in raised},
        "mean_loss": sum(losses) / len(losses) if losses else None,
        "bytes": report.bytes,
        "phases": report.seconds,
        "seconds": seconds,
    }
    lines = [
        f"{out}: {len(report.linears)} linears, {_megabytes(report.bytes['original'])} -> "
        f"{_megabytes(report.bytes['quantized'])}, {seconds:.1f} s "
        f"({', '.join(f'{name} {value:.1f}' for name, value in report.seconds.items())})"
    ]
    if losses:
        lines.append(f"mean relative error of the linears' outputs: {result['mean_loss']:.4f}")
    lines += [f"damping of {item.path} was raised to {item.percdamp}" for item in raised]
    lines += [f"kept in 16 bits: {path} ({reason})" for path, reason in report.skipped.items()]
    return result, lines


# ---- use -----------------------------------------------------------------------------------------


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text file; its documents are joined.")],
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
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
    from . import data
    from . import model as models
    from .evaluate import perplexity

    content = "\n\n".join(data.read_texts(text))
    result = perplexity(
        _load(model, dtype, device, adapter),
        models.load_tokenizer(model),
        content,
        context=context,
        windows=windows,
        stride=stride,
    )
    line = f"perplexity {result.ppl:.3f} ({result.tokens} tokens in {result.windows} windows)"
    _emit(as_json, result._asdict(), [line])


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

    from . import model as models
    from .generate import complete

    loaded = _load(model, dtype, device, adapter)
    tokenizer = models.load_tokenizer(model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    text, tokens = complete(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat, streamer=streamer
    )
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens, {tokens / seconds:.1f} a second", file=sys.stderr)
    _emit(as_json, {"text": text, "tokens": tokens, "seconds": seconds}, [])


# ---- training ------------------------------------------------------------------------------------

Packed = Annotated[str, typer.Argument(metavar="QMODEL", help="A quantized model directory.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory for what is learnt; new.")]
Data = Annotated[
    str, typer.Option(metavar="FILE", help="Text, or .json/.jsonl with text or Alpaca's fields.")
]
Steps = Annotated[int | None, typer.Option(help="Train for so many steps, or")]
Tokens = Annotated[int | None, typer.Option(help="on so many tokens, or")]
Minutes = Annotated[float | None, typer.Option(help="for so long.")]
Length = Annotated[int, typer.Option(help="Tokens in a sequence, at most.")]
Batch = Annotated[int, typer.Option(help="Sequences in a step.")]
MicroBatch = Annotated[
    int | None, typer.Option(help="Sequences at a time (default: all of a step's).")
]
Rate = Annotated[float, typer.Option(help="Learning rate of AdamW, after warming up.")]
Seed = Annotated[
    int,
    typer.Option(help="Of the order of the data and what starts at random.", min=0, max=2**63 - 1),
]
EvalText = Annotated[
    str | None, typer.Option(metavar="FILE", help="Text to measure the perplexity on.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a killed run was.")]
Under = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="DIR", help="A trained adapter to build upon, frozen."),
]
Rank = Annotated[int, typer.Option(help="Rank of the adapter.")]
Checkpoints = Annotated[
    Literal["selective", "full", "none"],
    typer.Option(
        "--checkpointing",
        help="What of a forward is kept for its backward: products and attention; next to nothing, "
        "for the least memory; all, for the most speed.",
    ),
]


@app.command()
def peqa(
    model: Packed,
    out: Out,
    data: Data,
    steps: Steps = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    length: Length = 512,
    batch: Batch = 2,
    micro_batch: MicroBatch = None,
    lr: Rate = 1e-4,
    seed: Seed = 0,
    eval_text: EvalText = None,
    resume: Resume = False,
    adapter: Under = None,
    checkpointing: Checkpoints = "selective",
    as_json: Json = False,
) -> None:
    """Train the scales of a packed model (PEQA).

    OUT gets scales.safetensors, which any command takes as --adapter OUT.
    """
    from .recipes import Recipe, Schedule

    schedule = Schedule(
        data,
        steps,
        tokens,
        minutes,
        length,
        batch,
        micro_batch,
        lr,
        seed,
        eval_text=eval_text,
        checkpointing=checkpointing,
    )
    _train(Recipe(model, schedule, adapters=tuple(adapter or ())), out, resume, as_json)


@app.command()
def emef(
    model: Packed,
    out: Out,
    data: Data,
    rank: Rank = 8,
    alpha: Annotated[float, typer.Option(help="The adapter counts alpha / rank times.")] = 16,
    targets: Annotated[str, typer.Option(help="Linears to adapt, by name.")] = "q_proj,v_proj",
    dropout: Annotated[float, typer.Option(help="Of the adapter's input.")] = 0.05,
    mask_prompt: Annotated[
        bool, typer.Option("--mask-prompt", help="Learn answers alone, not instructions.")
    ] = False,
    steps: Steps = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    length: Length = 512,
    batch: Batch = 2,
    micro_batch: MicroBatch = None,
    lr: Rate = 3e-4,
    seed: Seed = 0,
    eval_text: EvalText = None,
    resume: Resume = False,
    adapter: Under = None,
    checkpointing: Checkpoints = "selective",
    as_json: Json = False,
) -> None:
    """Fine-tune a packed model with LoRA (EMEF).

    OUT gets an adapter in PEFT's format.
    """
    from .recipes import Lora, Recipe, Schedule

    schedule = Schedule(
        data,
        steps,
        tokens,
        minutes,
        length,
        batch,
        micro_batch,
        lr,
        seed,
        mask_prompt=mask_prompt,
        eval_text=eval_text,
        checkpointing=checkpointing,
    )
    lora = Lora(rank, alpha, tuple(targets.split(",")), dropout)
    _train(Recipe(model, schedule, lora, adapters=tuple(adapter or ())), out, resume, as_json)


@app.command()
def lrec(
    model: Packed,
    out: Out,
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="The 16-bit model.")],
    data: Data,
    rank: Rank = 8,
    lambda_kl: Annotated[float, typer.Option(help="Weight of the KL divergence.")] = 1.0,
    lambda_ce: Annotated[float, typer.Option(help="Weight of the cross-entropy.")] = 0.1,
    kl: Annotated[
        Literal["forward", "reverse"],
        typer.Option(help="forward: KL(teacher || student); reverse: the other way round."),
    ] = "forward",
    cache: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Run the teacher once and keep its states here."),
    ] = None,
    steps: Steps = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    length: Length = 512,
    batch: Batch = 2,
    micro_batch: MicroBatch = None,
    lr: Rate = 3e-4,
    seed: Seed = 0,
    eval_text: EvalText = None,
    resume: Resume = False,
    adapter: Under = None,
    checkpointing: Checkpoints = "selective",
    as_json: Json = False,
) -> None:
    """Repair a packed model with LoRA on every linear (LREC).

    OUT gets an adapter in PEFT's format that brings the model's output near its teacher's.
    """
    from .recipes import Lora, Recipe, Schedule, Teacher

    schedule = Schedule(
        data,
        steps,
        tokens,
        minutes,
        length,
        batch,
        micro_batch,
        lr,
        seed,
        eval_text=eval_text,
        checkpointing=checkpointing,
    )
    recipe = Recipe(
        model,
        schedule,
        Lora(rank, rank, None, 0.0),
        Teacher(teacher, lambda_kl, lambda_ce, kl, cache),
        tuple(adapter or ()),
    )
    _train(recipe, out, resume, as_json)


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model; its config.json is enough.")
    ],
    method: Annotated[Literal["peqa", "emef", "lrec"], typer.Option(help="What to train.")],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")],
    group_size: Annotated[int, typer.Option(help="A multiple of 32, or -1 for whole rows.")] = 64,
    rank: Rank = 8,
    targets: Annotated[
        str | None, typer.Option(help="Linears that emef adapts (default: q_proj,v_proj).")
    ] = None,
    length: Length = 512,
    micro_batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    tokens: Annotated[int, typer.Option(help="Of lrec's data, for the teacher's cache.")] = 100_000,
    memory: Annotated[
        str | None, typer.Option(metavar="8GB", help="What there is (default: this machine's).")
    ] = None,
    checkpointing: Checkpoints = "selective",
    as_json: Json = False,
) -> None:
    """What a training will need, before anything is loaded."""
    from . import plan as plans
    from .model import read_config

    result = plans.plan(
        read_config(model),
        method=method,
        bits=bits,
        group_size=group_size,
        rank=rank,
        targets=None if targets is None else targets.split(","),
        length=length,
        micro_batch=micro_batch,
        tokens=tokens,
        memory=plans.parse_memory(memory),
        checkpointing=checkpointing,
    )
    rows = [
        ("weights, packed", result.weights_bytes),
        ("adapter and optimizer", result.optimizer_bytes),
        (f"activations, {micro_batch} x {length} tokens", result.activation_bytes),
        ("loss", result.loss_bytes),
        ("kept by the C library's heap", result.held_bytes),
        ("Python and its libraries", result.runtime_bytes),
        ("peak", result.peak_bytes),
    ]
    lines = [f"{name:<34}{size / 1e9:>9.3f} GB" for name, size in rows]
    lines.append(f"trainable parameters: {result.trainable_parameters:,}")
    if method == "lrec":
        lines.append(
            f"teacher cache on disk for {tokens:,} tokens: {result.cache_bytes / 1e9:.3f} GB"
        )
    lines.append(
        f"{'fits' if result.fits else 'does not fit'}; the largest micro-batch that does: "
        f"{result.largest_micro_batch}"
    )
    _emit(as_json, result._asdict(), lines)


def _train(recipe: Recipe, out: Path, resume: bool, as_json: bool) -> None:
    from .recipes import train

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    result = train(recipe, out, resume=resume, say=say)
    if result is None:
        return
    ppl = "" if result["ppl"] is None else f", perplexity {result['ppl']:.3f}"
    speed = result["tokens"] / result["training_seconds"]
    line = (
        f"{out}: {result['tokens']:,} tokens in {result['steps']} steps, {speed:,.0f} tokens a "
        f"second, loss {result['loss']:.4f}{ppl}; {_megabytes(result['adapter_bytes'])}"
    )
    _emit(as_json, result, [line])


# ---- info ----------------------------------------------------------------------------------------


@app.command()
def info(
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="A model, as elsewhere.")
    ] = None,
    device: Annotated[
        bool, typer.Option("--device", help="What this machine and build can do.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds and who can load it, or what this machine can do."""
    if device == (path is not None):
        raise ValueError("info: expected either PATH or --device")
    if path is None:
        _emit(as_json, *_describe_device())
    else:
        _emit(as_json, *_describe_model(path))


def _describe_device() -> tuple[dict[str, Any], list[str]]:
    import torch

    from . import __version__, runtime

    forced = os.environ.get("LOWBITCORE_ISA")
    result = {
        "version": __version__,
        "isa": runtime.isa(),
        "available_isas": runtime.available_isas(),
        "forced_isa": forced,
        "threads": runtime.num_threads(),
        "cuda": runtime.cuda_status(),
        "torch": torch.__version__,
        "cmake_dir": runtime.cmake_dir(),
    }
    why = "forced by LOWBITCORE_ISA" if forced else "the fastest this CPU has"
    return result, [
        f"lowbitcore {__version__}, torch {torch.__version__}",
        f"instruction set: {result['isa']} ({why}; available: "
        f"{', '.join(runtime.available_isas())})",
        f"threads: {result['threads']}",
        f"CUDA: {result['cuda']}",
        f"CMake package: {result['cmake_dir']}",
    ]


def _describe_model(path: str) -> tuple[dict[str, Any], list[str]]:
    from .formats.gptq import compatible_loaders
    from .summary import summarize

    summary = summarize(path)
    result: dict[str, Any] = summary._asdict()
    lines = [
        f"{path}: {summary.architecture}, {summary.parameters / 1e6:,.1f} M parameters, "
        f"{_megabytes(summary.total_bytes)} of tensors"
    ]
    if summary.gptq is None:
        lines.append(f"not quantized ({summary.dtype})")
    else:
        config = summary.gptq
        result["gptq"] = config.to_dict()
        loaders = compatible_loaders(config)
        result["loaders"] = {item.name: item.reason or "loads" for item in loaders}
        lines += [
            f"{config.bits} bits, group_size {config.group_size}, "
            f"{'symmetric' if config.sym else 'asymmetric'}, desc_act {config.desc_act}, "
            f"{config.checkpoint_format}",
            f"{summary.quantized_linears} quantized linears with "
            f"{summary.quantized_weights / 1e6:,.1f} M weights in "
            f"{_megabytes(summary.quantized_bytes)}: {summary.effective_bits:.3f} bits a weight, "
            f"{16 / summary.effective_bits:.2f} times smaller than 16 bits",
            f"whole model: {summary.total_bytes * 8 / summary.parameters:.3f} bits a parameter",
            f"trainable by PEQA (scales): {summary.scales / 1e6:,.3f} M",
            "who can load it:",
        ]
        lines += [f"  {item.name}: {item.reason or 'yes'}" for item in loaders]
    return result, lines


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
    as_json: Json = False,
) -> None:
    """Quantize a real model to 4, 3 and 2 bits, and repair it (10 minutes)."""
    from .demo import run

    if not (minutes > 0 and minutes < float("inf")):
        raise ValueError(f"--minutes: expected a positive number, got {minutes}")
    result, lines = run(out, lambda model: _calibration(model, calib, 32, 256, 0), minutes=minutes)
    _emit(as_json, result, lines)


# What functions call their arguments, and what the options are called they come from.
_OPTIONS = {
    "bits": "--bits",
    "group_size": "--group-size",
    "percdamp": "--damp",
    "texts": "--calib",
    "samples": "--samples",
    "length": "--length",
    "context": "--context",
    "windows": "--windows",
    "stride": "--stride",
    "prompt": "--prompt",
    "text": "--text",
    "max_new_tokens": "--max-new-tokens",
    "chat": "--chat",
    "rank": "--rank",
    "alpha": "--alpha",
    "targets": "--targets",
    "dropout": "--dropout",
    "lambda_kl": "--lambda-kl",
    "lambda_ce": "--lambda-ce",
    "examples": "--data",
    "memory": "--memory",
    "micro_batch": "--micro-batch",
}


_INTERRUPTED = 130  # what typer exits with after Ctrl-C


def _for_the_command_line(message: str) -> str:
    """`function: argument: ...` on one line, the two replaced by the option."""
    message = " ".join(message.split())
    _, _, rest = message.partition(": ")
    argument, _, what = rest.partition(": ")
    return f"{_OPTIONS[argument]}: {what}" if argument in _OPTIONS else message


def main() -> None:
    """Run the command line: exit code 2 and one line on stderr for what is not a bug of ours."""
    from ._C import Error

    try:
        app()
    except (ValueError, OSError, MemoryError, FloatingPointError, Error) as error:
        message = _for_the_command_line(str(error)) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("interrupted", file=sys.stderr)
        raise

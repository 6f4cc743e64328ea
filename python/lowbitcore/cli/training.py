"""Commands that train on packed models, and the plan of a training."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowbitcore.cli.app import AdapterBits, Device, Json, app, emit, megabytes

if TYPE_CHECKING:
    from lowbitcore.recipes import Lora, Recipe, Schedule

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
    typer.Option(help="Of the order of the data and what starts at random.", min=0, max=2**32 - 1),
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
    Literal["none", "selective", "full"],
    typer.Option(
        "--checkpointing",
        help="What of a forward is computed again for its backward instead of kept: none of it; "
        "what lies between products (selective, of use on a GPU alone); all but a block's input "
        "(full, for the least memory).",
    ),
]


# LREC as INT2.1's authors ran it on LLaMA-7B (arXiv 2306.08162; the command lines in their code,
# stochasticai/xTuring, examples/int2-1/LREC). There KL is summed over the 2,048 tokens of a
# sequence, CE is a mean: weights of 1 and 120, and of 1 and 10, are these between two means.
_AUTHORS: dict[str, Any] = {
    "start": "zeros",
    "rank": 32,
    "alpha": 128,
    "dropout": 0.05,
    "targets": "q_proj,v_proj,k_proj,o_proj,up_proj,gate_proj",
    "length": 2048,
    "batch": 7,
}
PRESETS = {
    "int2": {**_AUTHORS, "lambda_ce": 120 / 2048, "lr": 3e-5},
    "int4": {**_AUTHORS, "lambda_ce": 10 / 2048, "lr": 1e-5},
}


def _described() -> str:
    def options(settings: dict[str, Any]) -> str:
        return " ".join(
            f"--{name.replace('_', '-')} {value:.4g}"
            if isinstance(value, float)
            else f"--{name.replace('_', '-')} {value}"
            for name, value in settings.items()
        )

    own = (
        f"for {name} {options({k: v for k, v in preset.items() if k not in _AUTHORS})}"
        for name, preset in PRESETS.items()
    )
    return f"{options(_AUTHORS)}, {', '.join(own)}"


def _names(targets: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in targets.split(","))


def _use_preset(context: typer.Context, name: str | None) -> str | None:
    """Its settings become the defaults of options that are read after it."""
    if name is not None:
        context.default_map = {**(context.default_map or {}), **PRESETS[name]}
    return name


def _schedule(context: typer.Context) -> Schedule:
    """Of the options that are called as its fields; what is no option keeps its default."""
    from lowbitcore.recipes import Schedule

    names = {field.name for field in fields(Schedule)}
    return Schedule(**{name: context.params[name] for name in names & context.params.keys()})


@app.command()
def peqa(
    context: typer.Context,
    model: Packed,
    out: Out,
    data: Data,
    steps: Steps = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    length: Length = 512,
    batch: Batch = 2,
    micro_batch: MicroBatch = None,
    lr: Annotated[
        float, typer.Option(help="Learning rate, relative to the median scale of each linear.")
    ] = 5e-3,
    seed: Seed = 0,
    eval_text: EvalText = None,
    resume: Resume = False,
    adapter: Under = None,
    checkpointing: Checkpoints = "none",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train the scales of a packed model (PEQA).

    OUT gets scales.safetensors, for --adapter OUT of other commands.
    """
    from lowbitcore.recipes import Recipe

    schedule = _schedule(context)
    recipe = Recipe(model, schedule, adapters=tuple(adapter or ()), device=device)
    _train(recipe, out, resume, as_json)


@app.command()
def emef(
    context: typer.Context,
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
    checkpointing: Checkpoints = "none",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Fine-tune a packed model with LoRA (EMEF).

    OUT gets an adapter in PEFT's format.
    """
    from lowbitcore.recipes import Lora, Recipe

    schedule = _schedule(context)
    lora = Lora(rank, alpha, _names(targets), dropout)
    recipe = Recipe(model, schedule, lora, adapters=tuple(adapter or ()), device=device)
    _train(recipe, out, resume, as_json)


@app.command()
def lrec(
    context: typer.Context,
    model: Packed,
    out: Out,
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="The 16-bit model.")],
    data: Data,
    preset: Annotated[
        Literal["int2", "int4"] | None,
        typer.Option(
            callback=_use_preset,
            is_eager=True,
            help=f"Settings of the method's authors for LLaMA-7B in 2 or 4 bits: {_described()}. "
            "They trained on --tokens 204800000. Options given beside it count.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the adapter (default: the start's, or 8).")
    ] = None,
    start: Annotated[
        Literal["closed-form", "zeros"] | None,
        typer.Option(
            help="Where the adapter starts: at the correction that quantize --rank has left in "
            "QMODEL, which it replaces (default, if it is there and neither --adapter nor --preset "
            "is given), or at nothing."
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Linears to adapt, by name, where it starts from zeros (default: all)."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="The adapter counts alpha / rank times, where it starts from zeros (default: "
            "once)."
        ),
    ] = None,
    dropout: Annotated[
        float, typer.Option(help="Of the adapter's input, where it starts from zeros.")
    ] = 0.0,
    adapter_bits: AdapterBits = 8,
    lambda_kl: Annotated[float, typer.Option(help="Weight of the KL divergence.")] = 1.0,
    lambda_ce: Annotated[
        float,
        typer.Option(help="Weight of the cross-entropy (try 1: better at 2 and 3 bits)."),
    ] = 0.1,
    kl: Annotated[
        Literal["forward", "reverse"],
        typer.Option(help="forward: KL(teacher || student); reverse: the other way round."),
    ] = "forward",
    scales_lr: Annotated[
        float | None,
        typer.Option(
            help="Train the scales, too, at this rate relative to their size (try 5e-3): better at "
            "no more bytes in a model saved with them, but PEFT alone cannot load the result."
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Run the teacher once, a block in memory at a time, and keep its states here.",
        ),
    ] = None,
    steps: Steps = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    length: Length = 512,
    batch: Batch = 2,
    micro_batch: MicroBatch = None,
    lr: Annotated[
        float,
        typer.Option(help="Learning rate of AdamW, after warming up (try 1e-3 from a correction)."),
    ] = 3e-4,
    seed: Seed = 0,
    eval_text: EvalText = None,
    resume: Resume = False,
    adapter: Under = None,
    checkpointing: Checkpoints = "none",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Repair a packed model with LoRA on every linear (LREC).

    OUT gets an adapter in PEFT's format that brings the model's output near its teacher's, and with
    --scales-lr the scales that belong to it.
    """
    from lowbitcore.recipes import Recipe, Teacher, training_device

    training_device(device)  # said before a model is fetched
    recipe = Recipe(
        model,
        _schedule(context),
        _lrec_adapter(
            model, rank, start, targets, alpha, dropout, adapter_bits, stacked=bool(adapter)
        ),
        Teacher(teacher, lambda_kl, lambda_ce, kl, cache),
        tuple(adapter or ()),
        scales_lr,
        device=device,
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
        str | None,
        typer.Option(help="Linears to adapt (default: q_proj,v_proj for emef, all for lrec)."),
    ] = None,
    scales: Annotated[
        bool, typer.Option("--scales", help="lrec with --scales-lr: scales train, too.")
    ] = False,
    length: Length = 512,
    micro_batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    tokens: Annotated[int, typer.Option(help="Of lrec's data, for the teacher's cache.")] = 100_000,
    cache: Annotated[
        bool, typer.Option(help="lrec with --cache, or with the teacher beside it all along.")
    ] = True,
    memory: Annotated[
        str | None, typer.Option(metavar="8GB", help="What there is (default: this machine's).")
    ] = None,
    checkpointing: Checkpoints = "none",
    as_json: Json = False,
) -> None:
    """What a training will need, before anything is loaded."""
    from lowbitcore import plan as plans
    from lowbitcore.source import read_config

    result = plans.plan(
        read_config(model),
        method=method,
        bits=bits,
        group_size=group_size,
        rank=rank,
        targets=None if targets is None else list(_names(targets)),
        scales=scales,
        length=length,
        micro_batch=micro_batch,
        tokens=tokens,
        cache=cache,
        memory=plans.parse_memory(memory),
        checkpointing=checkpointing,
    )
    rows = [
        ("weights, packed", result.weights_bytes),
        *(
            [("teacher" + (", while the cache fills" if cache else ""), result.teacher_bytes)]
            if method == "lrec"
            else []
        ),
        ("adapter and optimizer", result.optimizer_bytes),
        (f"activations, {micro_batch} x {length} tokens", result.activation_bytes),
        ("loss", result.loss_bytes),
        ("kept by the C library's heap", result.held_bytes),
        ("Python, libraries, tokenizer", result.runtime_bytes),
        ("peak", result.peak_bytes),
    ]
    lines = [f"{name:<34}{size / 1e9:>9.3f} GB" for name, size in rows]
    lines.append(f"trainable parameters: {result.trainable_parameters:,}")
    if result.cache_bytes:
        lines.append(
            f"teacher cache on disk for {tokens:,} tokens: {result.cache_bytes / 1e9:.3f} GB"
        )
    lines.append(
        f"{'fits' if result.fits else 'does not fit'}; the largest micro-batch that does: "
        f"{result.largest_micro_batch}"
    )
    emit(as_json, result._asdict(), lines)


def _lrec_adapter(
    model: str,
    rank: int | None,
    start: str | None,
    targets: str | None,
    alpha: float | None,
    dropout: float,
    bits: int,
    *,
    stacked: bool,
) -> Lora:
    """LREC's adapter: on every linear with alpha = rank, unless it is said otherwise."""
    from lowbitcore.formats import peft
    from lowbitcore.recipes import Lora
    from lowbitcore.source import local_path

    directory = peft.find_correction(local_path(model))
    if start == "closed-form" and stacked:
        # The correction would count twice: in what lies below, and in what starts from it.
        raise ValueError("--start: expected zeros where --adapter is given, got closed-form")
    if start == "closed-form" and directory is None:
        raise ValueError(f"--start: {model}: expected a correction in it, made by quantize --rank")
    if start == "zeros" or stacked or directory is None:
        rank = 8 if rank is None else rank
        names = None if targets is None else _names(targets)
        return Lora(rank, rank if alpha is None else alpha, names, dropout, bits=bits)
    if targets is not None:
        raise ValueError(f"--targets: {directory} is on its own linears: expected --start zeros")
    for name, given in (("alpha", alpha is not None), ("dropout", dropout != 0)):
        if given:
            raise ValueError(f"--{name}: {directory} has its own: expected --start zeros")
    ranks = {len(item.a) for item in peft.read(directory).linears.values()}
    if rank is not None and max(ranks) != rank:  # small linears have less
        raise ValueError(
            f"--rank: expected that of {directory}, {max(ranks)} (or --start zeros), got {rank}"
        )
    return Lora(max(ranks), max(ranks), None, 0.0, start=str(directory), bits=bits)


def _train(recipe: Recipe, out: Path, resume: bool, as_json: bool) -> None:
    from lowbitcore.recipes import train

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    result = train(recipe, out, resume=resume, say=say)
    if result is None:
        return
    ppl = "" if result["ppl"] is None else f", perplexity {result['ppl']:.3f}"
    loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
    line = (
        f"{out}: {result['tokens']:,} tokens in {result['steps']} steps, "
        f"{result['tokens_per_second']:,.0f} tokens a second{loss}{ppl}; "
        f"{megabytes(result['adapter_bytes'])}"
    )
    emit(as_json, result, [line])

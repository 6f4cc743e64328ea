"""What all commands share: the application, options that recur, and how results are printed."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel


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
        from lowbitcore import __version__

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
Device = Annotated[
    Literal["cpu", "cuda"],
    typer.Option(help="Where to compute; `lowbitcore info --device` says what there is."),
]
Dtype = Annotated[
    Literal["auto", "bf16", "fp32"],
    typer.Option(help="Type of activations and of all weights that are not packed."),
]


AdapterBits = Annotated[
    int, typer.Option(help="Of each of the adapter's elements: 8 (float8 E4M3) or 16.")
]


def emit(as_json: bool, result: dict[str, Any], lines: Iterable[str]) -> None:
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


def load_model(
    model: str, dtype: str, device: str, adapter: list[str] | None = None
) -> PreTrainedModel:
    from lowbitcore.adapters import load_adapters, note_correction
    from lowbitcore.model import load

    names = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}
    loaded = load(model, dtype=names[dtype], device=device)
    load_adapters(loaded, adapter or [])
    note_correction(loaded, lambda line: print(line, file=sys.stderr))
    loaded.eval()
    return loaded


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"

"""The command line: results on stdout, progress on stderr; ``--json`` ends with one object."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

import lowbitcore
from lowbitcore.cli import models, training  # noqa: F401  (they register their commands)
from lowbitcore.cli.app import app

# What functions call their arguments, where the options that these come from are called otherwise.
_OPTIONS = {"percdamp": "--damp", "texts": "--calib", "examples": "--data"}


_INTERRUPTED = 130  # what typer exits with after Ctrl-C


def _options() -> set[str]:
    """Of the command that was typed."""
    commands = typer.main.get_group(app).commands
    typed = [commands[word] for word in sys.argv[1:] if word in commands][:1]
    return {name for command in typed for x in command.params for name in x.opts}


def _for_the_command_line(message: str) -> str:
    """`function: argument: ...` on one line, the two replaced by the option, or the function left
    out: it means nothing to who typed a command (unless a file of theirs is called so)."""
    message = " ".join(message.split())
    if message.startswith("--"):
        return message
    function, _, rest = message.partition(": ")
    argument, _, what = rest.partition(": ")
    option = _OPTIONS.get(argument, f"--{argument.replace('_', '-')}")
    is_path = argument in {str(Path(word)) for word in sys.argv[1:]}
    if option in _options() and not is_path:
        return f"{option}: {what}"
    typed = any(function in word for word in sys.argv[1:])
    return rest if function in lowbitcore.__all__ and not typed else message


def _end_progress() -> None:
    """Bars that an error left open would share their lines with it."""
    for bar in list(tqdm._instances):  # type: ignore[attr-defined]
        bar.close()


def _note_warnings() -> None:
    """Our own warnings on a line each, without the line of code that a programmer wants."""
    others, here = warnings.showwarning, Path(__file__).parents[1]

    def show(message: Any, category: Any, filename: str, *more: Any) -> None:
        if here in Path(filename).parents:
            print(f"note: {message}", file=sys.stderr)
        else:
            others(message, category, filename, *more)

    warnings.showwarning = show  # type: ignore[assignment]


def main() -> None:
    """Run the command line: exit code 2 and one line on stderr for what is not a bug of ours."""
    from torch import OutOfMemoryError  # of a GPU

    from lowbitcore._C import Error

    known = (ValueError, OSError, MemoryError, OutOfMemoryError, FloatingPointError, Error)
    _note_warnings()
    try:
        app()
    except known as error:
        _end_progress()
        message = _for_the_command_line(str(error)) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever presses it twice, wants the same
            _end_progress()
            print("interrupted", file=sys.stderr)
        raise

"""Comparisons made of `lowbitcore` commands, each in its own process; results are kept."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from math import nan
from pathlib import Path
from typing import Any

from lowbitcore.files import write_json

HELD_OUT_DOCUMENT, HELD_OUT_INSTRUCTIONS = 20, 200
CALIBRATION = ["--samples", 128, "--length", 1024]
TUNE_EPOCHS = 1
# LREC's rates, the adapter's and that of the scales, which do not train without it; and CE with as
# much weight as KL.
FAST, SCALES = ("--lr", 1e-3), ("--scales-lr", 5e-3)
REPAIR = (*FAST, *SCALES, "--lambda-ce", 1)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """For what learns from prose and measures on other texts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a 16-bit model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prose", type=Path, required=True, help="JSON lines with text")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="to measure on")
    parser.add_argument("--windows", type=int, help="of 1,024 tokens to measure on, at most")
    return parser


def group_name(group_size: int) -> str:
    return "row" if group_size == -1 else str(group_size)


class Bench:
    """Commands whose results are kept in a directory, under names."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.out, self.windows = arguments.model, arguments.out, arguments.windows
        self.out.mkdir(parents=True, exist_ok=True)
        self._record = self.out / "results.json"
        self.results: dict[str, Any] = (
            json.loads(self._record.read_text()) if self._record.exists() else {}
        )

    def command(self, name: str, *words: Any) -> dict[str, Any]:
        """What the command reports under --json."""
        asked = [word for word in map(str, words) if word != "--resume"]
        if name in self.results:
            if self.results[name].get("command") != asked:
                raise SystemExit(f"{self._record}: {name}: of another command: choose another OUT")
        else:
            command = [sys.executable, "-m", "lowbitcore", *map(str, words), "--json"]
            print("$ lowbitcore", *map(str, words), file=sys.stderr, flush=True)
            start = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            report = json.loads(done.stdout.splitlines()[-1])
            # Of one that goes on from another's work nobody knows how long it took.
            minutes = nan if "--resume" in words else (time.perf_counter() - start) / 60
            self.keep(name, {**report, "command": asked, "minutes": minutes})
        return self.results[name]

    def keep(self, name: str, result: Any) -> Any:
        self.results[name] = result
        write_json(self._record, self.results)
        return result

    def path(self, name: str) -> Path:
        return self.out / name

    def quantize(
        self,
        method: str,
        bits: int,
        group_size: int,
        text: Path,
        *,
        rank: int = 0,
        tune_epochs: int = 0,
        seed: int = 0,
    ) -> Path:
        name = f"{method}-{bits}-{group_name(group_size)}"
        name += f"-rank{rank}" if rank else ""
        name += f"-tuned{tune_epochs}" if tune_epochs else ""
        name += f"-seed{seed}" if seed else ""
        name += "" if text.stem == "prose" else f"-{text.stem}"
        data = [] if method == "rtn" else ["--calib", text, *CALIBRATION, "--rank", rank]
        data += ["--tune-epochs", tune_epochs] if tune_epochs else []
        data += ["--seed", seed] if seed else []
        options = ["--bits", bits, "--group-size", group_size, "--method", method, *data]
        options += ["--resume"] if (self.path(name) / ".partial").exists() else []
        self.command(name, "quantize", self.model, self.path(name), *options)
        return self.path(name)

    def train(self, method: str, model: Path | str, name: str, *options: Any) -> Path:
        again = ["--resume"] if (self.path(name) / "training.json").exists() else []
        self.command(name, method, model, self.path(name), *options, *again)
        return self.path(name)

    def ppl(self, model: Path | str, text: Path, adapter: Path | None = None) -> float:
        name = f"ppl {Path(model).name} {text.name}" + (f" {adapter.name}" if adapter else "")
        under = ["--adapter", adapter] if adapter else []
        count = ["--windows", self.windows] if self.windows else []
        return float(self.command(name, "eval", model, "--text", text, *count, *under)["ppl"])

    def bits_per_weight(self, model: Path, adapter: Path | None) -> float:
        under = ["--adapter", adapter] if adapter else []
        name = f"bits {model.name}" + (f" {adapter.name}" if adapter else "")
        found = self.command(name, "info", model, *under)
        return float(found["bits_with_adapters" if adapter else "effective_bits"])

    def minutes(self, result: Path) -> float:
        """What it took to quantize or to train it; nothing for what came with something else."""
        return float(self.results.get(result.name, {"minutes": 0})["minutes"])

    def split_prose(self, source: Path) -> tuple[Path, Path]:
        """Documents to learn from, and those held out."""
        lines = source.read_text().strip().split("\n")
        return self._split(
            "prose",
            [line for i, line in enumerate(lines) if i % HELD_OUT_DOCUMENT],
            lines[::HELD_OUT_DOCUMENT],
        )

    def split_instructions(self, source: Path) -> tuple[Path, Path]:
        lines = [json.dumps(item) for item in json.loads(source.read_text())]
        return self._split(
            "instructions", lines[HELD_OUT_INSTRUCTIONS:], lines[:HELD_OUT_INSTRUCTIONS]
        )

    def _split(self, name: str, kept: list[str], held: list[str]) -> tuple[Path, Path]:
        paths = self.path(f"{name}.jsonl"), self.path(f"{name}-held-out.jsonl")
        for path, lines in zip(paths, (kept, held), strict=True):
            content = "\n".join(lines) + "\n"
            if path.exists() and path.read_text() != content:
                raise SystemExit(f"{path}: made of other data: choose another OUT")
            path.write_text(content)
        return paths

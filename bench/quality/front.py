"""Perplexity against size, everything counted: integers, scales, zeros and adapters.

    python bench/quality/front.py MODEL OUT --prose FILE --texts FILE FILE
        [--tokens N] [--windows N] [--gptqmodel PYTHON]

MODEL is a 16-bit model. GPTQ at 2, 3 and 4 bits and groups of 32, 64 and 128, as it is and with its
blocks tuned, which takes no more bytes; models tuned with low-rank corrections, and what LREC with
scales makes of these on N tokens; beside the latter LREC as its paper has it, from zeros, at the
same bytes and tokens; and GPTQModel's own, where PYTHON is an interpreter that has it. OUT gets
front.json and front.png. Each step is one command; what is in OUT already is not run again. The
minutes are those of quantization and training.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from commands import CALIBRATION, REPAIR, TUNE_EPOCHS, Bench, group_name, parser_of
from matplotlib import pyplot, ticker

from lowbitcore import load
from lowbitcore.data import calibration_windows, read_texts
from lowbitcore.source import load_tokenizer

BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128)
PEER = "GPTQModel"
COLLAPSED = 20  # times the perplexity of 16 bits: off the chart from here
SIDE = Path(__file__).with_name("gptqmodel_side.py")
METHODS = {
    "GPTQ": "o",
    PEER: "x",
    "LREC from zeros": "v",
    "tuned": "D",
    "tuned with a correction": "s",
    "and LREC": "^",
}


class Base(NamedTuple):
    bits: int
    group_size: int
    rank: int


# Of SmolLM2-135M: below 2.75, 3.0, 3.7 and 4.7 bits a weight.
CORRECTED = (Base(2, 64, 16), Base(2, 64, 28), Base(3, 64, 15), Base(4, 64, 14))
PLAIN = [Base(bits, group_size, 0) for bits in BITS for group_size in GROUP_SIZES]


def points(bench: Bench, prose: Path, texts: list[Path], tokens: int) -> Iterator[dict[str, Any]]:
    def point(method: str, base: Base, model: Path, adapter: Path | None) -> dict[str, Any]:
        return {
            "method": method,
            **base._asdict(),
            "bits_per_weight": bench.bits_per_weight(model, adapter),
            "minutes": bench.minutes(model) + (bench.minutes(adapter) if adapter else 0),
            "ppl": {text.name: bench.ppl(model, text, adapter) for text in texts},
        }

    schedule = ["--data", prose, "--tokens", tokens, "--teacher", bench.model]
    schedule += ["--cache", bench.path("teacher")]
    for base in PLAIN:
        model = bench.quantize("gptq", *base[:2], prose)
        yield point("GPTQ", base, model, None)
    for base in CORRECTED:
        if tokens:
            model = bench.quantize("gptq", *base[:2], prose)
            zeros = f"zeros{base.rank}-{model.name}"
            adapter = bench.train("lrec", model, zeros, *schedule, "--rank", base.rank)
            yield point("LREC from zeros", base, model, adapter)
    for base in CORRECTED:
        model = bench.quantize("gptq", *base[:2], prose, rank=base.rank, tune_epochs=TUNE_EPOCHS)
        yield point("tuned with a correction", base, model, model / "correction")
        if tokens:
            adapter = bench.train("lrec", model, f"lrec-{model.name}", *schedule, *REPAIR)
            yield point("and LREC", base, model, adapter)
    for base in PLAIN:
        model = bench.quantize("gptq", *base[:2], prose, tune_epochs=TUNE_EPOCHS)
        yield point("tuned", base, model, None)


def peers(bench: Bench, prose: Path, texts: list[Path], python: str) -> Iterator[dict[str, Any]]:
    """GPTQModel's points, from the windows that ours are calibrated on."""
    dense, windows = bench.path("dense"), bench.path("windows.json")
    if not windows.exists():
        tokenizer = load_tokenizer(bench.model)
        load(bench.model).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        samples, length = CALIBRATION[1], CALIBRATION[3]
        found = calibration_windows(
            read_texts(prose), tokenizer, samples=samples, length=length, seed=0
        )
        windows.write_text(json.dumps(found.tolist()))
    for base in PLAIN:
        model = bench.path(f"gptqmodel-{base.bits}-{base.group_size}")
        if model.name not in bench.results:
            start = time.perf_counter()
            options = ["--bits", str(base.bits), "--group-size", str(base.group_size)]
            words = [python, SIDE, dense, model, windows, *options]
            subprocess.run(list(map(str, words)), stdout=sys.stderr, check=True)
            bench.keep(model.name, {"minutes": (time.perf_counter() - start) / 60})
        yield {
            "method": PEER,
            **base._asdict(),
            "bits_per_weight": bench.bits_per_weight(model, None),
            "minutes": bench.minutes(model),
            "ppl": {text.name: bench.ppl(model, text) for text in texts},
        }


def row(point: dict[str, Any]) -> str:
    title = f"{point['bits']} bits, groups: {group_name(point['group_size'])}"
    title += f", rank {point['rank']}" if point["rank"] else ""
    title += "" if point["method"] == "GPTQ" else f", {point['method']}"
    ppls = "".join(f"{ppl:>14.3f}" for ppl in point["ppl"].values())
    return f"{title:<56}{point['bits_per_weight']:>8.3f}{point['minutes']:>8.1f}{ppls}"


def holes(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of plain GPTQ, ours and GPTQModel's, that no other of at most their size is below, on
    all texts."""
    plain = ("GPTQ", PEER)

    def beaten(point: dict[str, Any]) -> bool:
        return any(
            other["method"] not in plain
            and other["bits_per_weight"] <= point["bits_per_weight"]
            and all(other["ppl"][text] < ppl for text, ppl in point["ppl"].items())
            for other in found
        )

    return [point for point in found if point["method"] in plain and not beaten(point)]


def draw(found: list[dict[str, Any]], dense: dict[str, float], image: Path) -> None:
    figure, panels = pyplot.subplots(
        1, len(dense), figsize=(5.5 * len(dense), 4.4), squeeze=False, layout="constrained"
    )
    for axes, (text, ppl) in zip(panels[0], dense.items(), strict=True):
        for method, marker in METHODS.items():
            mine = [item for item in found if item["method"] == method]
            axes.scatter(
                [item["bits_per_weight"] for item in mine],
                [item["ppl"][text] for item in mine],
                marker=marker,
                label=method,
            )
        axes.axhline(ppl, color="gray", linestyle="--", label="16 bits")
        least = min(ppl, *(item["ppl"][text] for item in found))
        axes.set(
            yscale="log",
            ylim=(0.9 * least, COLLAPSED * ppl),
            xlabel="bits a weight, all told",
            title=text,
        )
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    panels[0][0].set_ylabel("perplexity")
    panels[0][-1].legend()
    figure.savefig(image, dpi=120)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=60_000, help="for LREC; 0 for none of it")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="one that has GPTQModel")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    prose, _ = bench.split_prose(arguments.prose)
    dense = {text.name: bench.ppl(bench.model, text) for text in arguments.texts}
    print(f"{'':<56}{'bits':>8}{'minutes':>8}" + "".join(f"{text:>14.13}" for text in dense))
    print(f"{'16 bits':<56}{16:>8}{'':>8}" + "".join(f"{ppl:>14.3f}" for ppl in dense.values()))
    found = []
    ours = points(bench, prose, arguments.texts, arguments.tokens)
    python = arguments.gptqmodel
    theirs = peers(bench, prose, arguments.texts, python) if python else []
    for point in chain(ours, theirs):
        print(row(point), flush=True)
        found.append(point)
    (arguments.out / "front.json").write_text(json.dumps([dense, found], indent=2) + "\n")
    draw(found, dense, arguments.out / "front.png")
    left = holes(found)
    print(f"{len(left)} points of GPTQ are not beaten at their size or below it")
    for point in left:
        print(row(point))


if __name__ == "__main__":
    main()

"""Perplexity against size, everything counted: integers, scales, zeros and adapters.

    python bench/quality/front.py MODEL OUT --prose FILE --texts FILE FILE [--windows N]

MODEL is a 16-bit model. GPTQ at 2, 3 and 4 bits and groups of 32, 64 and 128, beside the same with
low-rank corrections fitted in closed form, without any training; OUT gets front.json and front.png.
Each step is one `lowbitcore` command; what is in OUT already is not run again.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from commands import Bench, parser_of
from matplotlib import pyplot

BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128)
RANKS = (4, 8, 16)
CORRECTED_GROUP_SIZES = (64, 128)


def points(bench: Bench, prose: Path, texts: list[Path]) -> list[dict[str, Any]]:
    plain = [(bits, size, 0) for bits, size in itertools.product(BITS, GROUP_SIZES)]
    corrected = list(itertools.product(BITS, CORRECTED_GROUP_SIZES, RANKS))
    found = []
    for bits, group_size, rank in [*plain, *corrected]:
        model = bench.quantize("gptq", bits, group_size, prose, rank=rank)
        adapter = model / "correction" if rank else None
        found.append(
            {
                "method": "GPTQ and correction" if rank else "GPTQ",
                "bits": bits,
                "group_size": group_size,
                "rank": rank,
                "bits_per_weight": bench.bits_per_weight(model, adapter),
                "ppl": {text.name: bench.ppl(model, text, adapter) for text in texts},
            }
        )
        print(row(found[-1]), flush=True)
    return found


def row(point: dict[str, Any]) -> str:
    title = f"{point['bits']} bits, groups of {point['group_size']}"
    title += f", rank {point['rank']}" if point["rank"] else ""
    ppls = "".join(f"{ppl:>14.3f}" for ppl in point["ppl"].values())
    return f"{title:<36}{point['bits_per_weight']:>8.3f}{ppls}"


def holes(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of plain GPTQ that no corrected point of at most their size is below, on all texts."""

    def beaten(point: dict[str, Any]) -> bool:
        return any(
            other["rank"]
            and other["bits_per_weight"] <= point["bits_per_weight"]
            and all(other["ppl"][text] < ppl for text, ppl in point["ppl"].items())
            for other in found
        )

    return [point for point in found if not point["rank"] and not beaten(point)]


def draw(found: list[dict[str, Any]], dense: dict[str, float], image: Path) -> None:
    figure, panels = pyplot.subplots(
        1, len(dense), figsize=(5.5 * len(dense), 4.4), squeeze=False, layout="constrained"
    )
    for axes, (text, ppl) in zip(panels[0], dense.items(), strict=True):
        for method, marker in (("GPTQ", "o"), ("GPTQ and correction", "s")):
            mine = [item for item in found if item["method"] == method]
            axes.scatter(
                [item["bits_per_weight"] for item in mine],
                [item["ppl"][text] for item in mine],
                marker=marker,
                label=method,
            )
        axes.axhline(ppl, color="gray", linestyle="--", label="16 bits")
        axes.set(yscale="log", xlabel="bits a weight, all told", title=text)
    panels[0][0].set_ylabel("perplexity")
    panels[0][-1].legend()
    figure.savefig(image, dpi=120)


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    bench = Bench(arguments)
    prose, _ = bench.split_prose(arguments.prose)
    dense = {text.name: bench.ppl(bench.model, text) for text in arguments.texts}
    print(f"{'':<36}{'bits':>8}" + "".join(f"{text:>14.14}" for text in dense))
    print(f"{'16 bits':<36}{16:>8}" + "".join(f"{ppl:>14.3f}" for ppl in dense.values()))
    found = points(bench, prose, arguments.texts)
    (arguments.out / "front.json").write_text(json.dumps([dense, found], indent=2) + "\n")
    draw(found, dense, arguments.out / "front.png")
    left = holes(found)
    print(f"{len(left)} points of GPTQ are not beaten at their size or below it")
    for point in left:
        print(row(point))


if __name__ == "__main__":
    main()

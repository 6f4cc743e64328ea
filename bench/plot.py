"""Throughput against the number of rows, for all widths, under the machine's two ceilings.

pytest bench/ --benchmark-json=result.json && python bench/plot.py result.json throughput.png
pytest bench/ -m "full or not full" -k "4096-K4096-bf16" --benchmark-json=result.json  # more rows
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

TITLES = {
    "qgemm_nt": "forward",
    "qgemm_nn": "transposed backward",
    "qgemm_grad_scales": "gradient of scales",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("image", type=Path, help="the PNG to write")
    parser.add_argument("--shape", default="4096x4096", metavar="NxK")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--group-size", type=int, default=128)
    arguments = parser.parse_args()
    n, k = map(int, arguments.shape.split("x"))
    cases = [item["extra_info"] for item in json.loads(arguments.result.read_text())["benchmarks"]]
    wanted = {"N": n, "K": k, "dtype": arguments.dtype, "group_size": arguments.group_size}
    cases = [
        item
        for item in cases
        if item["op"] in TITLES and item.items() >= wanted.items() and "ms" in item
    ]
    if not cases:
        parser.error(f"{arguments.result}: holds no timings with {wanted}")
    found = [op for op in TITLES if any(item["op"] == op for item in cases)]
    figure, panels = pyplot.subplots(
        1,
        len(found),
        figsize=(5 * len(found), 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, op in zip(panels[0], found, strict=True):
        draw(axes, [item for item in cases if item["op"] == op], n * k)
        axes.set_title(TITLES[op])
    panels[0][0].set_ylabel("GFLOP/s")
    panels[0][-1].legend(fontsize="small")
    first = cases[0]
    figure.suptitle(
        f"{n} x {k}, {arguments.dtype}, groups of {arguments.group_size}, {first['isa']}, "
        f"{first['threads']} threads"
    )
    figure.savefig(arguments.image, dpi=150)


def draw(axes: Any, cases: list[dict[str, Any]], weights: int) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    by_bits: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for item in sorted(cases, key=lambda item: item["M"]):
        by_bits[item["bits"]].append(item)
    rows = sorted({item["M"] for item in cases})
    for color, (bits, items) in zip(
        ("C0", "C1", "C2", "C3"), sorted(by_bits.items()), strict=False
    ):
        axes.plot(
            [item["M"] for item in items],
            [item["gflops"] for item in items],
            marker="o",
            color=color,
            label=f"{bits} bits",
        )
        # All packed integers read once, and nothing else.
        seconds = weights * bits / 8 / (items[0]["read_gbytes_per_s"] * 1e9)
        axes.plot(
            rows, [2 * m * weights / seconds / 1e9 for m in rows], color=color, linestyle=":", lw=1
        )
    dense = [item for item in by_bits[max(by_bits)] if "ratio_dense" in item]
    axes.plot(
        [item["M"] for item in dense],
        [item["gflops"] / item["ratio_dense"] for item in dense],
        marker="x",
        color="black",
        label="torch, dense",
    )
    peak = next((item["peak_gflops"] for item in cases if "peak_gflops" in item), None)
    if peak is not None:
        axes.axhline(peak, color="gray", linestyle="--", label="peak of the units")
        axes.set_ylim(top=2 * peak)
    axes.plot([], [], color="gray", linestyle=":", label="memory, for each width")
    axes.set_xlabel("rows (M)")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()

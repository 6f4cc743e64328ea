"""From what the parts left behind to Markdown: the text of the report, and of its sections."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

OPS = {
    "qgemm_nt": "Forward",
    "qgemm_nn": "Transposed backward",
    "qgemm_grad_scales": "Gradient of scales",
    "qgemm_nt_permuted": "Forward, act-order",
    "qgemm_nn_permuted": "Transposed backward, act-order",
    "qgemm_grad_scales_permuted": "Gradient of scales, act-order",
    "qgemm_nt_permuted_unequal": "Forward, with a g_idx",
    "qgemm_nn_permuted_unequal": "Transposed backward, with a g_idx",
}


@dataclass
class Part:
    """What a part found out: one line for all to read, and a section for who wants to know."""

    ok: bool
    outcome: str
    body: str = ""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def block(text: str) -> str:
    return f"````\n{text.strip()}\n````\n"


def render(
    device: str, facts: dict[str, str], parts: dict[str, Part], to_come: Sequence[str]
) -> str:
    """The report so far; `to_come`: the parts that have not run."""
    outcomes = [(name, "ok" if p.ok else "**failed**", p.outcome) for name, p in parts.items()]
    outcomes += [(name, "**did not run**", "") for name in to_come]
    sections = "".join(f"\n## {name}\n\n{part.body}" for name, part in parts.items() if part.body)
    return (
        f"# {device}\n\nWritten by `python -m tests.gpu`.\n\n"
        + table(("", ""), facts.items())
        + "\n"
        + table(("part", "", "outcome"), outcomes)
        + sections
    )


# ---- tests ----


def from_junit(junit: Path) -> Part:
    """From pytest's JUnit XML."""
    failures: list[tuple[str, str]] = []
    reasons: Counter[str] = Counter()
    passed = 0
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        bad = [item for item in case if item.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if bad:
            name = f"`{case.get('classname')}::{case.get('name')}`"
            message = bad[0].get("message") or "no message"
            failures.append((name, message.splitlines()[0][:300]))
        elif skipped is not None:
            reasons[skipped.get("message") or "no reason"] += 1
        else:
            passed += 1
    outcome = f"{passed} passed, {len(failures)} failed, {reasons.total()} skipped"
    body = table(("failed", "with"), failures) + "\n" if failures else ""
    if reasons:
        body += table(("skipped", "because"), [(n, why) for why, n in reasons.most_common()])
    return Part(passed > 0 and not failures, outcome, body)


# ---- products ----


def other_way(item: dict[str, Any]) -> float | None:
    """The time of the path not taken over that of the one taken; below 1 the table is wrong."""
    return item.get("ratio_dequant" if item["path"] == "fused" else "ratio_fused")


def from_bench(cases: list[dict[str, Any]]) -> Part:
    """From the `extra_info` of each case of pytest-benchmark's JSON."""
    by_op: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in cases:
        by_op[item["op"]].append(item)
    products = {op: sorted(by_op[op], key=_order) for op in OPS if op in by_op}
    body = ""
    for op, items in products.items():
        body += f"### {OPS[op]}\n\n{_products(items)}\n"
    slower = [
        (OPS[op], *_weight(item), item["M"], item["path"], f"{other_way(item):.2f}")
        for op, items in products.items()
        for item in items
        if (other_way(item) or 1) < 1
    ]
    if slower:
        columns = ("", "N x K", "bits", "M", "taken", "other path, x")
        body += f"### Where the dispatcher took the slower path\n\n{table(columns, slower)}\n"
    if "decode_step" in by_op:
        body += f"### Decode step\n\n{_decode(by_op['decode_step'])}\n"
    return Part(
        bool(cases), f"{len(cases)} cases; the slower path was taken in {len(slower)}", body
    )


def _order(item: dict[str, Any]) -> tuple[int, ...]:
    return item["N"], item["K"], item["bits"], item["M"]


def _weight(item: dict[str, Any]) -> tuple[str, int]:
    return f"{item['N']} x {item['K']}", item["bits"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _products(items: list[dict[str, Any]]) -> str:
    return table(
        (
            *("N x K", "bits", "M", "ms", "x dense", "x dequantize-then-dense"),
            *("x in order", "of bandwidth", "of peak", "path", "other path, x"),
        ),
        (
            (
                *_weight(item),
                item["M"],
                f"{item['ms']:.4f}",
                _number(item.get("ratio_dense")),
                _number(item.get("ratio_dequant")),
                _number(item.get("ratio_plain")),
                _number(item["fraction_of_bandwidth"]),
                _number(item.get("fraction_of_peak")),
                item["path"],
                _number(other_way(item)),
            )
            for item in items
        ),
    )


def _decode(items: list[dict[str, Any]]) -> str:
    return table(
        ("bits", "ms, as a graph", "x without a graph", "x dense, as a graph", "of bandwidth"),
        (
            (
                item["bits"],
                f"{item['ms']:.3f}",
                _number(item["ratio_eager"]),
                _number(item["ratio_dense"]),
                _number(item["fraction_of_bandwidth"]),
            )
            for item in sorted(items, key=_order)
        ),
    )

"""What each part of a repair is worth, at equal tokens: LREC at 2 bits, a part at a time.

    python bench/quality/repair.py MODEL OUT --prose FILE --texts FILE FILE [--tokens N]

MODEL is a 16-bit model. First one thing after another is added to the papers' way, all at the same
bytes; then the loss is changed in what came out of it (2306.08162, appendix D.1); then one thing at
a time in the papers' way, which wants no other integers for it: ranks, linears, and at last groups
(D.4, D.5, D.7). Each step is one `lowbitcore` command; what is in OUT already is not run again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from commands import FAST, REPAIR, SCALES, TUNE_EPOCHS, Bench, parser_of

BITS = 2


class Variant(NamedTuple):
    title: str
    options: tuple[Any, ...] = REPAIR
    group_size: int = 64
    rank: int = 16
    zeros: bool = False
    tune_epochs: int = TUNE_EPOCHS


ADDED = [
    Variant("from zeros", (), zeros=True, tune_epochs=0),
    Variant("from the closed form", (), tune_epochs=0),
    Variant("and at a rate of 1e-3", FAST, tune_epochs=0),
    Variant("and with the scales", (*FAST, *SCALES), tune_epochs=0),
    Variant("and from tuned blocks", (*FAST, *SCALES)),
    Variant("and with CE as much as KL"),
]
CHANGED = [
    Variant("KL alone", (*FAST, *SCALES, "--lambda-ce", 0)),
    Variant("CE alone", (*REPAIR, "--lambda-kl", 0)),
    Variant("reverse KL", (*REPAIR, "--kl", "reverse")),
]
PAPERS = [
    Variant("from zeros at 1e-3", FAST, zeros=True, tune_epochs=0),
    Variant("of rank 8", FAST, rank=8, zeros=True, tune_epochs=0),
    Variant("of rank 32", FAST, rank=32, zeros=True, tune_epochs=0),
    Variant("on q and k", (*FAST, "--targets", "q_proj,k_proj"), zeros=True, tune_epochs=0),
    Variant("a group a row", FAST, group_size=-1, zeros=True, tune_epochs=0),
]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=60_000, help="to train on, each")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    prose, _ = bench.split_prose(arguments.prose)
    schedule = ["--data", prose, "--tokens", arguments.tokens]
    schedule += ["--teacher", bench.model, "--cache", bench.path("teacher")]

    def show(title: str, model: Path | str, adapter: Path | None = None) -> None:
        bits = f"{bench.bits_per_weight(Path(model), adapter):.3f}" if adapter else ""
        ppls = [bench.ppl(model, text, adapter) for text in arguments.texts]
        print(f"{title:<28}{bits:>8}" + "".join(f"{x:>20.3f}" for x in ppls), flush=True)

    print(f"{'':<28}{'bits':>8}" + "".join(f"{text.name:>20.19}" for text in arguments.texts))
    show("16 bits", bench.model)
    for variant in ADDED + CHANGED + PAPERS:
        rank = 0 if variant.zeros else variant.rank
        base = bench.quantize(
            "gptq",
            BITS,
            variant.group_size,
            prose,
            rank=rank,
            tune_epochs=variant.tune_epochs,
        )
        start = ["--rank", variant.rank] if variant.zeros else []
        name = variant.title.replace(",", "").replace(" ", "-")
        tuned = bench.train("lrec", base, name, *schedule, *start, *variant.options)
        show(variant.title, base, tuned)


if __name__ == "__main__":
    main()

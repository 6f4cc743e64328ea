"""How much of a repair is chance: the same commands with one seed after another.

    python bench/quality/seeds.py MODEL OUT --prose FILE --texts FILE FILE
        [--seeds N] [--bits B --rank R --tune-epochs E --tokens N] [--windows N]

MODEL is a 16-bit model. A seed chooses the windows for calibration and tuning, and LREC's data.
Minutes are all from the 16-bit model on. Each step is one `lowbitcore` command; what is in OUT
already is not run again.
"""

from __future__ import annotations

from statistics import mean

from commands import REPAIR, Bench, parser_of


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tune-epochs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=180_000, help="for LREC")
    arguments = parser.parse_args()
    bench, texts = Bench(arguments), arguments.texts
    prose, _ = bench.split_prose(arguments.prose)
    dense = [bench.ppl(bench.model, text) for text in texts]
    print(f"{'':<28}{'bits':>8}{'minutes':>8}" + "".join(f"{x.name:>14.13}{'x':>6}" for x in texts))

    def show(title: str, bits: float, minutes: float, ppls: list[float]) -> None:
        cells = "".join(f"{x:>14.3f}{x / y:>6.2f}" for x, y in zip(ppls, dense, strict=True))
        print(f"{title:<28}{bits:>8.3f}{minutes:>8.1f}{cells}", flush=True)

    show("16 bits", 16, 0, dense)
    schedule = ["--data", prose, "--tokens", arguments.tokens, "--teacher", bench.model]
    schedule += REPAIR
    found: dict[str, list[list[float]]] = {"tuned": [], "and LREC": []}
    for seed in range(arguments.seeds):
        model = bench.quantize(
            "gptq",
            arguments.bits,
            64,
            prose,
            rank=arguments.rank,
            tune_epochs=arguments.tune_epochs,
            seed=seed,
        )
        own = ["--cache", bench.path(f"teacher{seed}"), "--seed", seed]
        trained = bench.train("lrec", model, f"lrec-{model.name}", *schedule, *own)
        minutes = bench.minutes(model)
        for name, adapter in (("tuned", model / "correction"), ("and LREC", trained)):
            minutes += bench.minutes(adapter)
            ppls = [bench.ppl(model, text, adapter) for text in texts]
            found[name].append([minutes, *ppls])
            show(f"seed {seed}, {name}", bench.bits_per_weight(model, adapter), minutes, ppls)
    for name, rows in found.items():
        _, *columns = zip(*rows, strict=True)
        spread = ", ".join(f"{mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in columns)
        print(f"{name}: mean (least to most): {spread}")


if __name__ == "__main__":
    main()

"""The papers' comparisons, on a model of your own: what each method gains, beside its baselines.

    python bench/quality/methods.py peqa  MODEL OUT --prose FILE
    python bench/quality/methods.py tasks MODEL OUT --prose FILE --instructions FILE
    python bench/quality/methods.py emef  MODEL OUT --instructions FILE
    python bench/quality/methods.py lrec  MODEL OUT --prose FILE --texts FILE FILE
    python bench/quality/methods.py stack MODEL OUT --prose FILE --instructions FILE

MODEL is a 16-bit model. Each step is one `lowbitcore` command in a process of its own; what is in
OUT already is not run again. One document in twenty, and 200 instructions, are held out of all
training and calibration.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from commands import REPAIR, TUNE_EPOCHS, Bench, group_name

RANK = 8
STACK_RANK = 16
QUESTIONS = (
    "What is the capital of France?",
    "Give three tips for staying healthy.",
    "Explain in one sentence what a computer program is.",
    "Write a Python function that adds two numbers.",
)


def peqa(bench: Bench, arguments: argparse.Namespace) -> None:
    """Scales trained on prose, from round-to-nearest (2305.14152, tables 2 and 5)."""
    train, held = bench.split_prose(arguments.prose)
    schedule = ["--data", train, "--tokens", arguments.tokens]
    dense = bench.ppl(bench.model, held)
    rows = []
    for group_size in (64, -1):
        for bits in (4, 3):
            rtn = bench.quantize("rtn", bits, group_size, train)
            gptq = bench.quantize("gptq", bits, group_size, train)
            tuned = bench.train("peqa", rtn, f"peqa-{rtn.name}", *schedule)
            ppls = bench.ppl(rtn, held), bench.ppl(gptq, held), bench.ppl(rtn, held, tuned)
            rows.append((f"{bits} bits, group {group_name(group_size)}", *ppls))
    for bits in (4, 3):  # from integers that are as good as they get
        best = bench.quantize("gptq", bits, 64, train, tune_epochs=TUNE_EPOCHS)
        tuned = bench.train("peqa", best, f"peqa-{best.name}", *schedule)
        ppls = math.nan, bench.ppl(best, held), bench.ppl(best, held, tuned)
        rows.append((f"{bits} bits, tuned blocks", *ppls))
    lora = ["--rank", 4, "--alpha", 4, "--dropout", 0, "--lr", 3e-3]  # the best of 3e-4, 1e-3, 3e-3
    tuned = bench.train("emef", bench.model, "lora-dense", *schedule, *lora)
    lora_ppl = bench.ppl(bench.model, held, tuned)
    print(f"held-out prose: 16 bits {dense:.3f}, with LoRA of rank 4 on q and v {lora_ppl:.3f}")
    print(f"{'':<22}{'RTN':>10}{'GPTQ':>10}{'PEQA':>10}{'/ LoRA':>8}")
    for title, *ppls in rows:
        print(f"{title:<22}" + "".join(f"{x:>10.3f}" for x in ppls) + f"{ppls[2] / lora_ppl:>8.3f}")


def tasks(bench: Bench, arguments: argparse.Namespace) -> None:
    """Two tasks, two scales files, one resident model: each file is best on its own task."""
    prose, held_prose = bench.split_prose(arguments.prose)
    code, held_code = bench.split_instructions(arguments.instructions)
    base = bench.quantize("gptq", 4, 64, prose)
    length = ["--tokens", arguments.tokens]
    files = {
        "prose": bench.train("peqa", base, "scales-prose", "--data", prose, *length),
        "instructions": bench.train("peqa", base, "scales-code", "--data", code, *length),
    }
    print(f"{'perplexity on held-out':<24}{'prose':>10}{'instructions':>14}")
    for name, scales in {"untuned": None, **files}.items():
        ppls = bench.ppl(base, held_prose, scales), bench.ppl(base, held_code, scales)
        print(f"{'scales: ' + name:<24}{ppls[0]:>10.3f}{ppls[1]:>14.3f}")
    print(
        f"swapping them on the resident model: {swap_seconds(base, [*files.values()]) * 1e3:.1f} ms"
    )


def swap_seconds(base: Path, files: list[Path]) -> float:
    import lowbitcore as lbc

    model = lbc.load(base)
    seconds = []
    for turn in range(11):
        start = time.perf_counter()
        lbc.swap_scales(model, files[turn % len(files)])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one hashes the integers


def emef(bench: Bench, arguments: argparse.Namespace) -> None:
    """LoRA on 4 bits beside the same LoRA on 16 (2306.08162, section 4.1), on tuned blocks, and on
    top of a correction (appendix D.2); the 4-bit models are calibrated on the instructions."""
    code, held = bench.split_instructions(arguments.instructions)
    schedule = ["--data", code, "--tokens", arguments.tokens, "--mask-prompt"]
    dense = bench.train("emef", bench.model, "emef-dense", *schedule)
    plain = bench.quantize("gptq", 4, 64, code)
    better = bench.quantize("gptq", 4, 64, code, tune_epochs=TUNE_EPOCHS)
    corrected = bench.quantize("gptq", 4, 64, code, rank=RANK)
    correction = corrected / "correction"
    under = ["--adapter", correction]
    tuned = bench.train("emef", plain, f"emef-{plain.name}", *schedule)
    on_better = bench.train("emef", better, f"emef-{better.name}", *schedule)
    stacked = bench.train("emef", corrected, f"emef-{corrected.name}", *schedule, *under)
    pairs = {
        "4 bits, before": ([], plain, []),
        "4 bits, after": ([dense], plain, [tuned]),
        "4 bits and tuned, before": ([], better, []),
        "4 bits and tuned, after": ([dense], better, [on_better]),
        "4 bits and correction, before": ([], corrected, [correction]),
        "4 bits and correction, after": ([dense], corrected, [correction, stacked]),
    }
    print(f"{'perplexity of held-out answers':<32}{'16 bits':>9}{'4 bits':>9}{'ratio':>8}{'KL':>8}")
    for name, (beside, packed, adapters) in pairs.items():
        found = bench.results.get(name) or bench.keep(
            name, compare_answers([(bench.model, beside), (packed, adapters)], held)
        )
        ratio = found["packed"] / found["dense"]
        print(
            f"{name:<32}{found['dense']:>9.3f}{found['packed']:>9.3f}{ratio:>8.3f}"
            f"{found['kl']:>8.4f}"
        )


def compare_answers(pair: Any, held: Path) -> dict[str, float]:
    """Perplexity of answers under two models with their adapters; KL(first || second) a token."""
    import torch

    import lowbitcore as lbc
    from lowbitcore.data import IGNORED, TrainingSet, read_examples
    from lowbitcore.source import load_tokenizer

    models = [lbc.load(path) for path, _ in pair]
    for model, (_, adapters) in zip(models, pair, strict=True):
        model.eval()
        for adapter in adapters:
            lbc.load_adapter(model, adapter)
    examples = TrainingSet(
        read_examples(held), load_tokenizer(pair[0][0]), length=512, mask_prompt=True
    )
    losses, divergence, count = [0.0, 0.0], 0.0, 0
    with torch.no_grad():
        for example in examples:
            targets = example["labels"][1:]
            scored = targets != IGNORED
            log_p = [
                model(input_ids=example["input_ids"][None])
                .logits[0, :-1][scored]
                .float()
                .log_softmax(-1)
                for model in models
            ]
            for i, item in enumerate(log_p):
                losses[i] -= item.gather(1, targets[scored][:, None]).sum().item()
            kl = torch.nn.functional.kl_div(log_p[1], log_p[0], reduction="sum", log_target=True)
            divergence += kl.item()
            count += int(scored.sum())
    return {
        "dense": math.exp(losses[0] / count),
        "packed": math.exp(losses[1] / count),
        "kl": divergence / count,
    }


def lrec(bench: Bench, arguments: argparse.Namespace) -> None:
    """Every width before and after its repair (2306.08162, table 3), from both starts."""
    prose, _ = bench.split_prose(arguments.prose)
    schedule = ["--data", prose, "--tokens", arguments.tokens, "--rank", RANK]
    schedule += ["--teacher", bench.model, "--cache", bench.path("teacher")]
    print(f"{'':<36}" + "".join(f"{text.name:>24}" for text in arguments.texts))

    def show(title: str, model: Path | str, adapter: Path | None = None) -> None:
        ppls = [bench.ppl(model, text, adapter) for text in arguments.texts]
        print(f"{title:<36}" + "".join(f"{item:>24.3f}" for item in ppls), flush=True)

    show("16 bits", bench.model)
    for bits in arguments.bits:
        plain = bench.quantize("gptq", bits, 64, prose)
        show(f"{bits} bits", plain)
        corrected = bench.quantize("gptq", bits, 64, prose, rank=RANK)
        show(f"{bits} bits, correction", corrected, corrected / "correction")
        tuned = bench.train("lrec", corrected, f"lrec-{corrected.name}", *schedule)
        show(f"{bits} bits, correction, LREC", corrected, tuned)
        tuned = bench.train("lrec", plain, f"lrec-{plain.name}", *schedule)
        show(f"{bits} bits, LREC from zeros", plain, tuned)


def stack(bench: Bench, arguments: argparse.Namespace) -> None:
    """A 2-bit model corrected by LREC on prose, then, frozen, taught by EMEF on instructions on top
    (2306.08162, appendix D.2); what it then makes of answers held out, and answers itself."""
    from lowbitcore.data import alpaca_example

    prose, _ = bench.split_prose(arguments.prose)
    code, held = bench.split_instructions(arguments.instructions)
    tokens = ["--tokens", arguments.tokens]
    base = bench.quantize("gptq", 2, 64, prose, rank=STACK_RANK, tune_epochs=TUNE_EPOCHS)
    teacher = ["--teacher", bench.model, "--cache", bench.path("teacher")]
    schedule = ["--data", prose, *tokens, *teacher, *REPAIR]
    corrected = bench.train("lrec", base, f"stack-lrec-{base.name}", *schedule)
    schedule = ["--data", code, *tokens, "--mask-prompt", "--adapter", corrected]
    taught = bench.train("emef", base, f"stack-emef-{base.name}", *schedule)
    steps: dict[str, tuple[Path | str, list[Path]]] = {
        "2 bits, LREC": (base, [corrected]),
        "2 bits, LREC, EMEF": (base, [corrected, taught]),
        "16 bits": (bench.model, []),
    }
    print(f"{'perplexity of held-out answers':<32}{'16 bits':>9}{'2 bits':>9}")
    for name, pair in list(steps.items())[:2]:
        found = bench.results.get(f"stack {name}") or bench.keep(
            f"stack {name}", compare_answers([(bench.model, []), pair], held)
        )
        print(f"{name:<32}{found['dense']:>9.3f}{found['packed']:>9.3f}", flush=True)
    for question in QUESTIONS:
        print(f"\n{question}")
        prompt = alpaca_example(question, "", "").prompt
        for name, (model, adapters) in steps.items():
            under = [word for adapter in adapters for word in ("--adapter", adapter)]
            asked = ["--prompt", prompt, "--max-new-tokens", 80, *under]
            said = bench.command(f"ask {name}: {question}", "generate", model, *asked)["text"]
            print(f"{name:>20}: {' '.join(said.split())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(required=True)
    for method, tokens in (
        (peqa, 500_000),
        (tasks, 200_000),
        (emef, 200_000),
        (lrec, 100_000),
        (stack, 100_000),
    ):
        sub = subparsers.add_parser(method.__name__, help=method.__doc__)
        sub.add_argument("model", help="a 16-bit model")
        sub.add_argument("out", type=Path)
        if method is not emef:
            sub.add_argument("--prose", type=Path, required=True, help="JSON lines with text")
        if method in (tasks, emef, stack):
            sub.add_argument("--instructions", type=Path, required=True, help="Alpaca's JSON")
        if method is lrec:
            sub.add_argument("--texts", type=Path, nargs="+", required=True, help="to measure on")
            sub.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
        sub.add_argument("--tokens", type=int, default=tokens, help="to train on, each")
        sub.add_argument("--windows", type=int, help="of 1,024 tokens to measure on, at most")
        sub.set_defaults(method=method)
    arguments = parser.parse_args()
    arguments.method(Bench(arguments), arguments)


if __name__ == "__main__":
    main()

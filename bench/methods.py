"""The papers' comparisons, on a model of your own: what each method gains, beside its baselines.

    python bench/methods.py peqa  MODEL OUT --prose FILE
    python bench/methods.py tasks MODEL OUT --prose FILE --instructions FILE
    python bench/methods.py emef  MODEL OUT --prose FILE --instructions FILE
    python bench/methods.py lrec  MODEL OUT --prose FILE --texts FILE FILE

MODEL is a 16-bit model. Each step is one `lowbitcore` command in a process of its own; what is in
OUT already is not run again. One document in twenty, and 200 instructions, are held out of all
training and calibration.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

HELD_OUT_DOCUMENT, HELD_OUT_INSTRUCTIONS = 20, 200
CALIBRATION = ["--samples", 32, "--length", 1024]


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
        if name not in self.results:
            command = [sys.executable, "-m", "lowbitcore", *map(str, words), "--json"]
            print("$ lowbitcore", *map(str, words), file=sys.stderr, flush=True)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            self.keep(name, json.loads(done.stdout.splitlines()[-1]))
        return self.results[name]

    def keep(self, name: str, result: Any) -> Any:
        self.results[name] = result
        self._record.write_text(json.dumps(self.results, indent=2) + "\n")
        return result

    def path(self, name: str) -> Path:
        return self.out / name

    def quantize(self, method: str, bits: int, group_size: int, prose: Path) -> Path:
        name = f"{method}-{bits}-{'row' if group_size == -1 else group_size}"
        data = [] if method == "rtn" else ["--calib", prose, *CALIBRATION]
        options = ["--bits", bits, "--group-size", group_size, "--method", method, *data]
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
            path.write_text("\n".join(lines) + "\n")
        return paths


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
            rows.append((f"{bits} bits, group {'row' if group_size == -1 else group_size}", *ppls))
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


def emef(bench: Bench, arguments: argparse.Namespace) -> None:
    """LoRA on 4 bits beside the same LoRA on 16 (2306.08162, section 4.1)."""
    prose, _ = bench.split_prose(arguments.prose)
    code, held = bench.split_instructions(arguments.instructions)
    base = bench.quantize("gptq", 4, 64, prose)
    schedule = ["--data", code, "--tokens", arguments.tokens, "--mask-prompt"]
    dense = bench.train("emef", bench.model, "emef-dense", *schedule)
    packed = bench.train("emef", base, "emef-packed", *schedule)
    for name, pair in {
        "before": ((bench.model, None), (base, None)),
        "after": ((bench.model, dense), (base, packed)),
    }.items():
        found = bench.results.get(f"answers {name}") or bench.keep(
            f"answers {name}", compare_answers(pair, bench.model, held)
        )
        print(
            f"held-out answers {name}: perplexity 16 bits {found['dense']:.3f}, 4 bits "
            f"{found['packed']:.3f} ({found['packed'] / found['dense']:.4f} x); "
            f"KL(16 || 4) {found['kl']:.4f} a token"
        )


def compare_answers(pair: Any, tokenizer_of: str, held: Path) -> dict[str, float]:
    """Perplexity of answers under two models, and the mean KL from the first to the second."""
    import torch

    import lowbitcore as lbc
    from lowbitcore.data import IGNORED, TrainingSet, read_examples
    from lowbitcore.model import load_tokenizer

    models = [lbc.load(path) for path, _ in pair]
    for model, (_, adapter) in zip(models, pair, strict=True):
        model.eval()
        if adapter is not None:
            lbc.load_adapter(model, adapter)
    examples = TrainingSet(
        read_examples(held), load_tokenizer(tokenizer_of), length=512, mask_prompt=True
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
    """Every width before and after its repair (2306.08162, table 3)."""
    prose, _ = bench.split_prose(arguments.prose)
    titles = "".join(f"{text.name:>32}" for text in arguments.texts)
    print(f"{'':<10}{titles}")
    for bits in (16, 8, 4, 3, 2):
        if bits == 16:
            ppls = [f"{bench.ppl(bench.model, text):.3f}" for text in arguments.texts]
        else:
            base = bench.quantize("gptq", bits, 64, prose)
            schedule = ["--data", prose, "--tokens", arguments.tokens]
            teacher = ["--teacher", bench.model, "--cache", bench.path("teacher")]
            tuned = bench.train("lrec", base, f"lrec-{bits}", *schedule, *teacher)
            ppls = [
                f"{bench.ppl(base, text):.3f} -> {bench.ppl(base, text, tuned):.3f}"
                for text in arguments.texts
            ]
        print(f"{f'{bits} bits':<10}" + "".join(f"{item:>32}" for item in ppls))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(required=True)
    for method, tokens in ((peqa, 500_000), (tasks, 200_000), (emef, 200_000), (lrec, 100_000)):
        sub = subparsers.add_parser(method.__name__, help=method.__doc__)
        sub.add_argument("model", help="a 16-bit model")
        sub.add_argument("out", type=Path)
        sub.add_argument("--prose", type=Path, required=True, help="JSON lines with text")
        if method in (tasks, emef):
            sub.add_argument("--instructions", type=Path, required=True, help="Alpaca's JSON")
        if method is lrec:
            sub.add_argument("--texts", type=Path, nargs="+", required=True, help="to measure on")
        sub.add_argument("--tokens", type=int, default=tokens, help="to train on, each")
        sub.add_argument("--windows", type=int, help="of 1,024 tokens to measure on, at most")
        sub.set_defaults(method=method)
    arguments = parser.parse_args()
    arguments.method(Bench(arguments), arguments)


if __name__ == "__main__":
    main()

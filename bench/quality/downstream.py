"""Tasks of EleutherAI's lm-eval on a model of any kind here, with its adapters.

    pip install '.[downstream]'
    python bench/quality/downstream.py MODEL [--adapter DIR] --tasks arc_easy,hellaswag
    python bench/quality/downstream.py MODEL [--adapter DIR] --text FILE [--text FILE]

--tasks are those of the harness, which fetches their data from the hub. --text makes a task of text
that the model has not seen, for machines without a network: which of four continuations is the true
one? The others follow other places of the same text, so a guess is right once in four.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

from lowbitcore.cli.app import load_model
from lowbitcore.source import load_tokenizer

CONTEXT, CONTINUATION, CHOICES = 64, 12, 4  # words, words, continuations
PLACE = CONTEXT + CONTINUATION
COLUMNS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def questions(text: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Of places that do not overlap, in an order by chance."""
    words = re.findall(r"\S+", text)
    places = list(range(0, len(words) - PLACE + 1, PLACE))
    chance = random.Random(seed)
    chance.shuffle(places)
    least = max(count, CHOICES)
    if len(places) < least:
        raise SystemExit(f"--text: expected {least} places of {PLACE} words, got {len(places)}")

    def continuation(place: int) -> str:
        return " " + " ".join(words[place + CONTEXT : place + PLACE])

    found = []
    for place in places[:count]:
        others = chance.sample([p for p in places if p != place], CHOICES - 1)
        answer = chance.randrange(CHOICES)
        choices = [continuation(p) for p in others]
        choices.insert(answer, continuation(place))
        context = " ".join(words[place : place + CONTEXT])
        found.append({"context": context, "choices": choices, "answer": answer})
    return found


def make_task(directory: Path, text: Path, count: int, seed: int) -> str:
    """A task in the harness's own description, and its name."""
    name = f"continuation_of_{re.sub(r'[^a-z0-9]', '_', text.stem.lower())}"
    items = directory / f"{name}.jsonl"
    lines = (json.dumps(item) for item in questions(text.read_text(), count, seed))
    items.write_text("\n".join(lines) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    }
    (directory / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a 16-bit or quantized model")
    parser.add_argument("--adapter", action="append", default=[], help="of LREC, EMEF or PEQA")
    parser.add_argument("--tasks", default="", help="names of the harness, with commas")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--questions", type=int, default=500, help="of each text, or each task")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.tasks or arguments.text):
        parser.error("expected --tasks or --text")
    # The harness is an extra of its own, and --help should do without.
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SystemExit(f"{error}: expected lm-eval: pip install '.[downstream]'") from error

    model = load_model(arguments.model, "auto", "cpu", arguments.adapter)
    tokenizer = load_tokenizer(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        tasks = [name for name in arguments.tasks.split(",") if name]
        for text in arguments.text:
            tasks.append(make_task(Path(scratch), text, arguments.questions, arguments.seed))
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=tasks,
            task_manager=TaskManager(include_path=scratch),
            limit=arguments.questions,
            random_seed=arguments.seed,
        )
    print(f"{'task':<32}{'questions':>10}{'acc':>8}{'+-':>8}{'acc_norm':>10}{'+-':>8}")
    for task, scores in found["results"].items():
        row = [scores.get(f"{name},none", float("nan")) for name in COLUMNS]
        print(
            f"{task:<32}{found['n-samples'][task]['effective']:>10}{row[0]:>8.3f}{row[1]:>8.3f}"
            f"{row[2]:>10.3f}{row[3]:>8.3f}"
        )


if __name__ == "__main__":
    main()

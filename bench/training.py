"""Training speed and memory beside what people do otherwise: tokens a second, the process's peak.

    python bench/training.py MODEL QMODEL [--rounds 3] [--steps 4]
    python bench/training.py MODEL QMODEL --profile

MODEL is a 16-bit directory, QMODEL the same model quantized. Each contender runs in a process of
its own, in turn, `rounds` times; medians are printed. Batches of 2 x 512 random tokens, AdamW.

EMEF: LoRA of rank 8 on q_proj and v_proj; PEFT computes in bfloat16 on the dense model, with
gradient checkpointing. LREC: LoRA of rank 8 on every linear; the naive loop runs the teacher beside
the dequantized student in PEFT, both in bfloat16, the student with gradient checkpointing, and
takes losses of whole logits; ours has the teacher's hidden states from a cache, whose filling, once
for all passes over the data, is not counted. Each is there without checkpointing, too.

--profile tells where a step of ours goes, without checkpointing, in place of comparing. It takes
longer than one that is not watched: what lies outside of operators, most.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

BATCH, LENGTH, RANK = 2, 512, 8
EMEF = {
    "peft": "PEFT, bf16, checkpointing",
    "peft-none": "PEFT, bf16, none",
    "full": "packed, full",
    "selective": "packed, selective",
    "none": "packed, none",
}
LREC = {
    "naive": "naive, checkpointing",
    "naive-none": "naive, none",
    "lrec-selective": "packed, selective",
    "lrec-none": "packed, none",
}

PROFILED = {"EMEF": "none", "LREC": "lrec-none"}
# Of what torch records, by name.
PARTS = {
    "products of packed weights": r"lowbitcore::(qgemm|permute_columns)",
    "heads and losses": r"_ChunkedLoss",
    "attention": r"lowbitcore::attention|aten::_scaled_dot_product",
    "between products": r"lowbitcore::(rms_norm|rotate|swiglu|dropout)",
    "adapters": r"lowbitcore::add_low_rank|aten::(linear|matmul|addmm|mm)$",
    "optimizer": r"Optimizer\.",
}

Loss = Callable[[torch.Tensor, int], torch.Tensor]  # of a batch and the step it belongs to


def batch(vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (BATCH, LENGTH), generator=generator)


def with_peft(dense: Any, targets: Any, dropout: float, *, checkpointing: bool) -> Any:
    import peft

    if checkpointing:
        dense.activation_checkpointing_enable({"use_reentrant": False})
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=targets, lora_dropout=dropout
    )
    return peft.get_peft_model(dense, config).train()


def prepare(contender: str, path: str, qpath: str, steps: int) -> tuple[Any, Loss]:
    """What trains, and the loss of a batch. Every contender has transformers' Trainer imported,
    which ours cannot do without, and which PEFT's users train with."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: F401

    def dense_model() -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

    checkpointing = contender in ("peft", "naive")
    if contender in ("peft", "peft-none"):
        model = with_peft(dense_model(), ["q_proj", "v_proj"], 0.05, checkpointing=checkpointing)
        return model, lambda ids, step: model(input_ids=ids, labels=ids)["loss"]

    import lowbitcore as lbc
    from lowbitcore.blocks import quantized_linears
    from lowbitcore.head import run_body
    from lowbitcore.heap import keep_heap_small
    from lowbitcore.lrec import LrecTrainer
    from lowbitcore.training import TrainedModel, set_checkpointing

    packed = lbc.load(qpath)
    if contender in ("naive", "naive-none"):
        student, teacher = dense_model(), dense_model().eval()
        for name, linear in quantized_linears(packed).items():
            student.get_submodule(name).weight.data = linear.dequantize(torch.bfloat16)
        del packed
        model = with_peft(student, "all-linear", 0.0, checkpointing=checkpointing)

        def distil(ids: torch.Tensor, step: int) -> torch.Tensor:
            with torch.no_grad():
                wanted = teacher(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
            found = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
            kl = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()
            return kl + 0.1 * functional.nll_loss(found.flatten(0, 1), ids[:, 1:].flatten())

        return model, distil
    if contender in LREC:
        teacher = dense_model().eval()
        with torch.no_grad():  # as a cache on disk would have them
            batches = [batch(packed.config.vocab_size, step) for step in range(steps + 1)]
            states = [run_body(teacher, input_ids=ids).last_hidden_state for ids in batches]
        teacher.model.layers = torch.nn.ModuleList()  # a cache needs its head alone
        lbc.prepare_lora(packed, rank=RANK, alpha=RANK, targets=None)
        settings = TrainingArguments(tempfile.gettempdir(), report_to="none", use_cpu=True)
        kind: Any = contender.removeprefix("lrec-")
        trainer = LrecTrainer(packed, settings, [], teacher=teacher, checkpointing=kind)
        trained = trainer.model.train()
        return trained, lambda ids, step: trained(
            input_ids=ids, labels=ids, teacher_hidden=states[step]
        )["loss"]
    lbc.prepare_lora(packed, rank=RANK, alpha=2 * RANK, dropout=0.05)
    set_checkpointing(packed, contender)  # type: ignore[arg-type]
    if contender == "full":  # as the commands do
        keep_heap_small()
    model = TrainedModel(packed).train()
    return model, lambda ids, step: model(input_ids=ids, labels=ids)["loss"]


def train(contender: str, path: str, qpath: str, steps: int) -> Iterator[float]:
    """Seconds of one step after another, one more than `steps`: the first warms up."""
    model, loss = prepare(contender, path, qpath, steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for step in range(steps + 1):
        ids = batch(model.config.vocab_size, step)
        start = time.perf_counter()
        loss(ids, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - start


def measure(contender: str, path: str, qpath: str, steps: int) -> dict[str, float]:
    """Medians over steps of one contender, in this process."""
    seconds = list(train(contender, path, qpath, steps))[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": BATCH * LENGTH / statistics.median(seconds), "peak": peak}


def part_of(event: Any) -> str | None:
    """Of the outermost event that belongs to one: a product in the head is the head's."""
    found = None
    while event is not None:
        names = (part for part, pattern in PARTS.items() if re.match(pattern, event.name))
        found = next(names, found)
        event = event.cpu_parent
    return found


def profile(contender: str, path: str, qpath: str, steps: int) -> dict[str, float]:
    """Milliseconds of a step, by part."""
    run = train(contender, path, qpath, steps)
    next(run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        total = 1e3 * sum(run)
    found: Counter[str | None] = Counter()
    for event in recorded.events():
        found[part_of(event)] += event.self_cpu_time_total / 1e3
    parts = {part: found[part] for part in PARTS}
    parts["the rest"] = total - sum(parts.values())
    return {part: ms / steps for part, ms in parts.items()}


def print_profile(title: str, parts: dict[str, float]) -> None:
    total = sum(parts.values())
    print(f"{title:<28}{'ms':>10}{'share':>8}")
    for part, ms in (*parts.items(), ("a step", total)):
        print(f"{part:<28}{ms:>10.1f}{ms / total:>8.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("qmodel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--only", choices=[*EMEF, *LREC], help="run one in this process, print JSON"
    )
    arguments = parser.parse_args()
    if arguments.only:
        found = measure(arguments.only, arguments.model, arguments.qmodel, arguments.steps)
        print(json.dumps(found))
        return
    if arguments.profile:
        for title, name in PROFILED.items():
            print_profile(title, profile(name, arguments.model, arguments.qmodel, arguments.steps))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in (*EMEF, *LREC)}
    for _ in range(arguments.rounds):
        for name, runs in results.items():
            command = [sys.executable, __file__, arguments.model, arguments.qmodel]
            command += ["--only", name, "--steps", str(arguments.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    for title, contenders in (("EMEF", EMEF), ("LREC", LREC)):
        print(f"{title:<28}{'tokens/s':>10}{'ratio':>8}{'peak MB':>9}{'ratio':>8}")
        base: dict[str, float] = {}
        for name, label in contenders.items():
            item = {
                key: statistics.median(run[key] for run in results[name])
                for key in ("tokens_per_second", "peak")
            }
            base = base or item
            print(
                f"{label:<28}{item['tokens_per_second']:>10.0f}"
                f"{item['tokens_per_second'] / base['tokens_per_second']:>8.2f}"
                f"{item['peak'] / 1e6:>9.0f}{item['peak'] / base['peak']:>8.2f}"
            )


if __name__ == "__main__":
    main()

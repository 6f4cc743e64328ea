"""Fine-tuning speed and memory beside PEFT: tokens a second and the process's peak.

    python bench/training.py MODEL QMODEL [--rounds 3] [--steps 4]

MODEL is a 16-bit directory, QMODEL the same model quantized. Each contender runs in a process of
its own, in turn, `rounds` times; medians are printed. All do the same work: LoRA of rank 8 on
q_proj and v_proj, batches of 2 x 512 tokens, gradient checkpointing, AdamW, random tokens. PEFT
computes in bfloat16 on the dense model.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

BATCH, LENGTH, RANK = 2, 512, 8
CONTENDERS = ("peft", "full", "selective", "none")


def batch(vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (BATCH, LENGTH), generator=generator)


def measure(contender: str, path: str, steps: int) -> dict[str, float]:
    """Medians over steps of one contender, in this process."""
    if contender == "peft":
        import peft
        from transformers import AutoModelForCausalLM

        dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        dense.activation_checkpointing_enable({"use_reentrant": False})
        config = peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], lora_dropout=0.05
        )
        model = peft.get_peft_model(dense, config)
        vocabulary = dense.config.vocab_size
    else:
        import lowbitcore as lbc
        from lowbitcore.heap import return_tensors_at_once
        from lowbitcore.training import TrainedModel, set_checkpointing

        packed = lbc.load(path)
        lbc.prepare_lora(packed, rank=RANK, alpha=2 * RANK, dropout=0.05)
        set_checkpointing(packed, contender)  # type: ignore[arg-type]
        if contender == "full":  # as the commands do
            return_tensors_at_once()
        model = TrainedModel(packed)
        vocabulary = packed.config.vocab_size
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds = []
    for step in range(steps + 1):
        ids = batch(vocabulary, step)
        start = time.perf_counter()
        model(input_ids=ids, labels=ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The first step warms up.
    return {"tokens_per_second": BATCH * LENGTH / statistics.median(seconds[1:]), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("qmodel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=CONTENDERS, help="run one in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        path = arguments.model if arguments.only == "peft" else arguments.qmodel
        print(json.dumps(measure(arguments.only, path, arguments.steps)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name, found in results.items():
            command = [sys.executable, __file__, arguments.model, arguments.qmodel]
            command += ["--only", name, "--steps", str(arguments.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':>22}{'tokens/s':>10}{'x PEFT':>8}{'peak MB':>9}{'x PEFT':>8}")
    medians = {
        name: {key: statistics.median(item[key] for item in found) for key in found[0]}
        for name, found in results.items()
    }
    base = medians["peft"]
    for name, item in medians.items():
        title = "PEFT, bf16" if name == "peft" else f"packed, {name}"
        print(
            f"{title:>22}{item['tokens_per_second']:>10.0f}"
            f"{item['tokens_per_second'] / base['tokens_per_second']:>8.2f}"
            f"{item['peak'] / 1e6:>9.0f}{item['peak'] / base['peak']:>8.2f}"
        )


if __name__ == "__main__":
    main()

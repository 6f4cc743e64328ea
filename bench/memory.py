"""EMEF's memory at the papers' sizes: one full step on random packed weights, whole-process peak.

    python bench/memory.py [--sizes 7B:4 13B:4 30B:4 65B:2] [--checkpointing full]

LLaMA's shapes, groups of 128, LoRA of rank 8 on q_proj and v_proj, micro-batch 1 of 256 tokens,
AdamW; forward, backward and optimizer step. Each size runs in a process of its own. Beside it the
figures of INT2.1 (2306.08162), table 1, measured on a GPU. Below, what `plan` predicts of 7B at 4
bits for larger micro-batches, which nothing here runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

SHAPES = {  # hidden, intermediate, layers, heads
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "30B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}
PAPER = {"7B:4": 4.93, "13B:4": 9.15, "30B:4": 20.15}
PREDICTED = (24, 48)  # micro-batches
GROUP_SIZE, RANK, LENGTH = 128, 8, 256


def random_linear(
    in_features: int, out_features: int, *, bits: int, group_size: int
) -> torch.nn.Module:
    """A frozen packed linear of random integers, whose outputs are about as large as its inputs."""
    from lowbitcore.nn import QuantLinear

    linear = QuantLinear(in_features, out_features, bits=bits, group_size=group_size)
    linear.packed.random_(0, 256)
    linear.packed[-linear.scales.numel() :].remainder_(2**bits)  # zeros: bytes at the end
    linear.scales.data.fill_(2.0 / 2**bits / in_features**0.5)
    return linear.requires_grad_(False)


def config_of(size: str) -> Any:
    """LLaMA's of that size, in bf16."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads = SHAPES[size]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def build(size: str, bits: int) -> torch.nn.Module:
    """A packed LLaMA with random integers, tensor by tensor: no 16-bit block is ever made."""
    from transformers import AutoModelForCausalLM

    from lowbitcore.blocks import block_linears, linear_features, set_module
    from lowbitcore.modeling import use_own_operations

    config = config_of(size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    use_own_operations(model)  # as in a model that is loaded
    for path, linear in block_linears(model).items():
        in_features, out_features = linear_features(linear)
        packed = random_linear(in_features, out_features, bits=bits, group_size=GROUP_SIZE)
        set_module(model, path, packed)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=0.02)
            parent, _, leaf = name.rpartition(".")
            if parameter.dim() == 1:
                value.fill_(1.0)
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value))
    # Tables of the positions are buffers: made anew, small.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)
    return model


def measure(size: str, bits: int, checkpointing: str) -> dict[str, float]:
    import lowbitcore as lbc
    from lowbitcore.heap import keep_heap_small
    from lowbitcore.training import TrainedModel, set_checkpointing

    model = build(size, bits)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    lbc.prepare_lora(model, rank=RANK, alpha=2 * RANK)
    set_checkpointing(model, checkpointing)
    if checkpointing == "full":  # as the commands do
        keep_heap_small()
    trained = TrainedModel(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(32000, (1, LENGTH))
    start = time.perf_counter()
    loss = trained(input_ids=ids, labels=ids)["loss"]
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    assert torch.isfinite(loss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"weights": weights, "peak": peak, "seconds": seconds}


def predict(micro_batch: int, checkpointing: Any) -> float:
    """Bytes of a step of 7B at its peak, by `plan`."""
    from lowbitcore.plan import parse_memory, plan

    return plan(
        config_of("7B"),
        method="emef",
        bits=4,
        group_size=GROUP_SIZE,
        rank=RANK,
        length=LENGTH,
        micro_batch=micro_batch,
        memory=parse_memory(None),
        checkpointing=checkpointing,
    ).peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["7B:4", "13B:4", "30B:4", "65B:2"])
    parser.add_argument("--checkpointing", default="full", choices=["full", "selective", "none"])
    parser.add_argument("--one", help="measure one size in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        size, bits = arguments.one.split(":")
        print(json.dumps(measure(size, int(bits), arguments.checkpointing)))
        return
    print(f"{'size:bits':>10}{'weights GB':>12}{'peak GB':>10}{'INT2.1 GB':>11}{'step s':>8}")
    for name in arguments.sizes:
        command = [sys.executable, __file__, "--one", name]
        command += ["--checkpointing", arguments.checkpointing]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name:>10}  failed: {(done.stderr.splitlines() or ['killed'])[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        paper = f"{PAPER[name]:.2f}" if name in PAPER else "-"
        print(
            f"{name:>10}{found['weights'] / 1e9:>12.2f}{found['peak'] / 1e9:>10.2f}"
            f"{paper:>11}{found['seconds']:>8.0f}"
        )
    print("\n7B:4, predicted by plan and not measured")
    print(f"{'micro-batch':>12}{'peak GB':>10}")
    for micro_batch in PREDICTED:
        peak = predict(micro_batch, arguments.checkpointing)
        print(f"{micro_batch:>12}{peak / 1e9:>10.2f}")


if __name__ == "__main__":
    main()

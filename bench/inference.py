"""What a person waits for: tokens a second of a quantized model beside transformers in 16 bits.

    python bench/inference.py MODEL QMODEL [--adapter DIRECTORY] [--rounds 5] [--profile]

MODEL is a 16-bit directory, QMODEL the same model quantized, with an adapter if one is given. In
turn, `rounds` times, medians: prefill is one forward over 1,024 tokens, decode 64 greedy tokens
after a prompt of 16 with a cache, by transformers' own `generate` for both. --profile tells where
the packed model's decode goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import lowbitcore as lbc

PREFILL, PROMPT, DECODE = 1024, 16, 64


def prefill(model: Any, ids: torch.Tensor) -> int:
    model(input_ids=ids[:, :PREFILL], use_cache=False)
    return PREFILL


def decode(model: Any, ids: torch.Tensor) -> int:
    model.generate(
        ids[:, :PROMPT],
        attention_mask=torch.ones(1, PROMPT, dtype=torch.int64),
        max_new_tokens=DECODE,
        min_new_tokens=DECODE,
        do_sample=False,
        pad_token_id=0,
    )
    return DECODE


def rate(task: Callable[[Any, torch.Tensor], int], model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    tokens = task(model, ids)
    return tokens / (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a 16-bit directory")
    parser.add_argument("qmodel", help="the same model, quantized")
    parser.add_argument("--adapter", help="on the quantized model alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    models = {
        "transformers, bf16": transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.bfloat16
        ).eval(),
        "lowbitcore": lbc.load(arguments.qmodel).eval(),
    }
    if arguments.adapter:
        lbc.load_adapter(models["lowbitcore"], arguments.adapter)
    generator = torch.Generator().manual_seed(0)
    vocabulary = models["lowbitcore"].config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, PREFILL), generator=generator)
    print(f"{'tokens/s':<22}{'prefill':>12}{'decode':>12}")
    medians: dict[str, list[float]] = {name: [] for name in models}
    for task in (prefill, decode):
        found: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(arguments.rounds + 1):  # the first one warms up
            for name, model in models.items():
                found[name].append(rate(task, model, ids))
        for name, rates in found.items():
            medians[name].append(statistics.median(rates[1:]))
    for name, rates in medians.items():
        print(f"{name:<22}" + "".join(f"{value:>12.1f}" for value in rates))
    base, ours = medians.values()
    ratios = "".join(f"{mine / other:>11.2f}x" for mine, other in zip(ours, base, strict=True))
    print(f"{'ratio':<22}{ratios}")
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(decode, models["lowbitcore"], ids)
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()

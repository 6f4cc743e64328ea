"""What a person waits for: tokens a second of a quantized model beside transformers in 16 bits.

    python bench/inference.py MODEL QMODEL [--adapter DIRECTORY] [--rounds 5] [--profile]

MODEL is a 16-bit directory, QMODEL the same model quantized, with an adapter if one is given. In
turn, `rounds` times, medians: prefill is one forward over 1,024 tokens, decode 64 greedy tokens
after a prompt of 16 with a cache, by transformers' own `generate` for all. Where the processor
multiplies no bf16, transformers is there in fp32, too. "By modules" is without the calls that take
a token through half a block. --profile tells where the packed model's decode goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import transformers

import lowbitcore as lbc
from lowbitcore import dense, modeling

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


def by_modules(task: Callable[[Any, torch.Tensor], int], model: Any, ids: torch.Tensor) -> float:
    with mock.patch.object(modeling.decode, "_parts", return_value=None):
        return rate(task, model, ids)


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
    types = {"bf16": torch.bfloat16}
    if not dense.multiplies(torch.bfloat16):
        types["fp32"] = torch.float32
    ours = lbc.load(arguments.qmodel)
    if arguments.adapter:
        lbc.load_adapter(ours, arguments.adapter)
    contenders = {"lowbitcore": (rate, ours), "lowbitcore, by modules": (by_modules, ours)}
    for name, dtype in types.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        contenders[f"transformers, {name}"] = rate, model.eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = ours.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, PREFILL), generator=generator)
    print(f"{'tokens/s (ours over it)':<26}{'prefill':>20}{'decode':>20}")
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for task in (prefill, decode):
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds + 1):  # the first one warms up
            for name, (measure, model) in contenders.items():
                found[name].append(measure(task, model, ids))
        for name, rates in found.items():
            medians[name].append(statistics.median(rates[1:]))
    for name, rates in medians.items():
        pairs = zip(rates, medians["lowbitcore"], strict=True)
        cells = "".join(f"{value:>11.1f} ({mine / value:.2f} x)" for value, mine in pairs)
        print(f"{name:<26}{cells}")
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(decode, ours, ids)
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()

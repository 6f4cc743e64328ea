"""LREC's memory where the teacher does not fit: the commands, on random weights of LLaMA's shapes.

    python bench/memory_lrec.py DIR [--size 7B] [--bits 4]

Writes a 16-bit model to DIR (13.5 GB for 7B), quantizes it to nearest, and trains LREC for one step
of 256 tokens with its states cached; the peak of each command's whole process. What is in DIR
already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lowbitcore import files
from memory import GROUP_SIZE, SHAPES, config_of

LENGTH = 256


def write_model(directory: Path, size: str) -> None:
    """A checkpoint of random weights, tensor by tensor, and a tokenizer of numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from lowbitcore.formats import checkpoint
    from lowbitcore.formats.checkpoint import Entry

    config = config_of(size)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    def entry(name: str, tensor: torch.Tensor) -> Entry:
        def load() -> torch.Tensor:
            value = torch.empty(tensor.shape, dtype=tensor.dtype)
            return value.fill_(1.0) if value.dim() == 1 else value.normal_(std=0.02)

        return Entry(name, tensor.dtype, tuple(tensor.shape), load)

    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<unk>": 0, **{str(i): i for i in range(1, 1000)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    checkpoint.write_shards(directory, [entry(*item) for item in skeleton.state_dict().items()])
    files.write_json(directory / "config.json", config.to_diff_dict())  # last: it is finished


def run(*words: Any) -> tuple[float, float]:
    """A command's peak in GB and its seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "lowbitcore", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss * 1024 / 1e9, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="7B")
    parser.add_argument("--bits", type=int, default=4)
    arguments = parser.parse_args()
    place = arguments.directory
    teacher = place / f"llama-{arguments.size}"
    packed = place / f"{teacher.name}-{arguments.bits}"
    if not (teacher / "config.json").exists():
        write_model(teacher, arguments.size)
    text = place / "text.jsonl"
    text.write_text(json.dumps({"text": " ".join(str(i % 999 + 1) for i in range(LENGTH))}))

    def show(name: str, found: tuple[float, float]) -> None:
        print(f"{name:<12}{found[0]:>8.2f} GB{found[1]:>8.0f} s", flush=True)

    weights = sum(path.stat().st_size for path in teacher.glob("*.safetensors"))
    print(f"the 16-bit model's weights: {weights / 1e9:.2f} GB")
    if not (packed / "config.json").exists():
        settings = ("--bits", arguments.bits, "--group-size", GROUP_SIZE, "--method", "rtn")
        show("quantize", run("quantize", teacher, packed, *settings))
    shutil.rmtree(place / "states", ignore_errors=True)
    shutil.rmtree(place / "learnt", ignore_errors=True)
    schedule = ("--data", text, "--steps", 1, "--batch", 1, "--length", LENGTH)
    taught = ("--teacher", teacher, "--cache", place / "states", "--checkpointing", "full")
    show("lrec", run("lrec", packed, place / "learnt", *schedule, *taught))


if __name__ == "__main__":
    main()

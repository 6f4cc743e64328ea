"""Greedy text generation, for a look at what a model says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def complete(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool,
    streamer: Any = None,
) -> tuple[str, int]:
    """The greedy continuation of a prompt, and its length in tokens."""
    if not prompt:
        raise ValueError("--prompt: expected some text, got none")
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("--chat: expected a model with a chat template, this one has none")
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            **encoded.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
    new = output[0, encoded["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)

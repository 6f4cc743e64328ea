"""Greedy text generation, for a look at what a model says."""

from __future__ import annotations

from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel

from lowbitcore.checks import check_tokens, check_unicode, max_length


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
        raise ValueError("generate: prompt: expected some text, got none")
    check_unicode("generate: prompt", prompt)
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("generate: chat: expected a model with a chat template")
        try:
            encoded = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        except TemplateError as error:
            raise ValueError(f"generate: chat: the model's chat template fails: {error}") from error
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if not encoded["input_ids"].numel():
        raise ValueError(f"generate: prompt: expected one with tokens, got none in {prompt!r}")
    check_tokens("generate: prompt", encoded["input_ids"], model)
    length = encoded["input_ids"].shape[1] + max_new_tokens
    limit = max_length(model.config)
    if limit is not None and length > limit:
        raise ValueError(
            f"generate: max_new_tokens: expected prompt and answer to fit the model's {limit} "
            f"positions, got {length}"
        )
    ids = encoded["input_ids"].to(model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=encoded.get("attention_mask", torch.ones_like(ids)).to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=False,
            streamer=streamer,
        )
    new = output[0, encoded["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)

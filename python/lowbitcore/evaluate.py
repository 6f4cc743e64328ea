"""Perplexity, in the way of Hugging Face's guide."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowbitcore.blocks import evaluating
from lowbitcore.checks import check_kind, check_length, check_tokens, check_unicode, max_length
from lowbitcore.head import chunk_tokens, open_head, run_body
from lowbitcore.losses import negative_log_likelihood


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood over `tokens` scored tokens in `windows` windows."""

    ppl: float
    tokens: int
    windows: int


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    context: int | None = None,
    windows: int | None = None,
    stride: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of `text` (https://huggingface.co/docs/transformers/perplexity).

    The text is tokenized as one string without special tokens and cut into full windows of
    `context` tokens (default: 1,024, or what the model can take), `stride` apart (default:
    `context`, no overlap). Each token is scored once, in the first window that holds it with
    something before it: a window without overlap on its last context - 1 tokens, one with overlap
    on its last `stride`. `windows` limits their number. Nothing is dropped, in training mode, too.
    Raises ValueError where the text is shorter than one window.
    """
    ids, context = _tokenized(model, tokenizer, text, context)
    stride = context if stride is None else stride
    for name, value in (("stride", stride), ("windows", windows)):
        if value is not None and type(value) is not int:
            raise ValueError(f"perplexity: {name}: expected an integer, got {value!r}")
    if not 1 <= stride <= context:
        raise ValueError(f"perplexity: stride: expected 1..{context}, got {stride}")
    if windows is not None and windows < 1:
        raise ValueError(f"perplexity: windows: expected at least 1, got {windows}")
    starts = list(range(0, len(ids) - context + 1, stride))[:windows]
    total, tokens = 0.0, 0
    with evaluating(model):
        for number, start in enumerate(
            tqdm(starts, desc="perplexity", unit="window", disable=not progress)
        ):
            scored = context - 1 if number == 0 else min(stride, context - 1)
            window = ids[start : start + context].to(model.device)
            total += _window_loss(model, window, scored)
            tokens += scored
    mean = total / tokens
    if math.isnan(mean):
        raise ValueError("perplexity: model: its logits hold NaN")
    ppl = math.exp(min(mean, 700.0))  # a collapsed model may exceed what exp can hold
    return Perplexity(ppl, tokens, len(starts))


def check_text(where: str, model: PreTrainedModel, tokenizer: Any, text: str) -> None:
    """ValueError where this text will not do for `perplexity`."""
    _tokenized(model, tokenizer, text, None, where)


def _tokenized(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    context: int | None,
    where: str = "perplexity: text",
) -> tuple[torch.Tensor, int]:
    """The tokens of a text that fills at least one window, int64 [n], and a window's length."""
    check_kind("perplexity: model", model, PreTrainedModel)
    context = min(1024, max_length(model.config) or 1024) if context is None else context
    check_kind("perplexity: tokenizer", tokenizer, PreTrainedTokenizerBase)
    check_kind("perplexity: text", text, str)
    check_unicode("perplexity: text", text)
    if type(context) is not int:
        raise ValueError(f"perplexity: context: expected an integer, got {context!r}")
    if context < 2:
        raise ValueError(f"perplexity: context: expected at least 2, got {context}")
    check_length("perplexity: context", context, model.config)
    ids = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
    )
    if len(ids) < context:
        raise ValueError(
            f"{where}: expected at least one window of {context} tokens (the context), got "
            f"{len(ids)}"
        )
    check_tokens("perplexity: tokenizer", ids, model)
    return ids, context


def _window_loss(model: PreTrainedModel, window: torch.Tensor, scored: int) -> float:
    """Summed cross-entropy of the last `scored` tokens of one window [context]."""
    output = run_body(model, input_ids=window[None])
    hidden, targets = output.last_hidden_state[0, -scored - 1 : -1], window[-scored:]
    size = chunk_tokens(model)
    with open_head(model, output) as logits:
        return sum(
            negative_log_likelihood(logits(part), wanted).item()
            for part, wanted in zip(hidden.split(size), targets.split(size), strict=True)
        )

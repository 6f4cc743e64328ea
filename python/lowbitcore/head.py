"""A causal language model in two parts: its body, up to the last hidden states, and its head.

Logits [tokens, vocabulary] are the largest tensor of any model with a large vocabulary. Nothing
here makes them whole: the body runs once, and the head on a few tokens at a time. The head is the
model's own forward with the body replaced by a stub, so that whatever a model does to its logits
(scaling, soft caps) is done here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Elements of a chunk of logits: 16 MB in bfloat16.
_CHUNK_ELEMENTS = 1 << 23


def run_body(model: PreTrainedModel, **inputs: Tensor | None) -> Any:
    """The body's output on input_ids [batch, length], with `last_hidden_state`."""
    no_rows = cast(Tensor, inputs["input_ids"]).new_empty(0, dtype=torch.int64)
    seen: list[Any] = []
    handle = model.get_decoder().register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    try:
        # No row of logits from this call. Of one row each the head would make a batched product,
        # for which torch copies its weight as often as there are sequences.
        model(**inputs, use_cache=False, logits_to_keep=no_rows)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def open_head(model: PreTrainedModel, output: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """What makes logits [tokens, vocabulary] of hidden states [tokens, features].

    `output` is any output of the body, for its type. Differentiable in the hidden states.
    """
    body = model.get_decoder()
    own_forward = body.__dict__.get("forward")

    def logits(hidden: Tensor) -> Tensor:
        part = type(output)(last_hidden_state=hidden[None])
        body.forward = lambda *args, **kwargs: part
        unused = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        # A view, unlike an index, needs no tensor of zeros in its backward.
        return cast(Tensor, model(input_ids=unused, use_cache=False).logits.flatten(0, 1))

    try:
        yield logits
    finally:
        if own_forward is None:
            body.__dict__.pop("forward", None)
        else:
            body.forward = own_forward


def chunk_tokens(model: PreTrainedModel) -> int:
    """How many tokens' logits to make at a time."""
    return max(1, _CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)

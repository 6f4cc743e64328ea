"""Dense linears and the head in the place of torch's, where these are slow."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbitcore.dense import is_slow, is_slow_with, linear, linear_across
from lowbitcore.ops.operators import is_plain


class Linear(nn.Linear):
    """torch's own wherever that is quick."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Conv1D(Conv1D):  # type: ignore[misc]
    """GPT-2's linear."""

    def forward(self, x: Tensor) -> Tensor:
        if is_slow_with(x, self.weight):
            return linear_across(x, self.weight, self.bias)
        y: Tensor = super().forward(x)
        return y


def use_own_linears(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is Conv1D:
            module.__class__ = _Conv1D


class _Head(Linear):
    """A linear like any other, but that one row goes through a product with a vector: as one of
    matrices it takes up to twice as long to read the weight, which is most of what decoding a
    token reads outside of packed weights."""

    def forward(self, input: Tensor) -> Tensor:
        x, weight = input, self.weight
        if (
            is_plain(x, weight)
            and x.numel() == self.in_features == x.shape[-1]
            and x.dtype == weight.dtype != torch.float16  # which takes longer that way
            and not is_slow(x)
            and self.bias is None
            and not torch.is_autocast_enabled("cpu")
        ):
            return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        return super().forward(x)


def use_own_head(model: PreTrainedModel) -> None:
    """Of a model that has our linears already."""
    head = model.get_output_embeddings()
    if type(head) is Linear:
        head.__class__ = _Head

"""Where things lie in a model: its blocks, their linears, what is packed and what is adapted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbitcore.nn import LoraLinear, LowRank, QuantLinear

# What a block calls a list of its experts.
_EXPERTS = "experts"


class BlockLayout(NamedTuple):
    """The transformer blocks of a model: `prefix` is the path of the list, e.g. `model.layers`."""

    prefix: str
    modules: nn.ModuleList


def find_blocks(model: nn.Module) -> BlockLayout:
    """The list of same-class blocks that holds most of the linears' parameters.

    Raises ValueError where there is none.
    """
    best: tuple[int, BlockLayout] | None = None
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(item) for item in module}) != 1:
            continue
        if prefix.rpartition(".")[2] == _EXPERTS:
            continue
        size = sum(_linear_size(item) for item in module.modules())
        # Outer lists come first, so a list of experts in a block never wins over the blocks.
        if size > (best[0] if best else 0):
            best = (size, BlockLayout(prefix, module))
    if best is None:
        raise ValueError(f"find_blocks: {type(model).__name__} has no list of blocks with linears")
    return best[1]


def _linear_size(module: nn.Module) -> int:
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.numel()
    return module.in_features * module.out_features if isinstance(module, QuantLinear) else 0


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an nn.Linear or Conv1D, whose weight is [in, out]."""
    rows, columns = cast(torch.Tensor, module.weight).shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight of an nn.Linear or Conv1D as [out, in]."""
    weight = cast(torch.Tensor, module.weight).detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def as_stored(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] as the module holds it."""
    return weight.T if isinstance(module, Conv1D) else weight


def quantizable(block: nn.Module) -> dict[str, nn.Module]:
    """Linears of a block with both dimensions multiples of 32, by path inside the block, but for
    those that choose experts: of few weights, on which much depends."""
    routers = _routers(block)
    return {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and path not in routers
        and all(size % 32 == 0 for size in linear_shape(module))
    }


def _routers(block: nn.Module) -> set[str]:
    """Linears beside a list of experts that put out a number for each of these; but for an expert
    of all tokens, which may be as wide."""
    found: set[str] = set()
    for path, experts in block.named_modules():
        place, _, name = path.rpartition(".")
        if name == _EXPERTS and isinstance(experts, nn.ModuleList):
            found |= {
                inner
                for inner, module in block.get_submodule(place).named_modules(prefix=place)
                if isinstance(module, nn.Linear)
                and module.out_features == len(experts)
                and not re.search("expert|shared", inner.removeprefix(place))
            }
    return found


def not_quantizable(block: nn.Module) -> dict[str, str]:
    """What holds matrices in a block but stays in 16 bits: path inside the block -> reason."""
    reasons, routers = {}, _routers(block)
    for path, module in block.named_modules():
        if path in routers:
            reasons[path] = "chooses experts"
        elif isinstance(module, nn.Linear | Conv1D):
            in_features, out_features = linear_shape(module)
            if in_features % 32 or out_features % 32:
                reasons[path] = f"{out_features} x {in_features}: not multiples of 32"
        else:
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                if parameter.dim() > 2:
                    reasons[name] = f"a parameter of {parameter.dim()} dimensions, not a linear"
    return reasons


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """All linears of a model's blocks by path, quantized or not, with their adapters if any."""
    layout = find_blocks(model)
    kinds = (QuantLinear, LoraLinear, nn.Linear, Conv1D)
    found: dict[str, nn.Module] = {}
    for path, module in layout.modules.named_modules(prefix=layout.prefix):
        if isinstance(module, kinds) and path.rpartition(".")[0] not in found:
            found[path] = module
    return found


def linear_features(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of any of the block's linears."""
    if isinstance(linear, LoraLinear):
        linear = linear.base
    if isinstance(linear, QuantLinear):
        return linear.in_features, linear.out_features
    return linear_shape(linear)


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """All QuantLinear of a model by path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)
    }


def adapted_linears(model: nn.Module) -> dict[str, LoraLinear]:
    """All linears with adapters, by path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)
    }


def adapter_stacks(model: PreTrainedModel) -> dict[str, list[LowRank]]:
    """All adapters of each linear."""
    return {
        path: list(linear.adapters)  # type: ignore[arg-type]
        for path, linear in adapted_linears(model).items()
    }


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The bare linears stand in their places for as long as this lasts."""
    linears = adapted_linears(model)
    for path, linear in linears.items():
        set_module(model, path, linear.base)
    try:
        yield
    finally:
        for path, linear in linears.items():
            set_module(model, path, linear)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode for as long as this lasts: nothing is dropped."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # what has come in the meantime, too
        for module, training in modes.items():
            module.training = training


def plain_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict but for packed linears', which would unpack them, all at once."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantLinear):
            module._save_to_state_dict(found, f"{path}." if path else "", keep_vars=True)
    return found


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces the submodule at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)

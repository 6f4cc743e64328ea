"""Low-rank adapters on a model's linears, which stay packed: all that EMEF and LREC train.

Adapters stack: one that corrects a model (LREC) stays frozen under one that teaches it something
(EMEF), INT2.1 (2306.08162) appendix D.2.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbitcore.blocks import (
    adapted_linears,
    block_linears,
    linear_features,
    quantized_linears,
    set_module,
)
from lowbitcore.checks import check_kind
from lowbitcore.nn import LoraLinear, LowRank
from lowbitcore.provenance import digests_on


def prepare_lora(
    model: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] | None = ("q_proj", "v_proj"),
    dropout: float = 0.0,
) -> PreTrainedModel:
    """Freezes the model and puts a new trainable adapter on its linears; returns the model.

    `targets` are the last parts of paths, or whole paths, of linears in the model's blocks; None
    takes them all, as LREC does. Adapters that are there already stay, frozen, under the new one.
    Raises ValueError where no linear is called like one of the targets.
    """
    check_kind("prepare_lora: model", model, PreTrainedModel)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"prepare_lora: rank: expected a positive integer, got {rank!r}")
    if not (isinstance(alpha, int | float) and alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"prepare_lora: alpha: expected a positive number, got {alpha!r}")
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ValueError(f"prepare_lora: dropout: expected 0 or more and below 1, got {dropout!r}")
    linears = block_linears(model)
    chosen = select(linears, targets, where="prepare_lora: targets")
    check_rank("prepare_lora: rank", rank, [linear_features(linears[path]) for path in chosen])
    model.requires_grad_(False)
    order = next_order(model)
    for path in chosen:
        adapter = add_adapter(model, path, rank=rank, scaling=alpha / rank, dropout=dropout)
        adapter.order = order
    return model


def check_rank(where: str, rank: int, shapes: Sequence[tuple[int, int]]) -> None:
    """ValueError where no linear of these shapes has that rank."""
    largest = max(map(min, shapes), default=rank)
    if rank > largest:
        raise ValueError(
            f"{where}: expected at most {largest}, the full rank of these linears, got {rank}"
        )


def select(
    linears: dict[str, nn.Module], targets: Sequence[str] | None, *, where: str
) -> list[str]:
    """The paths whose last part, or which themselves, are among `targets`."""
    if targets is None:
        return list(linears)
    if (
        isinstance(targets, str)
        or not isinstance(targets, Collection)
        or not targets
        or not all(isinstance(name, str) for name in targets)
    ):
        raise ValueError(f"{where}: expected a list of names, got {targets!r}")
    chosen = {path: {path, path.rpartition(".")[2]} & set(targets) for path in linears}
    missing = set(targets) - set().union(*chosen.values())
    if missing:
        names = sorted({path.rpartition(".")[2] for path in linears})
        raise ValueError(
            f"{where}: expected names of linears ({', '.join(names)}), got {sorted(missing)[0]!r}"
        )
    return [path for path, hits in chosen.items() if hits]


def add_adapter(
    model: nn.Module, path: str, *, rank: int, scaling: float, dropout: float = 0.0
) -> LowRank:
    """Stacks an adapter onto the linear at `path`."""
    module = model.get_submodule(path)
    if not isinstance(module, LoraLinear):
        module = LoraLinear(module).train(module.training)
        set_module(model, path, module)
    in_features, out_features = linear_features(module)
    with next(module.base.parameters()).device:
        adapter = LowRank(in_features, out_features, rank=rank, scaling=scaling, dropout=dropout)
    module.adapters.append(adapter.train(module.training))
    return adapter


def _tops(model: nn.Module) -> dict[str, LowRank]:
    return {
        path: linear.adapters[-1]  # type: ignore[misc]
        for path, linear in adapted_linears(model).items()
    }


def next_order(model: nn.Module) -> int:
    """That of an adapter which is about to come."""
    return 1 + max((top.order for top in _tops(model).values()), default=-1)


def newest_adapters(model: nn.Module) -> dict[str, LowRank]:
    """The adapters that train or, if none does, those that came last, by path of their linear."""
    tops = _tops(model)
    training = {path: top for path, top in tops.items() if top.a.requires_grad}
    last = next_order(model) - 1
    return training or {path: top for path, top in tops.items() if top.order == last}


def fold_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Makes one adapter of rank r1 + r2 + ... out of those stacked on each linear, frozen.

    A = [A1; A2], B = [s1 B1, s2 B2] with scaling 1: the same products, summed in another order.
    """
    check_kind("fold_adapters: model", model, PreTrainedModel)
    parts: frozenset[str] = frozenset()
    for digests, starts in digests_on(model):
        parts |= digests | starts
    for linear in adapted_linears(model).values():
        stacked: list[LowRank] = list(linear.adapters)  # type: ignore[arg-type]
        in_features, out_features = linear_features(linear)
        rank = sum(adapter.rank for adapter in stacked)
        folded = LowRank(in_features, out_features, rank=rank, scaling=1.0, dropout=0.0)
        folded.a = nn.Parameter(torch.cat([x.a.detach() for x in stacked]), requires_grad=False)
        folded.b = nn.Parameter(
            torch.cat([x.scaling * x.b.detach() for x in stacked], dim=1), requires_grad=False
        )
        folded.with_scales = any(adapter.with_scales for adapter in stacked)
        folded.parts = parts
        linear.adapters = nn.ModuleList([folded.train(linear.training)])
    if any(adapter.with_scales for adapter in _tops(model).values()):
        for packed in quantized_linears(model).values():
            packed.scales.requires_grad_(False)
    return model

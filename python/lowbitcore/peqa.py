"""PEQA (2305.14152): the packed integers are frozen, their scales are what trains."""

from __future__ import annotations

from transformers import PreTrainedModel

from lowbitcore.blocks import quantized_linears
from lowbitcore.checks import check_kind
from lowbitcore.lora import newest_adapters
from lowbitcore.nn import QuantLinear
from lowbitcore.provenance import note_scales


def prepare_peqa(model: PreTrainedModel) -> PreTrainedModel:
    """Freezes everything but the scales of all packed linears, float32 [G, N]; returns the model.

    Equation 2 of the paper: W = (s0 + ds) * (q - z), ds learned. Raises ValueError where nothing is
    packed.
    """
    check_kind("prepare_peqa: model", model, PreTrainedModel)
    packed = _linears_of(model, "prepare_peqa")
    model.requires_grad_(False)
    _thaw(model, packed)
    return model


def thaw_scales(model: PreTrainedModel) -> PreTrainedModel:
    """Lets the scales of all packed linears train beside what trains already, such as an adapter;
    returns the model. In files they take no more bytes; while they train, they have gradients and
    an optimizer's state. An adapter that trains with them is from now on saved with them. Raises
    ValueError where nothing is packed.
    """
    check_kind("thaw_scales: model", model, PreTrainedModel)
    packed = _linears_of(model, "thaw_scales")
    for adapter in newest_adapters(model).values():
        adapter.with_scales |= adapter.a.requires_grad
    _thaw(model, packed)
    return model


def _linears_of(model: PreTrainedModel, where: str) -> list[QuantLinear]:
    linears = quantized_linears(model)
    if not linears:
        raise ValueError(f"{where}: model: expected a quantized one, got no packed linear")
    return list(linears.values())


def _thaw(model: PreTrainedModel, linears: list[QuantLinear]) -> None:
    note_scales(model)
    for linear in linears:
        linear.scales.requires_grad_(True)

"""PEQA (2305.14152): the packed integers are frozen, their scales are what trains."""

from __future__ import annotations

from transformers import PreTrainedModel

from lowbitcore.model import check_kind, quantized_linears


def prepare_peqa(model: PreTrainedModel) -> PreTrainedModel:
    """Freezes everything but the scales of all packed linears, float32 [G, N]; returns the model.

    Equation 2 of the paper: W = (s0 + ds) * (q - z), ds learned. Raises ValueError where nothing is
    packed.
    """
    check_kind("prepare_peqa: model", model, PreTrainedModel)
    linears = quantized_linears(model)
    if not linears:
        raise ValueError("prepare_peqa: model: expected a quantized one, got no packed linear")
    model.requires_grad_(False)
    for linear in linears.values():
        linear.scales.requires_grad_(True)
    return model

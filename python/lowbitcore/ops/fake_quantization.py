"""Fake quantization with a straight-through estimator: dense weights that train, rounded to what
their bits hold."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import as_rows, check, check_activations, fail
from lowbitcore.ops.operators import define, fake


def add_fake_quantized_(
    out: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, *, bits: int
) -> None:
    """``out += scales * (q - zeros)`` in place, q being the latent values, rounded and clamped to
    what ``bits`` hold: ``out`` [..., C] (float32, bfloat16, float16), ``latent`` float32 [..., C],
    in steps of the grid, ``scales`` and ``zeros`` float32 [..., 1]; C a multiple of 32."""
    op = "add_fake_quantized"
    check(op, bits, out=out, latent=latent, scales=scales, zeros=zeros)
    torch.ops.lowbitcore.add_fake_quantized_(
        out, latent.detach(), scales.detach(), zeros.detach(), bits
    )


def fake_quantized_grads(
    dw: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, *, bits: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``latent`` and ``scales``, float32 and of their shapes, from that of the sum in
    :func:`add_fake_quantized_`, as if nothing were rounded or clamped."""
    op = "fake_quantized_grads"
    check(op, bits, dw=dw, latent=latent, scales=scales, zeros=zeros)
    d_latent, d_scales = torch.ops.lowbitcore.fake_quantized_grads(
        dw.detach(), latent.detach(), scales.detach(), zeros.detach(), bits
    )
    return d_latent, d_scales


# On CUDA both are torch's. The core's rules for their arguments are these:


def _check_latent(op: str, like: str, latent: Tensor, **others: Tensor) -> None:
    for name, tensor in ({"latent": latent} | others).items():
        if name != like and tensor.dtype != torch.float32:
            fail(op, name, "float32", tensor.dtype)
    if latent.dim() == 0 or latent.shape[-1] == 0 or latent.shape[-1] % 32:
        fail(op, "latent", "a positive multiple of 32 columns", list(latent.shape))
    for name, tensor in others.items():
        shape = [*latent.shape[:-1], latent.shape[-1] if name == like else 1]
        if list(tensor.shape) != shape:
            fail(op, name, f"shape {shape}", list(tensor.shape))
    check_activations(op, like, others[like])


def _add_with_torch(out: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    _check_latent("add_fake_quantized", "out", latent, out=out, scales=scales, zeros=zeros)
    out.add_(_latent_steps(latent, zeros, bits).mul_(scales))


def _grads_with_torch(
    dw: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    _check_latent("fake_quantized_grads", "dw", latent, dw=dw, scales=scales, zeros=zeros)
    steps = _latent_steps(latent, zeros, bits)
    return dw * scales, steps.mul_(dw).sum(-1, keepdim=True)


def _latent_steps(latent: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return latent.round().clamp_(0, 2**bits - 1).sub_(zeros)


@define(
    "add_fake_quantized_(Tensor(a!) out, Tensor latent, Tensor scales, Tensor zeros, int bits)"
    " -> ()",
    cuda=_add_with_torch,
)
def _(out: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    _C.add_fake_quantized(out, as_rows(latent), as_rows(scales), as_rows(zeros), bits)


@fake("add_fake_quantized_")
def _(out: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    return None


@define(
    "fake_quantized_grads(Tensor dw, Tensor latent, Tensor scales, Tensor zeros, int bits)"
    " -> (Tensor, Tensor)",
    cuda=_grads_with_torch,
)
def _(
    dw: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    d_latent, d_scales = _latent_grads_like(dw, latent, scales, zeros, bits)
    _C.fake_quantized_grads(
        as_rows(dw), as_rows(latent), as_rows(scales), as_rows(zeros), bits, d_latent, d_scales
    )
    return d_latent, d_scales


@fake("fake_quantized_grads")
def _latent_grads_like(
    dw: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    return latent.new_empty(latent.shape), scales.new_empty(scales.shape)

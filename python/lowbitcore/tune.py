"""Training what a block was quantized to: integers, scales and corrections together, until the
block puts out what its 16-bit twin does (Chen et al., EfficientQAT, arXiv 2407.11062, section 3.2,
"Block-AP"; here from GPTQ's integers, and with corrections beside them).

The integers are rounded from latent values, to which gradients go straight through the rounding.
This is the one place where dense weights train: one block's at a time, and what remains is packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbitcore import ops
from lowbitcore.formats import peft
from lowbitcore.formats.peft import LowRankTensors
from lowbitcore.nn import QuantLinear

# Adam's, at their highest: latent values count in steps of the grid, scales in their logarithm.
_LATENT_RATE, _SCALE_RATE, _CORRECTION_RATE = 5e-3, 5e-3, 3e-3
# Gradients of latent values are small (SmolLM2-135M at 4 bits: 1e-8), and those of large models
# smaller: torch's own eps would hold them back.
_WARMUP_STEPS, _BETAS, _EPS = 8, (0.9, 0.95), 1e-15
# A latent value starts no nearer than this to where it rounds to another integer.
_MARGIN = 0.05


class Trained(NamedTuple):
    """`codes` uint8 [N, K], `scales` float32 [G, N] (fp16 values); `zeros` uint8 [G, N] and `g_idx`
    int32 [K], which do not train."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    correction: LowRankTensors | None


class _Quantize(torch.autograd.Function):
    """base + scales (round(latent) - zeros), in the place of the base, with gradients as if nothing
    were rounded or cut off."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        latent: Tensor,
        scale_logs: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bits: int,
    ) -> Tensor:
        scales = scales * scale_logs.exp()
        ctx.save_for_backward(latent, scales, zeros)
        ctx.bits = bits
        ops.add_fake_quantized_(base.view_as(latent), latent, scales, zeros, bits=bits)
        ctx.mark_dirty(base)
        return base

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        latent, scales, zeros = ctx.saved_tensors
        dw = grads[0].reshape(latent.shape)
        d_latent, d_scales = ops.fake_quantized_grads(dw, latent, scales, zeros, bits=ctx.bits)
        return grads[0], d_latent, d_scales * scales, None, None, None


class FakeQuantized(nn.Module):
    """A linear's quantized weight as a function of what trains: `forward()` is [N, K].

    `weight` [N, K] is the 16-bit one, in the dtype to compute in: within the cell of its integer
    each latent value starts where the weight less the correction lies.
    """

    def __init__(
        self, linear: QuantLinear, correction: LowRankTensors | None, weight: Tensor
    ) -> None:
        super().__init__()
        stored = linear.canonical()
        codes = ops.unpack_qweight(stored["qweight"], bits=linear.bits)
        groups = len(stored["scales"])
        self._bits, self._dtype = linear.bits, weight.dtype
        # Groups lie side by side, each as wide as the widest.
        self._g_idx = stored["g_idx"]
        index, columns = self._g_idx.long().sort(stable=True)
        counts = torch.bincount(index, minlength=groups)
        width = int(counts.max())
        places = torch.arange(len(index), device=index.device)
        slots = torch.empty_like(index)
        slots[columns] = index * width + places - (counts.cumsum(0) - counts)[index]
        plain = groups * width == len(places) and torch.equal(slots, places)
        self._slots = None if plain else slots
        self._shape = (len(codes), groups, width)

        self._scales = stored["scales"].float().T.contiguous()[:, :, None]
        zeros = ops.unpack_qzeros(stored["qzeros"], bits=linear.bits)
        self._zeros = zeros.float().T.contiguous()[:, :, None]
        self.scale_logs = nn.Parameter(torch.zeros_like(self._scales))
        self.a: nn.Parameter | None = None
        target = weight.float()
        if correction is not None:
            target = target - peft.product(correction)
            a, b, self._scaling = peft.settled(correction)
            self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        nearest = self._grouped(codes.float())
        steps = self._grouped(target) / self._scales + self._zeros
        room = 0.5 - _MARGIN
        # Where a scale is 0 there is no place in the cell: NaN and Inf.
        inside = torch.where(self._scales > 0, steps, nearest)
        self.latent = nn.Parameter(inside.clamp(nearest - room, nearest + room))

    def _padded(self, matrix: Tensor) -> Tensor:
        if self._slots is None:
            return matrix
        n, groups, width = self._shape
        padded = matrix.new_zeros(n, groups * width)
        padded[:, self._slots] = matrix
        return padded

    def _grouped(self, matrix: Tensor) -> Tensor:
        return self._padded(matrix).reshape(self._shape)

    def _flat(self, grouped: Tensor) -> Tensor:
        flat = grouped.flatten(1)
        return flat if self._slots is None else flat.index_select(1, self._slots)

    def forward(self) -> Tensor:
        dtype = self._dtype
        if self.a is None:
            base = self.latent.new_zeros(len(self.latent), len(self._g_idx), dtype=dtype)
        else:
            # In float32 this product and those of its gradient would take twice as long.
            base = (self.b * self._scaling).to(dtype) @ self.a.to(dtype)
        weight: Tensor = _Quantize.apply(
            self._padded(base), self.latent, self.scale_logs, self._scales, self._zeros, self._bits
        )
        return self._flat(weight)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Latent values beyond the ends of the grid would take long to come back."""
        self.latent.clamp_(-0.5, 2**self._bits - 0.5)

    @torch.no_grad()
    def trained(self) -> Trained:
        scales = (self._scales * self.scale_logs.exp())[:, :, 0].T
        correction = None
        if self.a is not None:
            correction = LowRankTensors(self.a.detach(), self.b.detach(), self._scaling)
        codes = self.latent.round().clamp(0, 2**self._bits - 1)
        return Trained(
            self._flat(codes).to(torch.uint8).contiguous(),
            scales.half().float().contiguous(),
            self._zeros[:, :, 0].T.to(torch.uint8).contiguous(),
            self._g_idx,
            correction,
        )


def train_block(
    linears: Mapping[str, FakeQuantized],
    run: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    *,
    epochs: int,
    seed: int,
) -> bool:
    """Trains the linears of one block so that it makes of `inputs` what is `wanted`; whether that
    stayed finite.

    `run` puts windows [n, length, features] through the block with the weights [N, K] it is given;
    inputs and what is wanted come in batches of windows. One window is a step, whose loss is
    `block_error`; it takes some 30 steps until the first integers change.
    """
    windows = [(batch, row) for batch, item in enumerate(inputs) for row in range(len(item))]
    generator = torch.Generator().manual_seed(seed)
    order = [i for _ in range(epochs) for i in torch.randperm(len(windows), generator=generator)]
    items = linears.values()
    corrections = [part for item in items if item.a is not None for part in (item.a, item.b)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [item.latent for item in items], "lr": _LATENT_RATE},
            {"params": [item.scale_logs for item in items], "lr": _SCALE_RATE},
            {"params": corrections, "lr": _CORRECTION_RATE},
        ],
        betas=_BETAS,
        eps=_EPS,
        weight_decay=0.0,
        fused=True,
    )
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / _WARMUP_STEPS) * (1 + math.cos(math.pi * step / len(order))) / 2
        ),
    )
    for index in order:
        batch, row = windows[index]
        with torch.enable_grad():
            output = run(
                inputs[batch][row : row + 1], {path: item() for path, item in linears.items()}
            )
            loss = block_error(output, wanted[batch][row : row + 1])
            if not torch.isfinite(loss):
                return False
            gradients = torch.autograd.grad(
                loss, parameters, allow_unused=True, materialize_grads=True
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()  # gradients need not live on through the next forward
        for linear in items:
            linear.keep_in_range()
        schedule.step()
    return all(bool(torch.isfinite(item).all()) for item in parameters)


def block_error(output: Tensor, wanted: Tensor) -> Tensor:
    """The mean of a block's squared error over tokens, relative to what is wanted of each, and of
    its squared error in all relative to what is wanted in all."""
    wanted = wanted.float()
    error = (output.float() - wanted).square().sum(-1)
    energy = wanted.square().sum(-1)
    # Some tokens hold next to nothing, others, such as a window's first, thousands of times more.
    # By the token, all others outweigh these few, which a block may then lose, and with them what
    # the attention of later blocks rests on; by the whole, these few outweigh all others.
    floor = 0.1 * energy.median() + torch.finfo(torch.float32).tiny
    whole = error.sum() / (energy.sum() + torch.finfo(torch.float32).tiny)
    return ((error / energy.clamp(min=floor)).mean() + whole) / 2

"""What all operations ask of tensors, and how the core takes them and gives results."""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def check(op: str, bits: object = 4, group_size: object = -1, **tensors: Tensor | None) -> None:
    """What must hold before torch picks a kernel: integers that are such, and tensors, all on one
    device that has kernels. Only ``g_idx``, ``bias`` and ``teacher`` may be missing."""
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        fail(op, "bits", "2, 3, 4 or 8", repr(bits))
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        fail(op, "group_size", "-1 or a positive multiple of 32", repr(group_size))
    device = None
    for name, tensor in tensors.items():
        if tensor is None and name in ("g_idx", "bias", "teacher"):
            continue
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            fail(op, name, "a dense tensor", getattr(tensor, "layout", type(tensor).__name__))
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            fail(op, name, "no tangent: there is no forward-mode derivative", "one with a tangent")
        here = tensor.device
        if device is None:
            if here.type not in ("cpu", "cuda", "meta"):
                fail(op, name, "a tensor on the CPU or on CUDA", here)
            device = here
        elif here != device:
            fail(op, name, f"a tensor on {device}, as the other arguments", here)


def check_dims(op: str, name: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        fail(op, name, f"{dims} dimensions", tuple(tensor.shape))


def check_activations(op: str, name: str, tensor: Tensor) -> None:
    """The core's rule for their type, where torch computes in its place."""
    if tensor.dtype not in ACTIVATIONS:
        fail(op, name, "float32, bfloat16 or float16", tensor.dtype)


def is_transformed() -> bool:
    """Whether torch compiles, traces or transforms (``torch.func``) what is computed, or
    differentiates it forward."""
    return bool(
        torch.compiler.is_compiling()  # first: it cannot look into the others
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )


def serves(*tensors: Tensor) -> bool:
    """Whether what is not packed can be left to the core (dense weights, what lies between
    products, losses): on the CPU, of a type and a width [..., D] that it takes, and not
    transformed by torch."""
    return not is_transformed() and all(
        x.is_cpu and x.dtype in ACTIVATIONS and x.shape[-1] % 32 == 0 for x in tensors
    )


def in_memory(tensor: Tensor) -> bool:
    """Whether it is dense data in the CPU's memory, not one of the stand-ins that torch traces
    with."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor._is_zerotensor()  # as autograd makes them of gradients known to be zeros
    )


def as_rows(tensor: Tensor) -> Tensor:
    """[..., C] as the core takes it: columns contiguous, rows not overlapping and a step apart."""
    if tensor.is_contiguous() and not tensor.is_neg() and tensor.numel():
        return tensor
    flat = (
        tensor.resolve_neg().reshape(-1, tensor.shape[-1])
        if tensor.numel()
        else tensor.new_empty(tensor.shape[:-1].numel(), tensor.shape[-1])
    )
    if flat.stride(1) != 1 or flat.stride(0) < flat.shape[1]:
        flat = flat.contiguous()
    return flat


def as_heads(tensor: Tensor) -> Tensor:
    """[B, H, T, D] as the core takes it: columns contiguous."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.resolve_neg().contiguous()


# From here on results have memory of their own; smaller ones are quicker to get from torch.
_OWN_BYTES = 1 << 16


def empty(like: Tensor, *shape: int) -> Tensor:
    """A new result of the type of `like`, on its device; a stand-in of a stand-in.

    torch asks the C library for aligned memory. glibc before 2.38 serves no such request from what
    an equal one has freed, and a training's heap then grows to several times what is in use; from
    memory without a demand it does.
    """
    count = math.prod(shape) * like.element_size() if in_memory(like) else 0
    if count < _OWN_BYTES:
        return like.new_empty(shape)
    alignment = 64
    memory = torch.from_numpy(np.empty(count + alignment, np.uint8))
    start = -memory.data_ptr() % alignment
    result = memory[start : start + count].view(like.dtype).view(shape)
    if torch.are_deterministic_algorithms_enabled() and getattr(
        torch.utils.deterministic, "fill_uninitialized_memory", False
    ):
        result.fill_(math.nan)  # as torch fills its own
    return result


def empty_like(tensor: Tensor) -> Tensor:
    return empty(tensor, *tensor.shape)


def result_rows(result: Tensor) -> Tensor:
    """A new result as the core takes it, which may be empty."""
    if result.numel():
        return result
    return result.new_empty(result.shape[:-1].numel(), result.shape[-1])


def heads_like(tensor: Tensor) -> Tensor:
    """Where projections want heads: those of a row together."""
    b, h, t, d = tensor.shape
    return empty(tensor, b, t, h, d).transpose(1, 2)

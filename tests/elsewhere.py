"""A device that no machine lacks: tensors that refuse to meet those of the CPU.

What works here makes every tensor where its operands are, as a GPU demands; with values, which the
meta device does not have. Such a tensor calls itself `meta`, the one device without hardware that
torch lets Python stand for, and computes on a tensor of the CPU inside it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_META = torch.device("meta")
# They copy from one device to another.
_BRIDGES = ("aten::copy_", "aten::_to_copy")


class Elsewhere(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_META,
        )
        made.inner = inner
        return cast(Elsewhere, made)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()


class Elsewheres(TorchDispatchMode):
    """While this lasts, what is made on the meta device is made here instead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    ours = [item for item in tensors if isinstance(item, Elsewhere)]
    # A GPU takes single numbers of the CPU, too.
    others = [item for item in tensors if not isinstance(item, Elsewhere) and item.dim()]
    if ours and others and func._schema.name not in _BRIDGES:
        shapes = ", ".join(f"{type(item).__name__} {list(item.shape)}" for item in tensors)
        raise RuntimeError(f"{func}: expected tensors of one device, got {shapes}")
    here = bool(ours)
    if func._schema.name == "aten::copy_":
        here = isinstance(args[0], Elsewhere)
    if kwargs.get("device") is not None:
        here = torch.device(kwargs["device"]).type == "meta"
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def enter(item: Any) -> Any:
        return item.inner if isinstance(item, Elsewhere) else item

    wrapped = {id(item.inner): item for item in ours}  # what an operation in place gives back

    def leave(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return wrapped[id(item)] if id(item) in wrapped else Elsewhere(item)

    out = func(*tree_map(enter, args), **tree_map(enter, kwargs))
    return tree_map(leave, out) if here else out


def moved(model: nn.Module) -> nn.Module:
    """The model with all of its tensors elsewhere."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = Elsewhere(parameter.detach())
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, value in [*module._buffers.items(), *vars(module).items()]:
            if isinstance(value, torch.Tensor):
                place = module._buffers if name in module._buffers else module.__dict__
                place[name] = Elsewhere(value)
    getattr(model, "tie_weights", lambda: None)()
    return model

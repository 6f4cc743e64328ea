"""How an operation becomes an operator of torch: its kernels, its fake kernel, its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbitcore._C import Error
from lowbitcore.ops.arguments import check, in_memory, is_transformed

_library = torch.library.Library("lowbitcore", "DEF")
_F = TypeVar("_F", bound=Callable[..., Any])


def define(schema: str, *, cuda: Callable[..., Any] | None = None) -> Callable[[_F], _F]:
    """Define ``lowbitcore::schema`` with the decorated function as its kernel on the CPU and, where
    ``cuda`` names no other, on CUDA."""

    def register(kernel: _F) -> _F:
        name = schema[: schema.index("(")]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, kernel, "CPU")
        _library.impl(name, _on_its_device(cuda or kernel), "CUDA")
        return kernel

    return register


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device):
            try:
                return kernel(first, *rest)
            except Error as error:
                # The core has scratch from the driver, before it does anything: it may need what
                # torch keeps of freed memory.
                if "out of memory" not in str(error) or torch.cuda.is_current_stream_capturing():
                    raise
                torch.cuda.empty_cache()
                return kernel(first, *rest)

    return run


def define_on_host(schema: str) -> Callable[[_F], _F]:
    """An operator that only the CPU has: on CUDA it works on copies there, and brings back what it
    returns."""

    def register(kernel: _F) -> _F:
        def on_copies(first: Tensor, *rest: Any) -> Any:
            result = kernel(first.cpu(), *rest)
            if isinstance(result, Tensor):
                return result.to(first.device)
            return tuple(item.to(first.device) for item in result)

        return define(schema, cuda=on_copies)(kernel)

    return register


def fake(name: str) -> Callable[[_F], _F]:
    def register(function: _F) -> _F:
        torch.library.register_fake(f"lowbitcore::{name}", function, lib=_library)
        return function

    return register


def differentiate(name: str, setup: Callable[..., Any], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(
        f"lowbitcore::{name}", backward, setup_context=setup, lib=_library
    )


def differentiate_once(name: str, setup: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """For a gradient that comes from the operator ``{name}_backward``, which has none itself: of
    such ones torch makes zeros, and warns."""

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"lowbitcore::{name} can be differentiated once, not twice")

    differentiate(name, setup, backward)
    differentiate(f"{name}_backward", lambda ctx, inputs, output: None, refuse)


def stream(tensor: Tensor) -> int:
    """The stream that work on a tensor goes to; the core takes it as an integer."""
    return 0 if tensor.device.type == "cpu" else torch.cuda.current_stream().cuda_stream


# Under autograd.grad's is_grads_batched tensors of torch's older vmap look like any others. By its
# number: to look up the name takes longer than all else that is_plain asks for.
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are data in the CPU's memory that nobody watches: torch does not
    differentiate, trace, transform or record what is done with them. Its dispatcher, which takes
    longer than a small product, then has nothing to add."""
    return not (
        is_transformed()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
        or torch._C._autograd._profiler_enabled()
    ) and all(map(in_memory, tensors))


def kernel_or_operator(
    name: str, kernel: Callable[..., Any], **tensors: Tensor
) -> Callable[..., Any]:
    """The operator of this name, of tensors that pass `check`; of plain ones, which would, the
    kernel it ends up in."""
    if is_plain(*tensors.values()):
        return kernel
    check(name, **tensors)
    operator: Callable[..., Any] = getattr(torch.ops.lowbitcore, name)
    return operator

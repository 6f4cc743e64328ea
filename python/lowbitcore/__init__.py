"""Fine-tuning and repairing of low-bit large language models while they stay packed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first, so that the extension shares its OpenMP threads)

from . import ops, runtime
from ._C import Error, version
from .nn import QuantLinear

if TYPE_CHECKING:
    from .evaluate import perplexity
    from .model import load, save
    from .quantize import QuantConfig, quantize_model
    from .streaming import quantize_checkpoint

__version__ = version()
__all__ = [
    "Error",
    "QuantConfig",
    "QuantLinear",
    "load",
    "ops",
    "perplexity",
    "quantize_checkpoint",
    "quantize_model",
    "runtime",
    "save",
]

# Whatever needs transformers is imported when it is first used: the kernels should not wait for it.
_LAZY = {
    "QuantConfig": "quantize",
    "load": "model",
    "perplexity": "evaluate",
    "quantize_checkpoint": "streaming",
    "quantize_model": "quantize",
    "save": "model",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

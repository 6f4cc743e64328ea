"""Fine-tuning and repairing of low-bit large language models while they stay packed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first, so that the extension shares its OpenMP threads)

from . import ops, runtime
from ._C import Error, version
from .nn import QuantLinear

if TYPE_CHECKING:
    from .adapters import load_adapter, save_adapter, swap_scales
    from .blockwise import BlockwiseModel
    from .data import TrainingSet
    from .evaluate import perplexity
    from .lora import fold_adapters, prepare_lora
    from .lrec import LrecTrainer, TeacherCache
    from .model import load, save
    from .peqa import prepare_peqa, thaw_scales
    from .quantize import QuantConfig, quantize_model
    from .streaming import quantize_checkpoint
    from .training import EmefTrainer, PeqaTrainer

__version__ = version()
__all__ = [
    "BlockwiseModel",
    "EmefTrainer",
    "Error",
    "LrecTrainer",
    "PeqaTrainer",
    "QuantConfig",
    "QuantLinear",
    "TeacherCache",
    "TrainingSet",
    "fold_adapters",
    "load",
    "load_adapter",
    "ops",
    "perplexity",
    "prepare_lora",
    "prepare_peqa",
    "quantize_checkpoint",
    "quantize_model",
    "runtime",
    "save",
    "save_adapter",
    "swap_scales",
    "thaw_scales",
]

# Whatever needs transformers is imported when it is first used: the kernels should not wait for it.
_LAZY = {
    "BlockwiseModel": "blockwise",
    "EmefTrainer": "training",
    "LrecTrainer": "lrec",
    "PeqaTrainer": "training",
    "QuantConfig": "quantize",
    "TeacherCache": "lrec",
    "TrainingSet": "data",
    "fold_adapters": "lora",
    "load": "model",
    "load_adapter": "adapters",
    "perplexity": "evaluate",
    "prepare_lora": "lora",
    "prepare_peqa": "peqa",
    "quantize_checkpoint": "streaming",
    "quantize_model": "quantize",
    "save": "model",
    "save_adapter": "adapters",
    "swap_scales": "adapters",
    "thaw_scales": "peqa",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

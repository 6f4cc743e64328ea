"""Fine-tuning and repairing of low-bit large language models while they stay packed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first, so that the extension shares its OpenMP threads)

from lowbitcore import ops, runtime
from lowbitcore._C import Error, version
from lowbitcore.nn import QuantLinear

if TYPE_CHECKING:
    from lowbitcore.adapters import load_adapter, save_adapter, swap_scales
    from lowbitcore.blockwise import BlockwiseModel
    from lowbitcore.data import Example, TrainingSet, read_examples
    from lowbitcore.dequantize import save_dequantized
    from lowbitcore.evaluate import perplexity
    from lowbitcore.lora import fold_adapters, prepare_lora
    from lowbitcore.lrec import LrecTrainer, TeacherCache
    from lowbitcore.model import load, save
    from lowbitcore.peqa import prepare_peqa, thaw_scales
    from lowbitcore.quant_config import QuantConfig
    from lowbitcore.quantize import quantize_model
    from lowbitcore.streaming import quantize_checkpoint
    from lowbitcore.training import EmefTrainer, PeqaTrainer

__version__ = version()
__all__ = [
    "BlockwiseModel",
    "EmefTrainer",
    "Error",
    "Example",
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
    "read_examples",
    "runtime",
    "save",
    "save_adapter",
    "save_dequantized",
    "swap_scales",
    "thaw_scales",
]

# Whatever needs transformers is imported when it is first used: the kernels should not wait for it.
_LAZY = {
    "BlockwiseModel": "blockwise",
    "EmefTrainer": "training",
    "Example": "data",
    "LrecTrainer": "lrec",
    "PeqaTrainer": "training",
    "QuantConfig": "quant_config",
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
    "read_examples": "data",
    "save": "model",
    "save_adapter": "adapters",
    "save_dequantized": "dequantize",
    "swap_scales": "adapters",
    "thaw_scales": "peqa",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""A `.gguf` file as a lazy source of Hugging Face tensors, dequantized one at a time.

Config, tensor names and head permutations come from transformers' own GGUF support, the block
formats from the `gguf` package, so that a tensor equals what `from_pretrained(gguf_file=...)`
gives; but the model is never in memory as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.gguf_reader import ReaderTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from lowbitcore.files import file_fingerprint, one_line
from lowbitcore.formats.checkpoint import TensorInfo

_DTYPES = {
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# For the names in `gguf` that transformers looks up when it needs them.
_LOCK = RLock()


class _Reader(GGUFReader):  # type: ignore[misc]
    """Reads through plain arrays: it takes a million slices of a file, and those of a memory map
    are slow."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = np.asarray(mapped)


class GgufFile:
    """Names, shapes and tensors of a `.gguf`, under their Hugging Face names.

    `config` is the model's; `dtype` the float type of its matrices (float32 where they are
    quantized, since that is what dequantizing gives).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file")
        try:
            self._reader = _Reader(self.path)
            with self._header_shared():
                names = self._read()
        # The readers raise whatever a broken file trips them into (IndexError, KeyError, ...).
        except Exception as error:
            detail = one_line(error)
            raise ValueError(f"{self.path}: not a readable GGUF model: {detail}") from error
        self._tensors: dict[str, ReaderTensor] = {}
        for tensor in self._reader.tensors:
            # GPT-2's processor would store this one aside instead of returning it.
            name = "lm_head.weight" if tensor.name == "output.weight" else names.get(tensor.name)
            if name is not None:
                self._tensors[name] = tensor
        self.dtype = self._matrix_dtype()

    def _read(self) -> dict[str, str]:
        """What the header says, and its tensors' Hugging Face names."""
        parsed = load_gguf_checkpoint(str(self.path), return_tensors=False)
        self.config: PretrainedConfig = AutoConfig.from_pretrained(
            self.path.parent, gguf_file=self.path.name
        )
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(self.config)
        architecture = bytes(self._reader.fields["general.architecture"].parts[-1]).decode()
        processor_class = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = processor_class(config=parsed["config"])
        return get_gguf_hf_weights_map(skeleton, self._processor)

    @contextmanager
    def _header_shared(self) -> Iterator[None]:
        """Within it, transformers gets this file's header from here, and each architecture's table
        of names once: it would read the one at every question, and make the other for every module.
        """
        with _LOCK:
            reader, names = gguf.GGUFReader, gguf.get_tensor_name_map

            def header(path: str | os.PathLike[str], *args: Any) -> GGUFReader:
                ours = os.path.samefile(path, self.path)
                return self._reader if ours else reader(path, *args)

            gguf.GGUFReader, gguf.get_tensor_name_map = header, cache(names)
            try:
                yield
            finally:
                gguf.GGUFReader, gguf.get_tensor_name_map = reader, names

    def tokenizer(self) -> Any:
        with self._header_shared():
            return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)

    def _matrix_dtype(self) -> torch.dtype:
        types = {tensor.tensor_type for tensor in self._tensors.values() if len(tensor.shape) > 1}
        if len(types) == 1:
            return _DTYPES.get(types.pop(), torch.float32)
        return torch.float32

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._find(name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return TensorInfo(name, self.path, torch.float32, shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Dequantizes one tensor to float32 in memory of its own."""
        tensor = self._find(name)
        weights = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name != "output.weight":
            weights = self._processor.process(weights=weights, name=tensor.name).weights
        return torch.from_numpy(np.copy(weights))

    def _find(self, name: str) -> ReaderTensor:
        if name not in self._tensors:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        return self._tensors[name]

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)

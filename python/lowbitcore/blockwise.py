"""A model on disk, of which what surrounds the blocks and one block at a time are in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowbitcore.blocks import find_blocks, plain_tensors
from lowbitcore.calibration import PausedForward
from lowbitcore.heap import return_freed_memory
from lowbitcore.model import chosen_dtype
from lowbitcore.runtime import resolve_device
from lowbitcore.skeleton import (
    build_skeleton,
    check_names,
    fill,
    find_name,
    kept_dtype,
    tied_names,
)
from lowbitcore.source import Source, open_source


class BlockwiseModel:
    """A 16-bit model with room in memory for one of its blocks.

    `model` is its skeleton, whose parameters are on the meta device until they are loaded, and
    again when they are dropped.
    """

    def __init__(self, source: Source, *, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.model = build_skeleton(source.config, dtype, source.weights)
        # Its buffers; parameters have no values yet.
        self.model._apply(lambda item: item if item.is_meta else item.to(device))
        self.layout = find_blocks(self.model)
        self.names = list(plain_tensors(self.model))
        check_names(self.model, source)

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "cpu",
    ) -> BlockwiseModel:
        """Opens what `load` does, but for quantized models; loads nothing yet.

        Raises ValueError where that is no causal language model in 16 (or 32) bits.
        """
        device = resolve_device(device)
        source = open_source(path)
        if source.gptq is not None:
            raise ValueError(
                f"BlockwiseModel: {path}: expected a 16-bit model, got a quantized one"
            )
        return BlockwiseModel(source, dtype=chosen_dtype(dtype, source.dtype), device=device)

    @property
    def head(self) -> nn.Module:
        return cast(nn.Module, self.model.get_output_embeddings())

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    # Parts in memory

    def block_names(self, index: int) -> list[str]:
        prefix = f"{self.layout.prefix}.{index}."
        return [name for name in self.names if name.startswith(prefix)]

    def surrounding_names(self) -> list[str]:
        """What is neither in a block nor the head's, which comes after all hidden states and is as
        large as the embeddings."""
        elsewhere = (f"{self.layout.prefix}.", self._path(self.head))
        return [name for name in self.names if not name.startswith(elsewhere)]

    def load(self, names: Sequence[str], dtype: torch.dtype | None = None) -> None:
        """Gives the named tensors their values, in the model's dtype or another one, unless they
        have some already."""
        current = plain_tensors(self.model)
        if any(current[name].is_meta for name in names):
            dtype = dtype or self.dtype
            fill(self.model, self.source.weights, names, dtype=dtype, device=self.device)

    def drop(self, names: Sequence[str]) -> None:
        for name in names:
            set_module_tensor_to_device(self.model, name, "meta")
        return_freed_memory()

    def tensors(self, module: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
        """The state_dict of the model, or of one of its modules, read one at a time."""
        prefix = "" if module is None else self._path(module)
        ties, weights = tied_names(self.model), self.source.weights
        for name in (name for name in self.names if name.startswith(prefix)):
            value = weights.tensor(find_name(self.model, weights, ties.get(name, name)))
            if value.is_floating_point():
                value = value.to(kept_dtype(self.model, name, self.dtype))
            yield name.removeprefix(prefix), value

    def _path(self, module: nn.Module) -> str:
        """The start of the names of what is in a module."""
        return next(f"{path}." for path, item in self.model.named_modules() if item is module)

    # Forward

    @torch.no_grad()
    def last_hidden_states(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """The body's last hidden states [length, features] of sequences of tokens, int64 [length].

        Every block is read once. The sequences' forwards sleep before it until all have come there.
        """
        body = self.model.get_decoder()

        def runner(ids: Tensor) -> Callable[[], Tensor]:
            inputs = ids[None].to(self.device)
            return lambda: body(input_ids=inputs, use_cache=False).last_hidden_state[0]

        self.load(self.surrounding_names())
        blocks = list(self.layout.modules)
        forwards: list[PausedForward] = []
        try:
            for ids in sequences:
                forwards.append(PausedForward(runner(ids), blocks))
            for index in range(len(blocks)):
                names = self.block_names(index)
                try:
                    self.load(names)
                    for forward in forwards:
                        forward.advance(index + 1)
                finally:
                    self.drop(names)
            return [forward.finish() for forward in forwards]
        except BaseException:
            for forward in forwards:
                forward.cancel()
            raise

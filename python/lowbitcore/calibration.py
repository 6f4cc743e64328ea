"""Calibration: what the blocks of a model are called with, and how far a forward has come.

The windows are embedded once; after that, hidden states go from block to block. Inside a block a
forward stops at each group of linears, so that what it sees there can be measured, and the group
quantized, before it goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowbitcore.blocks import BlockLayout
from lowbitcore.checks import check_kind, check_length, max_length
from lowbitcore.data import calibration_windows, read_texts

# Tokens that go through a block at once: enough to keep matrix products busy, few enough for
# attention and MLP temporaries to stay small beside the hidden states.
MICRO_BATCH_TOKENS = 4096

# Windows taken from a calibration file where the caller gives only its path.
_FILE_SAMPLES, _LENGTH = 128, 2048


def default_length(config: PretrainedConfig) -> int:
    """Tokens in a window, where nobody says how many."""
    return min(_LENGTH, max_length(config) or _LENGTH)


def checked_windows(
    calibration: Any, load_tokenizer: Callable[[], Any], model_config: Any
) -> torch.Tensor:
    """Checks calibration data, or cuts it from a file; int64 [n, length]."""
    vocabulary = model_config.get_text_config().vocab_size
    if isinstance(calibration, str | os.PathLike):
        tokenizer = load_tokenizer()
        check_kind("quantize: tokenizer", tokenizer, PreTrainedTokenizerBase)
        calibration = calibration_windows(
            read_texts(calibration),
            tokenizer,
            samples=_FILE_SAMPLES,
            length=default_length(model_config),
            seed=0,
        )
    if isinstance(calibration, Sequence):
        if not calibration:
            raise ValueError("quantize: calibration: expected at least 1 window, got an empty list")
        shapes = {tuple(getattr(item, "shape", ())) for item in calibration}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(
                f"quantize: calibration: expected 1-D tensors of one length, got {sorted(shapes)}"
            )
        calibration = torch.stack(list(calibration))
    if not isinstance(calibration, torch.Tensor) or calibration.dim() != 2:
        got = getattr(calibration, "shape", type(calibration).__name__)
        raise ValueError(f"quantize: calibration: expected an int64 tensor [n, length], got {got}")
    if calibration.dtype != torch.int64:
        raise ValueError(f"quantize: calibration: expected torch.int64, got {calibration.dtype}")
    count, length = calibration.shape
    if count < 1 or length < 2:
        raise ValueError(
            "quantize: calibration: expected at least 1 window of 2 tokens, "
            f"got [{count}, {length}]"
        )
    check_length("quantize: calibration", length, model_config)
    low, high = int(calibration.min()), int(calibration.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"quantize: calibration: expected tokens 0..{vocabulary - 1}, got {low}..{high}"
        )
    return calibration.cpu()


class _Stop(Exception):
    """Ends a forward whose rest is not needed."""


class Call(NamedTuple):
    """What a block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: Callable[..., Any], hidden: torch.Tensor) -> Any:
        return block(hidden, *self.args, **self.kwargs)


class _Recorder(nn.Module):
    """Stands in for a block while the model's own forward runs, and tells `visit` of the call."""

    def __init__(self, block: nn.Module, visit: Callable[[torch.Tensor, Call], Any]) -> None:
        super().__init__()
        # Not registered as a submodule: it is only asked for attributes the model looks at.
        self.__dict__["block"] = block
        self.__dict__["visit"] = visit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.visit(args[0], Call(args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return self.visit(hidden, Call((), kwargs))


class Calibration:
    """The hidden states before the next block, and how each block wants to be called.

    `windows` are where the model is. `hidden`: a tensor [windows, length, features] for each
    micro-batch, in the compute dtype; `reference`: the same in the 16-bit model, which starts out
    from the same embeddings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: BlockLayout,
        windows: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._layout, self._dtype = model, layout, dtype
        self._memo: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        size = max(1, MICRO_BATCH_TOKENS // windows.shape[1])
        batches = windows.split(size)
        self.hidden = [self._at_first_block(batch)[0] for batch in batches]
        self.reference = list(self.hidden)
        # One window's output shows whether blocks return a tensor or a tuple.
        single = windows[:1]
        hidden, first = self._at_first_block(single)
        output = first(layout.modules[0], hidden)
        if not isinstance(output, torch.Tensor | tuple):
            raise ValueError(
                f"quantize: {layout.prefix}: expected blocks to return a tensor or a tuple, "
                f"got {type(output).__name__}"
            )
        extra = output[1:] if isinstance(output, tuple) else None
        # Masks and positions depend on the shape of a batch alone: there is no padding.
        shapes = {len(batch): batch for batch in [single, *batches]}
        self._calls = {count: self._record(batch, extra) for count, batch in shapes.items()}
        self._memo.clear()

    def call(self, index: int, windows: int) -> Call:
        return self._calls[windows][index]

    def _run(self, batch: torch.Tensor, visits: list[Callable[[torch.Tensor, Call], Any]]) -> None:
        blocks = list(self._layout.modules)
        recorders = [_Recorder(block, visit) for block, visit in zip(blocks, visits, strict=True)]
        for index, recorder in enumerate(recorders):
            self._layout.modules[index] = recorder
        try:
            self._model(input_ids=batch, use_cache=False)
        except _Stop:
            pass
        finally:
            for index, block in enumerate(blocks):
                self._layout.modules[index] = block

    def _at_first_block(self, batch: torch.Tensor) -> tuple[torch.Tensor, Call]:
        seen: list[tuple[torch.Tensor, Call]] = []

        def visit(hidden: torch.Tensor, call: Call) -> Any:
            seen.append((hidden.to(self._dtype), self._cast(call)))
            raise _Stop

        self._run(batch, [visit] * len(self._layout.modules))
        if not seen or seen[0][0].dim() != 3:
            raise ValueError(
                f"quantize: {self._layout.prefix}: the model's forward does not hand hidden states "
                "[batch, length, features] to its blocks"
            )
        return seen[0]

    def _record(self, batch: torch.Tensor, extra: tuple[Any, ...] | None) -> list[Call]:
        calls: list[Call] = []

        def visit(hidden: torch.Tensor, call: Call) -> Any:
            calls.append(self._cast(call))
            if len(calls) == len(self._layout.modules):
                raise _Stop
            return hidden if extra is None else (hidden, *extra)

        self._run(batch, [visit] * len(self._layout.modules))
        if len(calls) != len(self._layout.modules):
            raise ValueError(
                f"quantize: {self._layout.prefix}: the model's forward runs {len(calls)} of its "
                f"{len(self._layout.modules)} blocks"
            )
        return calls

    def _cast(self, call: Call) -> Call:
        def cast_value(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if not value.is_floating_point() or value.dtype == self._dtype:
                    return value
                # Blocks share their masks and tables; so do the copies. The original is kept
                # alive beside its copy, or its id could come to mean another tensor.
                _, copy = self._memo.setdefault(id(value), (value, value.to(self._dtype)))
                return copy
            if isinstance(value, tuple | list):
                return type(value)(cast_value(item) for item in value)
            if isinstance(value, dict):
                return {key: cast_value(item) for key, item in value.items()}
            return value

        return Call(cast_value(call.args), cast_value(call.kwargs))


class Forward(Protocol):
    """A micro-batch's way through a block, from group to group."""

    def advance(self, group: int) -> torch.Tensor | None:
        """Runs to the group; its input, or None where the block takes no path through it."""

    def finish(self) -> torch.Tensor:
        """Runs to the end; the block's output."""

    def cancel(self) -> None:
        """Gives up."""


class RepeatedForward:
    """Starts at the block's input each time: little memory, and much repeated work."""

    def __init__(self, run: Callable[[], torch.Tensor], heads: Sequence[nn.Module]) -> None:
        self._run, self._heads = run, heads

    def advance(self, group: int) -> torch.Tensor | None:
        seen: list[torch.Tensor] = []

        def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        handle = self._heads[group].register_forward_pre_hook(stop)
        try:
            self._run()
        except _Stop:
            pass
        finally:
            handle.remove()
        return seen[0] if seen else None

    def finish(self) -> torch.Tensor:
        return self._run()

    def cancel(self) -> None:
        pass


class PausedForward:
    """Runs once, as a coroutine that sleeps at each group until it is told to go on.

    A block's forward cannot be left and entered again, and repeating it up to each group costs
    twice the products and four times the attention of one pass. A sleeping forward keeps just what
    its rest needs. Greenlets rather than threads: a thread would bring its own OpenMP team and its
    own heap, and took 1.4 times as long.
    """

    def __init__(self, run: Callable[[], torch.Tensor], heads: Sequence[nn.Module]) -> None:
        self._groups = {id(head): i for i, head in enumerate(heads)}
        self._greenlet = greenlet(run)
        self._at, self._input = -1, cast(torch.Tensor | None, None)
        self._output: torch.Tensor | None = None
        self._handles = [head.register_forward_pre_hook(self._pause) for head in heads]

    def _pause(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if getcurrent() is not self._greenlet:
            return  # another micro-batch's forward through the same block
        self._at, self._input = self._groups[id(module)], args[0] if args else None
        cast(greenlet, self._greenlet.parent).switch()
        self._input = None

    def _step(self) -> None:
        output = self._greenlet.switch()
        if self._greenlet.dead:
            self._output = output

    def advance(self, group: int) -> torch.Tensor | None:
        while not self._greenlet.dead and self._at < group:
            self._step()
        return self._input if self._at == group and not self._greenlet.dead else None

    def finish(self) -> torch.Tensor:
        while not self._greenlet.dead:
            self._step()
        self._release_hooks()
        return cast(torch.Tensor, self._output)

    def cancel(self) -> None:
        self._release_hooks()
        self._greenlet.throw()  # ends it where it sleeps

    def _release_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def hidden_states(output: Any) -> torch.Tensor:
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)

"""Quantizing whole models block by block, in memory or streamed from a checkpoint.

Both ways share one engine. Block after block, the calibration windows run through the block; the
linears that share an input form a group with one Hessian and one factorization; a group is
quantized, and the next group sees inputs that its quantized predecessors left (true-sequential).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbitcore import ops
from lowbitcore.data import calibration_windows, read_texts
from lowbitcore.formats import checkpoint, gptq
from lowbitcore.formats.checkpoint import Checkpoint, Entry
from lowbitcore.formats.gguf import GgufFile
from lowbitcore.formats.gptq import GptqConfig
from lowbitcore.model import (
    BlockLayout,
    Source,
    base_hash,
    build_skeleton,
    fill,
    find_blocks,
    find_name,
    linear_shape,
    load_generation_config,
    load_tokenizer,
    not_quantizable,
    open_source,
    quantizable,
    quantized_entries,
    quantized_linears,
    read_quant_linear,
    saved_name,
    set_module,
    tied_names,
    write_model,
)
from lowbitcore.nn import QuantLinear

# Tokens that go through a block at once: enough to keep matrix products busy, few enough for
# attention and MLP temporaries to stay small beside the hidden states.
MICRO_BATCH_TOKENS = 4096

# Windows taken from a calibration file where the caller gives only its path.
_FILE_SAMPLES, _FILE_LENGTH = 128, 2048

# Paused forwards (see _PausedForward) may use this part of the memory that is free at the start.
_PAUSED_MEMORY_SHARE = 0.25

_PARTIAL = ".partial"


def compute_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of calibration forwards: bfloat16 where that loses nothing and is fast.

    bf16 weights run as they are on CPUs with AVX512-BF16 or AMX (Zen 5, 2 cores: 310 to 390
    GFLOP/s against 70 to 100 in fp32); everything else, fp16 included, runs in fp32.
    """
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if model_dtype == torch.bfloat16 and fast else torch.float32


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize. `act_order`: order of GPTQ's columns by activation; "static" keeps groups
    on the original order (a plain file for every loader), "dynamic" permutes them (`g_idx`)."""

    bits: int = 4
    group_size: int = 64
    sym: bool = False
    method: Literal["gptq", "rtn"] = "gptq"
    act_order: Literal["static", "dynamic", "none"] = "static"
    true_sequential: bool = True
    percdamp: float = 0.01
    mse: bool = True

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, expected: str) -> None:
            if not fine:
                value = getattr(self, name)
                raise ValueError(f"QuantConfig: {name}: expected {expected}, got {value!r}")

        size = self.group_size
        check("bits", type(self.bits) is int and self.bits in gptq.BITS, "2, 3, 4 or 8")
        check(
            "group_size",
            type(size) is int and (size == -1 or (size > 0 and size % 32 == 0)),
            "-1 or a multiple of 32",
        )
        check("method", self.method in ("gptq", "rtn"), "'gptq' or 'rtn'")
        check(
            "act_order",
            self.act_order in ("static", "dynamic", "none"),
            "'static', 'dynamic' or 'none'",
        )
        damp = self.percdamp
        check("percdamp", isinstance(damp, int | float) and 0 < damp < 1, "between 0 and 1")
        for name in ("sym", "true_sequential", "mse"):
            check(name, isinstance(getattr(self, name), bool), "True or False")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> QuantConfig:
        known = {item.name for item in fields(QuantConfig)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise ValueError(f"QuantConfig: expected fields {sorted(known)}, got {unknown}")
        return QuantConfig(**value)

    def gptq_config(self) -> GptqConfig:
        """What the files will say, up to the convention of zeros, which saving chooses."""
        return GptqConfig(
            bits=self.bits,
            group_size=self.group_size,
            desc_act=self.method == "gptq" and self.act_order == "dynamic",
            sym=self.sym,
            meta={
                "quantizer": f"lowbitcore:{_version()}",
                "method": self.method,
                "damp_percent": self.percdamp,
                "true_sequential": self.true_sequential,
                "static_groups": self.act_order == "static",
                "mse": self.mse,
            },
        )


def _version() -> str:
    try:
        return importlib.metadata.version("lowbitcore")
    except importlib.metadata.PackageNotFoundError:
        return "0"  # run from a source tree


@dataclass(frozen=True)
class LinearReport:
    """`loss`: relative error tr(E H Et) / tr(W H Wt) on the calibration data (None for rtn);
    `percdamp`: the damping used, above the configured one where that had to be raised."""

    path: str
    loss: float | None
    percdamp: float | None


@dataclass
class Report:
    """What a quantization did. `seconds` by phase: load, forward, hessian, factorize, quantize,
    write; `bytes`: original (quantized linears in 16 bits) and quantized (with scales, zeros)."""

    linears: list[LinearReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=lambda: {"original": 0, "quantized": 0})
    tokens: int = 0

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def raised_damping(self, config: QuantConfig) -> list[LinearReport]:
        return [item for item in self.linears if (item.percdamp or 0.0) > config.percdamp * 1.0001]


# --- Calibration data ------------------------------------------------------------------------


def _windows(
    calibration: Any, load: Callable[[], Any], model_config: Any, config: QuantConfig
) -> torch.Tensor:
    """Checks calibration data, or cuts it from a file; int64 [n, length], empty for rtn."""
    if config.method == "rtn":
        return torch.empty(0, 0, dtype=torch.int64)
    vocabulary = model_config.get_text_config().vocab_size
    limit = getattr(model_config, "max_position_embeddings", None)
    if isinstance(calibration, str | os.PathLike):
        calibration = calibration_windows(
            read_texts(calibration),
            load(),
            samples=_FILE_SAMPLES,
            length=min(_FILE_LENGTH, limit or _FILE_LENGTH),
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
    if limit is not None and length > limit:
        raise ValueError(
            f"quantize: calibration: expected at most {limit} tokens a window, got {length}"
        )
    low, high = int(calibration.min()), int(calibration.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"quantize: calibration: expected tokens 0..{vocabulary - 1}, got {low}..{high}"
        )
    return calibration.cpu()


# --- Capturing what blocks are called with ---------------------------------------------------


class _Stop(Exception):
    """Ends a forward whose rest is not needed."""


class _Call(NamedTuple):
    """What a block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> Any:
        return block(hidden, *self.args, **self.kwargs)


class _Recorder(nn.Module):
    """Stands in for a block while the model's own forward runs, and tells `visit` of the call."""

    def __init__(self, block: nn.Module, visit: Callable[[torch.Tensor, _Call], Any]) -> None:
        super().__init__()
        # Not registered as a submodule: it is only asked for attributes the model looks at.
        self.__dict__["block"] = block
        self.__dict__["visit"] = visit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.visit(args[0], _Call(args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return self.visit(hidden, _Call((), kwargs))


class _Calibration:
    """The hidden states before the next block, and how each block wants to be called.

    `hidden`: a tensor [windows, length, features] for each micro-batch, in the compute dtype.
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
        self.hidden = [self._embed(batch) for batch in batches]
        # One window's output shows whether blocks return a tensor or a tuple.
        single = windows[:1]
        first = self._first_call(single)
        output = first(layout.modules[0], self.hidden[0][:1])
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

    def call(self, index: int, windows: int) -> _Call:
        return self._calls[windows][index]

    def _run(self, batch: torch.Tensor, visits: list[Callable[[torch.Tensor, _Call], Any]]) -> None:
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

    def _embed(self, batch: torch.Tensor) -> torch.Tensor:
        return self._at_first_block(batch)[0]

    def _first_call(self, batch: torch.Tensor) -> _Call:
        return self._at_first_block(batch)[1]

    def _at_first_block(self, batch: torch.Tensor) -> tuple[torch.Tensor, _Call]:
        seen: list[tuple[torch.Tensor, _Call]] = []

        def visit(hidden: torch.Tensor, call: _Call) -> Any:
            seen.append((hidden.to(self._dtype), self._cast(call)))
            raise _Stop

        self._run(batch, [visit] * len(self._layout.modules))
        if not seen or seen[0][0].dim() != 3:
            raise ValueError(
                f"quantize: {self._layout.prefix}: the model's forward does not hand hidden states "
                "[batch, length, features] to its blocks"
            )
        return seen[0]

    def _record(self, batch: torch.Tensor, extra: tuple[Any, ...] | None) -> list[_Call]:
        calls: list[_Call] = []

        def visit(hidden: torch.Tensor, call: _Call) -> Any:
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

    def _cast(self, call: _Call) -> _Call:
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

        return _Call(cast_value(call.args), cast_value(call.kwargs))


# --- Forwards that stop at groups ------------------------------------------------------------


class _Forward(Protocol):
    """A micro-batch's way through a block, from group to group."""

    def advance(self, group: int) -> torch.Tensor | None:
        """Runs to the group; its input, or None where the block takes no path through it."""

    def finish(self) -> torch.Tensor:
        """Runs to the end; the block's output."""

    def cancel(self) -> None:
        """Gives up."""


class _RepeatedForward:
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


class _PausedForward(threading.Thread):
    """Runs once, in a thread of its own that sleeps at each group until it is told to go on.

    A block's forward cannot be left and entered again, and repeating it up to each group costs
    twice the products and four times the attention of one pass. A sleeping thread keeps just what
    the rest of the forward needs. Only one thread ever runs, so results do not depend on timing.
    """

    def __init__(self, run: Callable[[], torch.Tensor], heads: Sequence[nn.Module]) -> None:
        super().__init__(daemon=True)
        self._run, self._groups = run, {id(head): i for i, head in enumerate(heads)}
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._at, self._input = -1, cast(torch.Tensor | None, None)
        self._output: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._ended = self._cancelled = False
        self._handles = [head.register_forward_pre_hook(self._pause) for head in heads]

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                with torch.no_grad():  # a thread's own setting
                    self._output = self._run()
        except _Stop:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._paused.release()

    def _pause(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if threading.current_thread() is not self:
            return  # another micro-batch's forward through the same block
        self._at, self._input = self._groups[id(module)], args[0]
        self._paused.release()
        self._go.acquire()
        self._input = None
        if self._cancelled:
            raise _Stop

    def _step(self) -> None:
        if not self.is_alive():
            self.start()
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def advance(self, group: int) -> torch.Tensor | None:
        while not self._ended and self._at < group:
            self._step()
        return self._input if self._at == group and not self._ended else None

    def finish(self) -> torch.Tensor:
        while not self._ended:
            self._step()
        self._release_hooks()
        return cast(torch.Tensor, self._output)

    def cancel(self) -> None:
        self._release_hooks()
        self._cancelled = True
        if self.is_alive() and not self._ended:
            self._go.release()
            self.join()

    def _release_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _tensor(output: Any) -> torch.Tensor:
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)


# --- The engine ------------------------------------------------------------------------------


class _Engine:
    """Quantizes block after block; the callers decide where blocks come from and go to."""

    def __init__(
        self,
        config: QuantConfig,
        calibration: _Calibration | None,
        layout: BlockLayout,
        dtype: torch.dtype,
        report: Report,
    ) -> None:
        self._config, self._calibration, self._layout = config, calibration, layout
        self._dtype, self._report = dtype, report

    def quantize(self, index: int) -> dict[str, QuantLinear]:
        """Quantizes one block; its linears then hold dequantized weights in the compute dtype.

        Returns the quantized linears by path inside the block, and moves the hidden states past it.
        """
        block, prefix = self._layout.modules[index], f"{self._layout.prefix}.{index}"
        linears = quantizable(block)
        for path, reason in not_quantizable(block).items():
            self._report.skipped[f"{prefix}.{path}"] = reason
        for path, module in linears.items():
            if not torch.isfinite(cast(torch.Tensor, module.weight)).all():
                raise ValueError(f"quantize: {prefix}.{path}.weight: holds NaN or Inf")
        if self._calibration is None:
            return self._quantize_rtn(prefix, linears)
        return self._quantize_gptq(index, prefix, linears)

    def skip(self, index: int, linears: Mapping[str, QuantLinear]) -> None:
        """Takes a block that was quantized earlier: the hidden states go past it."""
        for path, linear in linears.items():
            self._set_dense(self._layout.modules[index].get_submodule(path), linear)
        if self._calibration is not None:
            with self._report.timing("forward"):
                for number, forward in enumerate(self._forwards(index, [])):
                    self._advance_hidden(index, number, forward.finish())

    def _quantize_rtn(
        self, prefix: str, linears: Mapping[str, nn.Module]
    ) -> dict[str, QuantLinear]:
        config, result = self._config, {}
        for path, module in linears.items():
            with self._report.timing("quantize"):
                codes, scales, zeros = ops.quantize_rtn(
                    _weight(module),
                    bits=config.bits,
                    group_size=config.group_size,
                    sym=config.sym,
                    mse=config.mse,
                )
                result[path] = self._quant_linear(module, codes, scales, zeros, None)
            self._add(LinearReport(f"{prefix}.{path}", None, None), result[path])
        return result

    def _quantize_gptq(
        self, index: int, prefix: str, linears: Mapping[str, nn.Module]
    ) -> dict[str, QuantLinear]:
        groups = self._groups(index, linears)
        reached = {path for group in groups for path in group}
        forwards = self._forwards(index, [linears[group[0]] for group in groups])
        hessians: list[torch.Tensor | None] = []
        result: dict[str, QuantLinear] = {}
        try:
            for number, group in enumerate(groups):
                hessian = self._hessian(index, forwards, number)
                if self._config.true_sequential:
                    result.update(self._quantize_group(prefix, linears, group, hessian))
                else:
                    hessians.append(hessian)
            for group, hessian in zip(groups, hessians, strict=False):
                result.update(self._quantize_group(prefix, linears, group, hessian))
            if not self._config.true_sequential:
                # These forwards went past the linears before they were quantized.
                for forward in forwards:
                    forward.cancel()
                forwards = self._forwards(index, [])
            for number, forward in enumerate(forwards):
                with self._report.timing("forward"):
                    output = forward.finish()
                self._advance_hidden(index, number, output)
        finally:
            for forward in forwards:
                forward.cancel()
        for path in linears.keys() - (reached & result.keys()):
            self._report.skipped[f"{prefix}.{path}"] = "not reached by the calibration data"
        return result

    def _advance_hidden(self, index: int, number: int, output: torch.Tensor) -> None:
        if not torch.isfinite(output).all():
            raise ValueError(
                f"quantize: {self._layout.prefix}.{index}: its output on the calibration data "
                "holds NaN or Inf"
            )
        cast(_Calibration, self._calibration).hidden[number] = output

    def _groups(self, index: int, linears: Mapping[str, nn.Module]) -> list[list[str]]:
        """Linears that read the very same tensor, in the order in which they run.

        Found anew for each block, on one window: a block that routes tokens may skip some.
        """
        block = self._layout.modules[index]
        calibration = cast(_Calibration, self._calibration)
        order: list[tuple[torch.Tensor, list[str]]] = []
        seen: set[str] = set()

        def watch(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if path in seen:
                    return
                seen.add(path)
                for tensor, paths in order:
                    if _same_tensor(tensor, args[0]):
                        paths.append(path)
                        return
                # Kept alive: a freed tensor's address may come back as another one's.
                order.append((args[0], [path]))

            return hook

        handles = [item.register_forward_pre_hook(watch(path)) for path, item in linears.items()]
        try:
            calibration.call(index, 1)(block, calibration.hidden[0][:1])
        finally:
            for handle in handles:
                handle.remove()
        return [paths for _, paths in order]

    def _forwards(self, index: int, heads: Sequence[nn.Module]) -> list[_Forward]:
        calibration = cast(_Calibration, self._calibration)
        block = self._layout.modules[index]

        def runner(number: int) -> Callable[[], torch.Tensor]:
            def run() -> torch.Tensor:
                hidden = calibration.hidden[number]
                return _tensor(calibration.call(index, hidden.shape[0])(block, hidden))

            return run

        kind = _PausedForward if heads and self._can_pause(block) else _RepeatedForward
        return [kind(runner(number), heads) for number in range(len(calibration.hidden))]

    def _can_pause(self, block: nn.Module) -> bool:
        """Whether what all micro-batches keep while they sleep fits beside everything else."""
        hidden = cast(_Calibration, self._calibration).hidden
        tokens = sum(batch.shape[0] * batch.shape[1] for batch in hidden)
        widest = max((linear_shape(item)[0] for item in quantizable(block).values()), default=0)
        # At attention's output: residual, input, q, k, v, result; in the MLP less of them, but two
        # of its width.
        kept = tokens * (6 * hidden[0].shape[2] + 2 * widest) * self._dtype.itemsize
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return kept <= free * _PAUSED_MEMORY_SHARE

    def _hessian(self, index: int, forwards: Sequence[_Forward], group: int) -> torch.Tensor | None:
        hessian: torch.Tensor | None = None
        for forward in forwards:
            with self._report.timing("forward"):
                inputs = forward.advance(group)
            if inputs is None or inputs.numel() == 0:
                continue
            if hessian is None:
                size = inputs.shape[-1]
                hessian = torch.zeros(size, size, dtype=torch.float32)
            with self._report.timing("hessian"):
                ops.accumulate_hessian_(hessian, inputs)
        if hessian is not None and not torch.isfinite(hessian.diagonal()).all():
            raise ValueError(
                f"quantize: {self._layout.prefix}.{index}: its hidden states on the calibration "
                "data hold NaN or Inf"
            )
        return hessian

    def _quantize_group(
        self,
        prefix: str,
        linears: Mapping[str, nn.Module],
        group: Sequence[str],
        hessian: torch.Tensor | None,
    ) -> dict[str, QuantLinear]:
        if hessian is None:
            return {}  # experts that no token was routed to
        config = self._config
        modules = [linears[path] for path in group]
        weight = torch.cat([_weight(module) for module in modules])
        with self._report.timing("factorize"):
            factor = ops.gptq_factorize(
                hessian, percdamp=config.percdamp, act_order=config.act_order != "none"
            )
        with self._report.timing("quantize"):
            codes, scales, zeros, g_idx, _ = ops.gptq_quantize(
                weight,
                factor,
                bits=config.bits,
                group_size=config.group_size,
                sym=config.sym,
                mse=config.mse,
                static_groups=config.act_order == "static",
            )
        result, row = {}, 0
        for path, module in zip(group, modules, strict=True):
            rows = slice(row, row + linear_shape(module)[1])
            row = rows.stop
            with self._report.timing("quantize"):
                linear = self._quant_linear(
                    module, codes[rows], scales[:, rows], zeros[:, rows], g_idx
                )
                self._set_dense(module, linear)
                error = self._relative_loss(weight[rows], _weight(module), hessian)
            result[path] = linear
            self._add(LinearReport(f"{prefix}.{path}", error, factor.percdamp), linear)
        return result

    def _relative_loss(
        self, weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor
    ) -> float:
        def energy(matrix: torch.Tensor) -> float:
            # Three digits are enough for a report, so this runs in the fast dtype too.
            product = matrix.to(self._dtype) @ hessian.to(self._dtype)
            return float((product.float() * matrix.float()).sum())

        total = energy(weight)
        return energy(weight.float() - quantized.float()) / total if total else 0.0

    def _quant_linear(
        self,
        module: nn.Module,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        g_idx: torch.Tensor | None,
    ) -> QuantLinear:
        bits = self._config.bits
        bias = cast(torch.Tensor | None, module.bias)
        return QuantLinear.from_canonical(
            ops.pack_qweight(codes.contiguous(), bits=bits),
            ops.pack_qzeros(zeros.contiguous(), bits=bits),
            scales.contiguous(),
            bits=bits,
            group_size=self._config.group_size,
            g_idx=g_idx,
            bias=None if bias is None else bias.detach().clone(),
        )

    def _set_dense(self, module: nn.Module, linear: QuantLinear) -> None:
        """What the rest of the calibration sees: dequantized weights, multiplied by torch."""
        dense = linear.dequantize(self._dtype)
        if isinstance(module, Conv1D):
            dense = dense.T.contiguous()
        module.weight = nn.Parameter(dense, requires_grad=False)

    def _add(self, entry: LinearReport, linear: QuantLinear) -> None:
        self._report.linears.append(entry)
        canonical = linear.canonical()
        self._report.bytes["original"] += linear.in_features * linear.out_features * 2
        self._report.bytes["quantized"] += sum(
            canonical[name].numel() * (2 if name == "scales" else 4)
            for name in ("qweight", "qzeros", "scales")
        )


def _weight(module: nn.Module) -> torch.Tensor:
    """The weight as [out, in]."""
    weight = cast(torch.Tensor, module.weight).detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


# --- In memory -------------------------------------------------------------------------------


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel,
    tokenizer: Any,
    calibration: Any,
    config: QuantConfig,
    *,
    progress: bool = True,
) -> PreTrainedModel:
    """Quantizes the linears of a model's blocks in place and returns the model.

    `calibration`: int64 [n, length], a list of 1-D tensors of one length, or the path of a text
    file (128 windows of up to 2048 tokens; the only use of `tokenizer`); unused by method "rtn".
    `model.quantization_report` says what was done. Raises ValueError for bad input.
    """
    if quantized_linears(model):
        raise ValueError("quantize_model: model: expected an unquantized one, got a quantized one")
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise ValueError(f"quantize_model: model: expected it on cpu, got {sorted(devices)}")
    layout = find_blocks(model)
    windows = _windows(calibration, lambda: tokenizer, model.config, config)
    dtype = compute_dtype(model.dtype)
    report = Report(tokens=windows.numel())
    training = model.training
    model.eval()
    try:
        first = layout.modules[0]
        kept = _to_compute(first, model.dtype, dtype)
        with report.timing("forward"):
            state = None if config.method == "rtn" else _Calibration(model, layout, windows, dtype)
        engine = _Engine(config, state, layout, dtype, report)
        for index in _blocks(layout, progress):
            block = layout.modules[index]
            if index:
                kept = _to_compute(block, model.dtype, dtype)
            linears = engine.quantize(index)
            for path, linear in linears.items():
                set_module(block, path, linear)
            _restore(block, kept, model.dtype)
    finally:
        model.train(training)
    model.config.quantization_config = config.gptq_config().to_dict()
    model.quantization_report = report
    return model


def _blocks(layout: BlockLayout, progress: bool) -> Iterator[int]:
    bar = tqdm(range(len(layout.modules)), desc="quantizing", unit="block", disable=not progress)
    return iter(bar)


def _to_compute(block: nn.Module, model_dtype: torch.dtype, dtype: torch.dtype) -> list[str]:
    """Widens a block's parameters to the compute dtype; the names of those it changed."""
    if model_dtype == dtype:
        return []
    names = [name for name, item in block.named_parameters() if item.dtype == model_dtype]
    for name in names:
        block.get_parameter(name).data = block.get_parameter(name).data.to(dtype)
    return names


def _restore(block: nn.Module, names: Sequence[str], model_dtype: torch.dtype) -> None:
    remaining = dict(block.named_parameters())
    for name in names:
        if name in remaining:  # quantized weights are gone
            remaining[name].data = remaining[name].data.to(model_dtype)


def _return_freed_memory() -> None:
    """Hands freed memory back to the system where the C library can.

    glibc keeps freed tensors of up to 32 MB in its heap, where small objects that outlive them
    pin them down: without this, memory grew by most of each block (24 of 8 MB: 145 MB).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# --- Streaming -------------------------------------------------------------------------------


@torch.no_grad()
def quantize_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: Any,
    config: QuantConfig,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Report:
    """Quantizes a checkpoint to a GPTQ directory with one block in memory at a time.

    `source`: a Hugging Face directory, hub id or `.gguf` (which counts as a bf16 model);
    `calibration` as in `quantize_model`. Finished blocks go to `out/.partial`, from where
    `resume=True` goes on after a kill with a result equal to the last bit. Raises ValueError for
    bad input, an `out` that exists, and a resume with other settings.
    """
    opened = open_source(source)
    if opened.gptq is not None:
        raise ValueError(f"quantize_checkpoint: {source}: is quantized already")
    if isinstance(opened.weights, GgufFile) and opened.dtype == torch.float32:
        opened = opened._replace(dtype=torch.bfloat16)
    windows = _windows(calibration, lambda: load_tokenizer(source), opened.config, config)
    run = _StreamingRun(opened, Path(out), windows, config)
    run.open(resume=resume)
    return run.quantize(progress=progress)


class _StreamingRun:
    """One streamed quantization: its source, its `.partial` directory and its progress."""

    def __init__(
        self, source: Source, out: Path, windows: torch.Tensor, config: QuantConfig
    ) -> None:
        self._source, self._out, self._config = source, out, config
        self._windows = windows
        self._partial = out / _PARTIAL
        self._dtype = compute_dtype(source.dtype)
        self._model = build_skeleton(source.config, source.dtype)
        self._layout = find_blocks(self._model)
        self._names = list(self._model.state_dict())
        self._report = Report(tokens=windows.numel())
        self._done = 0

    # Progress

    def open(self, *, resume: bool) -> None:
        """Prepares `out`, or takes up what an earlier run left there."""
        out, progress = self._out, self._partial / "progress.json"
        if out.exists() and not out.is_dir():
            raise ValueError(f"quantize_checkpoint: {out}: expected a directory, got a file")
        if (out / "config.json").exists():
            raise ValueError(f"quantize_checkpoint: {out}: holds a finished model already")
        if progress.exists():
            if not resume:
                raise ValueError(
                    f"quantize_checkpoint: {out}: holds an unfinished quantization: resume it, or "
                    f"delete {self._partial}"
                )
            self._take_up(checkpoint.read_json(progress), progress)
            return
        strangers = [p.name for p in out.iterdir() if p.name != _PARTIAL] if out.exists() else []
        if strangers:
            raise ValueError(
                f"quantize_checkpoint: {out}: expected an empty or new directory, "
                f"got {sorted(strangers)[0]!r} in it"
            )
        self._partial.mkdir(parents=True, exist_ok=True)
        self._save_progress()

    def _take_up(self, state: dict[str, Any], where: Path) -> None:
        for name, value in self._binding().items():
            if state.get(name) != value:
                raise ValueError(
                    f"{where}: cannot resume: the {name} differs from that of the unfinished run"
                )
        try:
            self._done = int(state["done"])
            report = state["report"]
            self._report.linears = [LinearReport(**item) for item in report["linears"]]
            self._report.skipped = dict(report["skipped"])
            self._report.seconds = dict(report["seconds"])
            self._report.bytes = dict(report["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: not a usable progress file: {error!r}") from error

    def _binding(self) -> dict[str, Any]:
        """What a resumed run has to share with the one it goes on with."""
        tokens = self._windows.contiguous().view(-1).numpy().tobytes()
        return {
            "config": self._config.to_dict(),
            "source": self._source.weights.fingerprint(),
            "calibration": hashlib.sha256(tokens).hexdigest() + f" {list(self._windows.shape)}",
            "version": _version(),
            "dtype": str(self._dtype),
        }

    def _save_progress(self) -> None:
        report = asdict(self._report)
        checkpoint.write_json(
            self._partial / "progress.json",
            {**self._binding(), "done": self._done, "report": report},
        )

    # Blocks

    def quantize(self, *, progress: bool) -> Report:
        calibration = None
        if self._config.method == "gptq":
            calibration = self._calibrate()
        engine = _Engine(self._config, calibration, self._layout, self._dtype, self._report)
        for index in _blocks(self._layout, progress):
            if index < self._done:
                # Without calibration nothing depends on earlier blocks.
                if calibration is not None:
                    self._load_block(index)
                    engine.skip(index, self._read_done(index))
            else:
                self._load_block(index)
                linears = engine.quantize(index)
                with self._report.timing("write"):
                    self._write_block(index, linears)
                    self._done = index + 1
                    self._save_progress()
            self._drop(self._block_names(index))
        with self._report.timing("write"):
            self._merge()
        return self._report

    def _calibrate(self) -> _Calibration:
        """Runs the embeddings and what else comes before the blocks, then lets go of it."""
        blocks = f"{self._layout.prefix}."
        ties = tied_names(self._model)
        head = self._model.get_output_embeddings()
        # The head comes after the blocks, and untied it is as large as the embeddings.
        unused = {id(item) for item in head.parameters()} if head is not None and not ties else {}
        outer = [
            name
            for name, item in self._model.state_dict(keep_vars=True).items()
            if not name.startswith(blocks) and id(item) not in unused
        ]
        with self._report.timing("load"):
            fill(self._model, self._source.weights, outer, dtype=self._source.dtype)
        self._load_block(0)
        with self._report.timing("forward"):
            calibration = _Calibration(self._model, self._layout, self._windows, self._dtype)
        self._drop(outer)
        return calibration

    def _block_names(self, index: int) -> list[str]:
        prefix = f"{self._layout.prefix}.{index}."
        return [name for name in self._names if name.startswith(prefix)]

    def _load_block(self, index: int) -> None:
        names = self._block_names(index)
        current = self._model.state_dict(keep_vars=True)
        if any(current[name].is_meta for name in names):
            with self._report.timing("load"):
                fill(self._model, self._source.weights, names, dtype=self._dtype)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            set_module_tensor_to_device(self._model, name, "meta")
        _return_freed_memory()

    def _block_file(self, index: int) -> Path:
        return self._partial / f"block-{index:05d}.safetensors"

    def _write_block(self, index: int, linears: Mapping[str, QuantLinear]) -> None:
        prefix = f"{self._layout.prefix}.{index}"
        config = self._config.gptq_config()
        entries = []
        for path, linear in linears.items():
            canonical = linear.canonical()  # unpacked once: a block fits in memory
            stem = saved_name(self._model, f"{prefix}.{path}")
            entries += quantized_entries(stem, partial(dict, canonical), config)
        written = {f"{prefix}.{path}.{name}" for path in linears for name in ("weight", "bias")}
        entries += [
            self._source_entry(name) for name in self._block_names(index) if name not in written
        ]
        checkpoint.write_safetensors(self._block_file(index), entries)

    def _source_entry(self, name: str) -> Entry:
        """A tensor that stays as it is in the source, read when it is written."""
        weights = self._source.weights
        found = find_name(self._model, weights, name)
        info = weights.info(found)
        dtype = self._source.dtype if info.dtype.is_floating_point else info.dtype
        saved = saved_name(self._model, name)
        return Entry(saved, dtype, info.shape, lambda: weights.tensor(found).to(dtype))

    def _read_done(self, index: int) -> dict[str, QuantLinear]:
        prefix = f"{self._layout.prefix}.{index}."
        weights = Checkpoint.from_file(self._block_file(index))
        block = self._layout.modules[index]
        result = {}
        for path, module in quantizable(block).items():
            stem = saved_name(self._model, prefix + path)
            if f"{stem}.qweight" not in weights:
                continue
            in_features, out_features = linear_shape(module)
            result[path] = read_quant_linear(
                weights,
                stem,
                self._config.gptq_config(),
                in_features=in_features,
                out_features=out_features,
                bias=module.bias is not None,
                dtype=self._dtype,
            )
        return result

    # Merging

    def _merge(self) -> None:
        """Makes shards of the blocks' files and of what surrounds the blocks."""
        config = self._config.gptq_config()
        # Symmetric zeros are all 2^(bits - 1).
        config = replace(
            config, checkpoint_format=gptq.choose_format(sym=config.sym, any_zero=False)
        )
        ties, blocks = tied_names(self._model), f"{self._layout.prefix}."
        outer = [n for n in self._names if not n.startswith(blocks) and n not in ties]
        entries = [self._source_entry(name) for name in outer]
        canonical: dict[str, Callable[[], Mapping[str, torch.Tensor]]] = {}
        for index in range(len(self._layout.modules)):
            weights = Checkpoint.from_file(self._block_file(index))
            stems = [n.removesuffix(".qweight") for n in weights.names() if n.endswith(".qweight")]
            for stem in stems:
                canonical[stem] = _stored_canonical(weights, stem)
            entries += [_stored_entry(weights, name, config) for name in weights.names()]
        config = replace(config, meta={**config.meta, "base_sha256": base_hash(canonical)})
        try:
            tokenizer = load_tokenizer(self._source.path)
        except ValueError:
            tokenizer = None  # a model without a tokenizer is a model all the same
        write_model(
            self._out,
            entries,
            model_config=self._model.config,
            gptq_config=config,
            generation_config=load_generation_config(self._source),
            tokenizer=tokenizer,
        )
        shutil.rmtree(self._partial)


def _stored_canonical(weights: Checkpoint, stem: str) -> Callable[[], Mapping[str, torch.Tensor]]:
    names = ("qweight", "qzeros", "g_idx")
    return lambda: {name: weights.tensor(f"{stem}.{name}") for name in names}


def _stored_entry(weights: Checkpoint, name: str, config: GptqConfig) -> Entry:
    """A tensor of a block's file; its zeros are v2 there and may become v1."""
    info = weights.info(name)

    def load() -> torch.Tensor:
        tensor = weights.tensor(name)
        if name.endswith(".qzeros") and config.checkpoint_format == gptq.V1:
            return gptq.v2_to_v1(tensor, bits=config.bits)
        return tensor

    return Entry(name, info.dtype, info.shape, load)

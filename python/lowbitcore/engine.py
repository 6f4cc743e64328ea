"""Quantizing one block after another, from the states that calibration windows leave before it.

Linears that share an input form a group with one Hessian and one factorization; a group is
quantized, and the next group sees inputs that its quantized predecessors left (true-sequential). By
default the 16-bit model runs beside the quantized one, and each linear is fitted to what its 16-bit
twin puts out there, so that errors are corrected downstream rather than handed on. Where wanted,
what a block was quantized to is then trained on the block's own output (`tune`).
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lowbitcore import ops
from lowbitcore.blocks import (
    BlockLayout,
    as_stored,
    linear_shape,
    linear_weight,
    not_quantizable,
    quantizable,
)
from lowbitcore.calibration import (
    Calibration,
    Forward,
    PausedForward,
    RepeatedForward,
    hidden_states,
)
from lowbitcore.fit import dequantized, fit_low_rank, fit_scales, fit_weight
from lowbitcore.formats import peft
from lowbitcore.formats.peft import LowRankTensors
from lowbitcore.lora import check_rank
from lowbitcore.nn import QuantLinear
from lowbitcore.quant_config import QuantConfig
from lowbitcore.runtime import free_memory, synchronize
from lowbitcore.tune import FakeQuantized, block_error, train_block

# Paused forwards (see PausedForward) may use this part of the memory that is free at the start.
_PAUSED_MEMORY_SHARE = 0.25


# How often integers and corrections are fitted, each to what the other leaves over. SmolLM2-135M at
# 2 bits with rank 8, perplexity on 8 windows of WikiText-2: 123 after 1 round, 92 to 98 after 3, 80
# after 8.
_ROUNDS = 8


# Outputs of a linear that the loss of its report is of, evenly spread, where it has twice as many.
_REPORTED_ROWS = 256


@dataclass(frozen=True)
class LinearReport:
    """`loss`: relative error tr(E H Et) / tr(W H Wt) on the calibration data (None for rtn), of 256
    outputs and more, with W as fitted to the config's target and before any tuning; `percdamp`: the
    damping used, above the configured one where that had to be raised."""

    path: str
    loss: float | None
    percdamp: float | None


@dataclass(frozen=True)
class BlockReport:
    """The relative error of a block's output on the calibration data, and what tuning made of it
    (None: something that was not finite). Unless that is less, the block `stayed` as it was."""

    path: str
    before: float
    after: float | None

    @property
    def stayed(self) -> bool:
        return self.error == self.before

    @property
    def error(self) -> float:
        """Of the block that came out."""
        return self.before if self.after is None else min(self.before, self.after)


class Statistics(NamedTuple):
    """Of a group's inputs x, over all tokens: `hessian` = sum of x x^T, and `cross` = sum of
    (x' - x) x^T, where x' are the inputs in the 16-bit model. None where nothing was seen."""

    tokens: int
    hessian: torch.Tensor | None
    cross: torch.Tensor | None


class QuantizedLinear(NamedTuple):
    """A linear's integers and scales, and the correction beside them if the config wants one."""

    linear: QuantLinear
    correction: LowRankTensors | None = None


@dataclass
class Report:
    """What a quantization did. `blocks`: those that were tuned. `seconds` by phase: load, forward,
    hessian, factorize, quantize, fit, tune, write; `bytes`: original (the same linears in 16 bits),
    quantized (scales, zeros and corrections too)."""

    linears: list[LinearReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=lambda: {"original": 0, "quantized": 0})
    tokens: int = 0

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            synchronize()
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def raised_damping(self, config: QuantConfig) -> list[LinearReport]:
        return [item for item in self.linears if (item.percdamp or 0.0) > config.percdamp * 1.0001]


class Engine(ABC):
    """Quantizes block after block; the callers decide where blocks come from and go to."""

    def __init__(self, config: QuantConfig, layout: BlockLayout, report: Report) -> None:
        self._config, self._layout, self._report = config, layout, report

    def quantize(self, index: int) -> dict[str, QuantizedLinear]:
        """Quantizes one block; its linears then hold dequantized weights in the compute dtype,
        corrections included.

        Returns the quantized linears by path inside the block, and moves any hidden states past it.
        """
        block, prefix = self._layout.modules[index], f"{self._layout.prefix}.{index}"
        linears = quantizable(block)
        for path, reason in not_quantizable(block).items():
            self._report.skipped[f"{prefix}.{path}"] = reason
        check_weights(prefix, linears)
        return self._quantize(index, prefix, linears)

    @abstractmethod
    def _quantize(
        self, index: int, prefix: str, linears: Mapping[str, nn.Module]
    ) -> dict[str, QuantizedLinear]: ...

    @abstractmethod
    def skip(self, index: int, linears: Mapping[str, QuantizedLinear]) -> None:
        """Takes a block that was quantized earlier: the hidden states go past it."""

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

    def _rounded(self, path: str, module: nn.Module) -> QuantizedLinear:
        """Each weight to the nearest integer of its grid."""
        config = self._config
        with self._report.timing("quantize"):
            codes, scales, zeros = ops.quantize_rtn(
                linear_weight(module),
                bits=config.bits,
                group_size=config.group_size,
                sym=config.sym,
                mse=config.mse,
            )
            result = QuantizedLinear(self._quant_linear(module, codes, scales, zeros, None))
        self._add(LinearReport(path, None, None), result)
        return result

    def _add(self, entry: LinearReport, quantized: QuantizedLinear) -> None:
        linear, correction = quantized
        self._report.linears.append(entry)
        weights, scales = linear.in_features * linear.out_features, linear.scales.numel()
        self._report.bytes["original"] += weights * 2
        # Integers, a zero for each scale, and the scales in fp16.
        self._report.bytes["quantized"] += (weights + scales) * linear.bits // 8 + scales * 2
        if correction is not None:
            self._report.bytes["quantized"] += correction.a.nbytes + correction.b.nbytes


class RtnEngine(Engine):
    """Round-to-nearest: no data, no states."""

    def skip(self, index: int, linears: Mapping[str, QuantizedLinear]) -> None:
        pass

    def _quantize(
        self, index: int, prefix: str, linears: Mapping[str, nn.Module]
    ) -> dict[str, QuantizedLinear]:
        return {path: self._rounded(f"{prefix}.{path}", module) for path, module in linears.items()}


class GptqEngine(Engine):
    """GPTQ, and what goes with it: corrections and tuning. `dtype` is that of the forwards."""

    def __init__(
        self,
        config: QuantConfig,
        calibration: Calibration,
        layout: BlockLayout,
        dtype: torch.dtype,
        report: Report,
    ) -> None:
        super().__init__(config, layout, report)
        self._calibration, self._dtype = calibration, dtype
        shapes = [linear_shape(item) for item in quantizable(layout.modules[0]).values()]
        check_rank("QuantConfig: rank", config.rank, shapes)

    def skip(self, index: int, linears: Mapping[str, QuantizedLinear]) -> None:
        block, calibration = self._layout.modules[index], self._calibration
        if self._config.target == "model":
            states = calibration.reference
            self._advance(index, states, self._forwards(index, block, states, []))
        for path, quantized in linears.items():
            self._set_dense(block.get_submodule(path), quantized)
        states = calibration.hidden
        self._advance(index, states, self._forwards(index, block, states, []))

    def _quantize(
        self, index: int, prefix: str, linears: Mapping[str, nn.Module]
    ) -> dict[str, QuantizedLinear]:
        groups = self._groups(index, linears)
        reached = {path for group in groups for path in group}
        calibration, block = self._calibration, self._layout.modules[index]
        heads = [group[0] for group in groups]
        tuning = self._config.tune_epochs > 0
        references: list[Forward] = []
        originals: dict[str, torch.Tensor] = {}
        if self._config.target == "model":
            # Copied before forwards hang their hooks on the block.
            twin = copy.deepcopy(block)
            if tuning:
                originals = {
                    path: linear_weight(twin.get_submodule(path)).to(self._dtype)
                    for path in linears
                }
            references = self._forwards(index, twin, calibration.reference, heads)
        forwards = self._forwards(index, block, calibration.hidden, heads)
        waiting: list[Statistics] = []
        result: dict[str, QuantizedLinear] = {}
        try:
            for number, group in enumerate(groups):
                statistics = self._statistics(index, forwards, references, number)
                if self._config.true_sequential:
                    result.update(self._quantize_group(prefix, linears, group, statistics))
                else:
                    waiting.append(statistics)
            for group, statistics in zip(groups, waiting, strict=False):
                result.update(self._quantize_group(prefix, linears, group, statistics))
            if not self._config.true_sequential:
                # These forwards went past the linears before they were quantized.
                for forward in forwards:
                    forward.cancel()
                forwards = self._forwards(index, block, calibration.hidden, [])
            inputs = list(calibration.hidden) if tuning else []
            self._advance(index, calibration.hidden, forwards)
            if tuning or index + 1 < len(self._layout.modules):
                self._advance(index, calibration.reference, references)
            if tuning and result:
                # They are done, and hold states whose memory training has better use for.
                forwards, references = [], []
                result = self._tune(index, inputs, originals, result)
        finally:
            for forward in [*forwards, *references]:
                forward.cancel()
        for path in linears.keys() - (reached & result.keys()):
            self._report.skipped[f"{prefix}.{path}"] = "not reached by the first calibration window"
        return result

    def _tune(
        self,
        index: int,
        inputs: Sequence[torch.Tensor],
        originals: Mapping[str, torch.Tensor],
        untuned: dict[str, QuantizedLinear],
    ) -> dict[str, QuantizedLinear]:
        """What training makes of a block's linears, or the very same where that is no better. The
        hidden states have gone past the block already, and are then those past the result."""
        calibration, block = self._calibration, self._layout.modules[index]
        path = f"{self._layout.prefix}.{index}"

        def run(states: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
            dense = {
                f"{name}.weight": as_stored(block.get_submodule(name), weight)
                for name, weight in weights.items()
            }

            def bound(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(block, dense, args, kwargs)

            return hidden_states(calibration.call(index, len(states))(bound, states))

        with self._report.timing("tune"), _frozen(block):
            trained = {
                name: FakeQuantized(*item, originals[name]) for name, item in untuned.items()
            }
            finite = train_block(
                trained,
                run,
                inputs,
                calibration.reference,
                epochs=self._config.tune_epochs,
                seed=index,
            )
        before = self._block_error(calibration.hidden, calibration.reference)
        if not finite:
            self._report.blocks.append(BlockReport(path, before, None))
            return untuned
        tuned = {}
        for name, item in trained.items():
            module = block.get_submodule(name)
            with self._report.timing("tune"):
                codes, scales, zeros, g_idx, correction = item.trained()
                linear = self._quant_linear(module, codes, scales, zeros, g_idx)
                if correction is not None:
                    correction = peft.rounded(correction, peft.DTYPES[self._config.adapter_bits])
            tuned[name] = QuantizedLinear(linear, correction)
            self._set_dense(module, tuned[name])
        outputs = list(self._finish(self._forwards(index, block, inputs, [])))
        after = self._block_error(outputs, calibration.reference)
        report = BlockReport(path, before, after if math.isfinite(after) else None)
        self._report.blocks.append(report)
        if report.stayed:
            for name, quantized in untuned.items():
                self._set_dense(block.get_submodule(name), quantized)
            return untuned
        calibration.hidden[:] = outputs
        return tuned

    def _block_error(
        self, outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
    ) -> float:
        with self._report.timing("tune"):
            errors = [
                float(block_error(*pair)) * len(pair[0])
                for pair in zip(outputs, wanted, strict=True)
            ]
        return sum(errors) / sum(map(len, outputs))

    def _advance(self, index: int, hidden: list[torch.Tensor], forwards: Sequence[Forward]) -> None:
        """Replaces the hidden states before a block by those after it."""
        for number, output in enumerate(self._finish(forwards)):
            if not all_finite(output):
                raise ValueError(
                    f"quantize: {self._layout.prefix}.{index}: its output on the calibration data "
                    "holds NaN or Inf"
                )
            hidden[number] = output

    def _finish(self, forwards: Sequence[Forward]) -> Iterator[torch.Tensor]:
        for forward in forwards:
            with self._report.timing("forward"):
                output = forward.finish()
            yield output

    def _groups(self, index: int, linears: Mapping[str, nn.Module]) -> list[list[str]]:
        """Linears that read the very same tensor, in the order in which they run.

        Found anew for each block, on one window: a block that routes tokens may skip some, which
        then stay as they are.
        """
        block = self._layout.modules[index]
        calibration = self._calibration
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

    def _forwards(
        self, index: int, block: nn.Module, hidden: Sequence[torch.Tensor], heads: Sequence[str]
    ) -> list[Forward]:
        """One for each micro-batch of hidden states, stopping at the linears called `heads`."""
        calibration = self._calibration

        def runner(states: torch.Tensor) -> Callable[[], torch.Tensor]:
            call = calibration.call(index, states.shape[0])
            return lambda: hidden_states(call(block, states))

        kind = PausedForward if heads and self._can_pause(block) else RepeatedForward
        modules = [block.get_submodule(path) for path in heads]
        return [kind(runner(states), modules) for states in hidden]

    def _can_pause(self, block: nn.Module) -> bool:
        """Whether what all micro-batches keep while they sleep fits beside everything else."""
        hidden = self._calibration.hidden
        tokens = sum(batch.shape[0] * batch.shape[1] for batch in hidden)
        widest = max((linear_shape(item)[0] for item in quantizable(block).values()), default=0)
        # At attention's output: residual, input, q, k, v, result; in the MLP less of them, but two
        # of its width.
        kept = tokens * (6 * hidden[0].shape[2] + 2 * widest) * self._dtype.itemsize
        if self._config.target == "model":
            kept *= 2
        return kept <= free_memory(hidden[0].device) * _PAUSED_MEMORY_SHARE

    def _statistics(
        self, index: int, forwards: Sequence[Forward], references: Sequence[Forward], group: int
    ) -> Statistics:
        seen = 0
        hessian: torch.Tensor | None = None
        cross: torch.Tensor | None = None
        hidden = self._calibration.hidden
        # A token's row must be the same row in both models: so, where experts take only some
        # tokens, they are quantized for the inputs that they get.
        comparable = bool(references)
        for number, forward in enumerate(forwards):
            with self._report.timing("forward"):
                inputs = forward.advance(group)
                wanted = references[number].advance(group) if references else None
            if inputs is None or inputs.numel() == 0:
                comparable = False
                continue
            size = inputs.shape[-1]
            seen += inputs.numel() // size
            if hessian is None:
                hessian = inputs.new_zeros(size, size, dtype=torch.float32)
                cross = torch.zeros_like(hessian) if references else None
            with self._report.timing("hessian"):
                ops.accumulate_hessian_(hessian, inputs)
                tokens = hidden[number].shape[0] * hidden[number].shape[1]
                if wanted is None or not inputs.numel() == wanted.numel() == tokens * size:
                    comparable = False
                elif comparable:
                    ops.accumulate_cross_(cast(torch.Tensor, cross), wanted - inputs, inputs)
        if hessian is not None and not torch.isfinite(hessian.diagonal()).all():
            raise ValueError(
                f"quantize: {self._layout.prefix}.{index}: its hidden states on the calibration "
                "data hold NaN or Inf"
            )
        return Statistics(seen, hessian, cross if comparable else None)

    def _quantize_group(
        self,
        prefix: str,
        linears: Mapping[str, nn.Module],
        group: Sequence[str],
        statistics: Statistics,
    ) -> dict[str, QuantizedLinear]:
        tokens, hessian, cross = statistics
        if hessian is None:  # experts that no token was routed to
            result = {path: self._rounded(f"{prefix}.{path}", linears[path]) for path in group}
            for path, quantized in result.items():
                self._set_dense(linears[path], quantized)
            return result
        config = self._config
        modules = [linears[path] for path in group]
        weight = torch.cat([linear_weight(module) for module in modules])
        with self._report.timing("factorize"):
            factor = ops.gptq_factorize(
                hessian, percdamp=config.percdamp, act_order=config.act_order != "none"
            )
        if cross is not None:
            with self._report.timing("fit"):
                weight = fit_weight(weight, cross, factor, tokens=tokens)
        ends = list(itertools.accumulate(linear_shape(module)[1] for module in modules))
        spans = [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]
        aim: torch.Tensor = weight
        corrections: Sequence[LowRankTensors | None] = [None] * len(group)
        for _ in range(_ROUNDS if config.rank else 1):
            codes, scales, zeros, g_idx = self._round(aim, hessian, factor)
            if config.rank:
                size = config.group_size
                with self._report.timing("fit"):
                    rest = weight - dequantized(codes, scales, zeros, group_size=size, g_idx=g_idx)
                    corrections = fitted = [
                        self._fit_correction(rest[rows], factor) for rows in spans
                    ]
                    aim = weight - torch.cat([peft.product(item) for item in fitted])
        result = {}
        for path, module, rows, correction in zip(group, modules, spans, corrections, strict=True):
            with self._report.timing("quantize"):
                linear = self._quant_linear(
                    module, codes[rows], scales[:, rows], zeros[:, rows], g_idx
                )
                result[path] = QuantizedLinear(linear, correction)
                self._set_dense(module, result[path])
                error = self._relative_loss(weight[rows], linear_weight(module), hessian)
            self._add(LinearReport(f"{prefix}.{path}", error, factor.percdamp), result[path])
        return result

    def _round(
        self, weight: torch.Tensor, hessian: torch.Tensor, factor: ops.GptqFactor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Integers for a weight, and the scales that suit them; codes, scales, zeros, g_idx."""
        config = self._config
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
        with self._report.timing("fit"):
            scales = fit_scales(
                weight,
                hessian,
                codes,
                scales,
                zeros,
                group_size=config.group_size,
                g_idx=g_idx,
                percdamp=factor.percdamp,
            )
        return codes, scales, zeros, g_idx

    def _relative_loss(
        self, weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor
    ) -> float:
        # Errors of a row cancel over its columns, which bf16 would not see. Of some rows: two
        # products of the size of a weight in fp32 would be much for a report.
        some = slice(None, None, max(1, len(weight) // _REPORTED_ROWS))
        weight, quantized = weight[some].float(), quantized[some].float()

        def energy(matrix: torch.Tensor) -> float:
            return float(((matrix @ hessian) * matrix).sum())

        total = energy(weight)
        return energy(weight - quantized) / total if total else 0.0

    def _fit_correction(self, rest: torch.Tensor, factor: ops.GptqFactor) -> LowRankTensors:
        a, b = fit_low_rank(rest, factor, rank=self._config.rank)
        return peft.rounded(LowRankTensors(a, b, 1.0), peft.DTYPES[self._config.adapter_bits])

    def _set_dense(self, module: nn.Module, quantized: QuantizedLinear) -> None:
        """What the rest of the calibration sees: dequantized weights, multiplied by torch."""
        dense = quantized.linear.dequantize(self._dtype)
        if quantized.correction is not None:
            a, b = (item.to(dense.device) for item in quantized.correction[:2])
            scaling = quantized.correction.scaling
            dense = torch.addmm(dense.float(), b.float(), a.float(), alpha=scaling).to(self._dtype)
        module.weight = nn.Parameter(as_stored(module, dense).contiguous(), requires_grad=False)


def engine_for(
    config: QuantConfig,
    calibration: Calibration | None,
    layout: BlockLayout,
    dtype: torch.dtype,
    report: Report,
) -> Engine:
    """Without a calibration, round-to-nearest."""
    if calibration is None:
        return RtnEngine(config, layout, report)
    return GptqEngine(config, calibration, layout, dtype, report)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor Inf, which no sum can hide; much cheaper than isfinite."""
    return bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32)))


def check_weights(prefix: str, linears: Mapping[str, nn.Module]) -> None:
    """ValueError where a weight holds NaN or Inf."""
    for path, module in linears.items():
        if not all_finite(cast(torch.Tensor, module.weight)):
            raise ValueError(f"quantize: {prefix}.{path}.weight: holds NaN or Inf")


@contextmanager
def _frozen(block: nn.Module) -> Iterator[None]:
    """Nothing of the block itself wants a gradient meanwhile."""
    parameters = [item for item in block.parameters() if item.requires_grad]
    for item in parameters:
        item.requires_grad_(False)
    try:
        yield
    finally:
        for item in parameters:
            item.requires_grad_(True)


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr() != 0  # that of all which are empty
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )

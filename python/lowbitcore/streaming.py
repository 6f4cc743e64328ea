"""Quantizing a checkpoint with one block in memory at a time, and going on after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from lowbitcore import files
from lowbitcore.blocks import block_linears, linear_shape, quantizable
from lowbitcore.blockwise import BlockwiseModel
from lowbitcore.calibration import Calibration
from lowbitcore.engine import BlockReport, LinearReport, QuantizedLinear, Report, engine_for
from lowbitcore.formats import checkpoint, gptq, peft
from lowbitcore.formats.checkpoint import Checkpoint, Entry
from lowbitcore.formats.gguf import GgufFile
from lowbitcore.formats.gptq import GptqConfig
from lowbitcore.formats.peft import LowRankTensors
from lowbitcore.model import quantized_entries, read_quant_linear, write_model
from lowbitcore.provenance import base_hash, config_digest
from lowbitcore.quant_config import QuantConfig, package_version
from lowbitcore.quantize import calibration_for, compute_dtype, each_block
from lowbitcore.runtime import resolve_device
from lowbitcore.skeleton import find_name, kept_dtype, saved_name, tied_names
from lowbitcore.source import (
    Source,
    load_generation_config,
    load_tokenizer,
    open_source,
    tokenizer_if_any,
)

_PARTIAL, _LOCK = ".partial", "lock"


@torch.no_grad()
def quantize_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: Any,
    config: QuantConfig,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> Report:
    """Quantizes a checkpoint to a GPTQ directory with one block in memory at a time, on `device`.

    `source`: a Hugging Face directory, hub id or `.gguf` (which counts as a bf16 model);
    `calibration` as in `quantize_model`. Finished blocks go to `out/.partial`, from where
    `resume=True` goes on after a kill with a result equal to the last bit (but on a GPU not where
    blocks are tuned: gradients of torch's attention need not repeat there), or cleans up after one
    that came when all was done. Raises ValueError for bad input, an `out` that exists, and a resume
    with other settings.
    """
    device = resolve_device(device)
    opened = open_source(source)
    if opened.gptq is not None:
        raise ValueError(f"quantize_checkpoint: {source}: is quantized already")
    if isinstance(opened.weights, GgufFile) and opened.dtype == torch.float32:
        opened = opened._replace(dtype=torch.bfloat16)
    windows = calibration_for(config, calibration, lambda: load_tokenizer(source), opened.config)
    run = _StreamingRun(opened, Path(out), windows, config, device)
    with contextlib.closing(run):
        run.open(resume=resume)
        try:
            return run.quantize(progress=progress)
        except ValueError:
            run.forget_if_nothing_is_done()
            raise


def check_output(out: Path, *, resume: bool) -> None:
    """ValueError unless a quantization can write to `out`, or go on there."""
    partial = out / _PARTIAL
    if (out / "config.json").exists():
        if resume and partial.is_dir():  # killed before it had cleaned up
            return
        raise ValueError(f"quantize_checkpoint: {out}: holds a finished model already")
    if (partial / "progress.json").exists():
        if not resume:
            files.lock(partial / _LOCK).close()  # that of a living run must not be deleted
            raise ValueError(
                f"quantize_checkpoint: {out}: holds an unfinished quantization: resume it "
                f"(--resume), or delete {partial}"
            )
        return
    files.check_free(f"quantize_checkpoint: {out}", out, _PARTIAL)


class _StreamingRun:
    """One streamed quantization: its source, its `.partial` directory and its progress."""

    def __init__(
        self,
        source: Source,
        out: Path,
        windows: torch.Tensor,
        config: QuantConfig,
        device: torch.device,
    ) -> None:
        self._source, self._out, self._config = source, out, config
        self._windows, self._device = windows, device
        self._partial = out / _PARTIAL
        self._dtype = compute_dtype(source.dtype, device)
        self._parts = BlockwiseModel(source, dtype=source.dtype, device=device)
        self._model, self._layout = self._parts.model, self._parts.layout
        self._generation_config = load_generation_config(source)
        self._report = Report(tokens=windows.numel())
        self._done = 0
        self._lock_file: IO[str] | None = None

    # Progress

    def open(self, *, resume: bool) -> None:
        """Prepares `out`, or takes up what an earlier run left there."""
        check_output(self._out, resume=resume)
        self._finished = (self._out / "config.json").exists()
        progress = self._partial / "progress.json"
        if self._finished and not progress.exists():
            self._lock()
            return
        if progress.exists():
            self._lock()
            self._take_up(files.read_json(progress), progress)
            for directory in (self._out, self._out / peft.CORRECTION):
                files.remove_leftovers(directory)
            return
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._save_progress()

    def forget_if_nothing_is_done(self) -> None:
        """So that a refused setting, put right, need not be taken for a resumed run's."""
        if self._done == 0:
            shutil.rmtree(self._partial)
            if not any(self._out.iterdir()):
                self._out.rmdir()

    def _lock(self) -> None:
        """Keeps other runs out of `out` until `close`."""
        self._lock_file = files.lock(self._partial / _LOCK)

    def close(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()

    def _take_up(self, state: dict[str, Any], where: Path) -> None:
        for name, value in self._binding().items():
            found = state.get(name)
            if found != value:
                other = ""
                if isinstance(found, dict) and isinstance(value, dict):
                    keys = [key for key in value if found.get(key) != value[key]]
                    other = ": " + ", ".join(
                        f"{key} is {value[key]}, was {found.get(key)}" for key in keys
                    )
                raise ValueError(
                    f"{where}: cannot resume: the {name} differs from that of the unfinished run"
                    f"{other}"
                )
        try:
            self._done = int(state["done"])
            report = state["report"]
            self._report.linears = [LinearReport(**item) for item in report["linears"]]
            self._report.blocks = [BlockReport(**item) for item in report["blocks"]]
            self._report.skipped = dict(report["skipped"])
            self._report.seconds = dict(report["seconds"])
            self._report.bytes = dict(report["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: not a usable progress file: {error!r}") from error
        for index in range(0 if self._finished else self._done):  # now, not when others are done
            files = [self._block_file(index)]
            files += [self._correction_file(index)] if self._config.rank else []
            for path in files:
                try:
                    checkpoint.read_header(path)
                except (OSError, ValueError) as error:
                    raise ValueError(
                        f"{path}: cannot resume: expected a finished block, got {error}: delete "
                        f"{self._partial} and begin anew"
                    ) from error

    def _binding(self) -> dict[str, Any]:
        """What a resumed run has to share with the one it goes on with."""
        tokens = self._windows.contiguous().view(-1).numpy().tobytes()
        return {
            "config": self._config.to_dict(),
            "source": self._source.weights.fingerprint(),
            "architecture": config_digest(self._source.config),
            "calibration": hashlib.sha256(tokens).hexdigest() + f" {list(self._windows.shape)}",
            "version": package_version(),
            "dtype": str(self._dtype),
            "device": self._device.type,
        }

    def _save_progress(self) -> None:
        report = asdict(self._report)
        files.write_json(
            self._partial / "progress.json",
            {**self._binding(), "done": self._done, "report": report},
        )

    # Blocks

    def quantize(self, *, progress: bool) -> Report:
        if self._finished:
            shutil.rmtree(self._partial)
            return self._report
        if self._done < len(self._layout.modules):
            self._quantize_blocks(progress)
        with self._report.timing("write"):
            self._merge()
        return self._report

    def _quantize_blocks(self, progress: bool) -> None:
        calibration = None
        if self._config.method == "gptq":
            calibration = self._calibrate()
        engine = engine_for(self._config, calibration, self._layout, self._dtype, self._report)
        for index in each_block(self._layout, progress):
            if index < self._done:
                # Without calibration nothing depends on earlier blocks.
                if calibration is not None:
                    self._load_block(index)
                    engine.skip(index, self._read_done(index))
            else:
                self._load_block(index)
                linears = engine.quantize(index)
                with self._report.timing("write"):
                    self._write_corrections(index, linears)
                    self._write_block(index, linears)
                    self._done = index + 1
                    self._save_progress()
            self._parts.drop(self._parts.block_names(index))

    def _calibrate(self) -> Calibration:
        """Runs the embeddings and what else comes before the blocks, then lets go of it."""
        outer = self._parts.surrounding_names()
        with self._report.timing("load"):
            self._parts.load(outer)
        self._load_block(0)
        with self._report.timing("forward"):
            windows = self._windows.to(self._device)
            calibration = Calibration(self._model, self._layout, windows, self._dtype)
        self._parts.drop(outer)
        return calibration

    def _load_block(self, index: int) -> None:
        with self._report.timing("load"):
            self._parts.load(self._parts.block_names(index), self._dtype)

    def _block_file(self, index: int) -> Path:
        return self._partial / f"block-{index:05d}.safetensors"

    def _correction_file(self, index: int) -> Path:
        return self._partial / f"correction-{index:05d}.safetensors"

    def _write_corrections(self, index: int, linears: Mapping[str, QuantizedLinear]) -> None:
        if not self._config.rank:
            return
        entries = []
        for path, (_, correction) in linears.items():
            if correction is not None:
                entries += [
                    Entry.of(f"{path}.a", correction.a),
                    Entry.of(f"{path}.b", correction.b),
                    Entry.of(f"{path}.scaling", torch.tensor(correction.scaling)),
                ]
        checkpoint.write_safetensors(self._correction_file(index), entries)

    def _read_corrections(self, index: int) -> dict[str, LowRankTensors]:
        if not self._config.rank:
            return {}
        stored = dict(Checkpoint.from_file(self._correction_file(index)).tensors())
        paths = [name.removesuffix(".a") for name in sorted(stored) if name.endswith(".a")]
        return {
            path: LowRankTensors(
                stored[f"{path}.a"], stored[f"{path}.b"], stored[f"{path}.scaling"].item()
            )
            for path in paths
        }

    def _write_block(self, index: int, linears: Mapping[str, QuantizedLinear]) -> None:
        prefix = f"{self._layout.prefix}.{index}"
        config = self._config.gptq_config()
        entries = []
        for path, (linear, _) in linears.items():
            canonical = linear.canonical()  # unpacked once: a block fits in memory
            if "bias" in canonical:  # calibration may have widened it
                canonical["bias"] = canonical["bias"].to(self._source.dtype)
            stem = saved_name(self._model, f"{prefix}.{path}")
            entries += quantized_entries(stem, partial(dict, canonical), config)
        written = {f"{prefix}.{path}.{name}" for path in linears for name in ("weight", "bias")}
        entries += [
            self._source_entry(name)
            for name in self._parts.block_names(index)
            if name not in written
        ]
        checkpoint.write_safetensors(self._block_file(index), entries)

    def _source_entry(self, name: str) -> Entry:
        """A tensor that stays as it is in the source, read when it is written."""
        weights = self._source.weights
        found = find_name(self._model, weights, name)
        info = weights.info(found)
        dtype = info.dtype
        if dtype.is_floating_point:
            dtype = kept_dtype(self._model, name, self._source.dtype)
        saved = saved_name(self._model, name)
        return Entry(saved, dtype, info.shape, lambda: weights.tensor(found).to(dtype))

    def _read_done(self, index: int) -> dict[str, QuantizedLinear]:
        prefix = f"{self._layout.prefix}.{index}."
        weights = Checkpoint.from_file(self._block_file(index))
        block = self._layout.modules[index]
        corrections = self._read_corrections(index)
        result = {}
        for path, module in quantizable(block).items():
            stem = saved_name(self._model, prefix + path)
            if f"{stem}.qweight" not in weights:
                continue
            in_features, out_features = linear_shape(module)
            linear = read_quant_linear(
                weights,
                stem,
                self._config.gptq_config(),
                in_features=in_features,
                out_features=out_features,
                bias=module.bias is not None,
                dtype=self._dtype,
                device=self._device,
            )
            result[path] = QuantizedLinear(linear, corrections.get(path))
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
        outer = [n for n in self._parts.names if not n.startswith(blocks) and n not in ties]
        entries = [self._source_entry(name) for name in outer]
        canonical: dict[str, Callable[[], Mapping[str, torch.Tensor]]] = {}
        scales: dict[str, torch.Tensor] = {}
        paths = {saved_name(self._model, path): path for path in block_linears(self._model)}
        for index in range(len(self._layout.modules)):
            weights = Checkpoint.from_file(self._block_file(index))
            stems = [n.removesuffix(".qweight") for n in weights.names() if n.endswith(".qweight")]
            for stem in stems:
                canonical[paths[stem]] = _stored_canonical(weights, stem)
                if self._config.rank:
                    scales[paths[stem]] = weights.tensor(f"{stem}.scales")
            entries += [_stored_entry(weights, name, config) for name in weights.names()]
        base = base_hash(canonical)
        config = replace(
            config,
            meta={**config.meta, "base_sha256": base},
            excluded=gptq.exclusions(
                self._layout.prefix, len(self._layout.modules), self._report.skipped
            ),
        )
        self._merge_corrections(base, scales)
        write_model(
            self._out,
            entries,
            model_config=self._model.config,
            gptq_config=config,
            generation_config=self._generation_config,
            tokenizer=tokenizer_if_any(self._source.path),
        )
        shutil.rmtree(self._partial)

    def _merge_corrections(self, base: str, scales: Mapping[str, torch.Tensor]) -> None:
        """Makes one adapter of all blocks' corrections, for these scales."""
        corrections = {
            f"{self._layout.prefix}.{index}.{path}": correction
            for index in range(len(self._layout.modules))
            for path, correction in self._read_corrections(index).items()
        }
        if corrections:
            peft.write(
                self._out / peft.CORRECTION,
                corrections,
                dropout=0.0,
                base_model=None,
                metadata={
                    "base_sha256": base,
                    "scales_below_sha256": checkpoint.digest(scales),
                },
            )


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

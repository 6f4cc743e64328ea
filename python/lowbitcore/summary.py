"""What a checkpoint holds, read from its headers alone."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from lowbitcore.formats import peft
from lowbitcore.formats import scales as scales_file
from lowbitcore.formats.gguf import GgufFile
from lowbitcore.formats.gptq import SUFFIXES, GptqConfig
from lowbitcore.provenance import check_base
from lowbitcore.source import open_source


class Summary(NamedTuple):
    """Sizes in bytes of tensors as stored. ``effective_bits`` is that of the quantized linears, all
    counted: integers, scales, zeros, g_idx; of the stored weights if nothing is quantized.
    ``in_features`` are the numbers of inputs that quantized linears have, ``experts`` the names of
    those of each expert."""

    architecture: str
    dtype: str
    parameters: int
    total_bytes: int
    quantized_linears: int
    quantized_weights: int
    quantized_bytes: int
    in_features: tuple[int, ...]
    experts: tuple[str, ...]
    effective_bits: float
    scales: int
    gptq: GptqConfig | None


def adapter_bytes(directory: str | os.PathLike[str], summary: Summary) -> int:
    """Bytes of a LoRA adapter's tensors, as stored; scales replace scales and add nothing.

    Raises ValueError where there is no adapter, or one of another base than the summarized one.
    """
    path = Path(directory)
    if (path / peft.CONFIG_FILE).is_file() or not (path / scales_file.FILE).is_file():
        base = peft.read(path).metadata.get("base_sha256")
        size = peft.stored_bytes(path)
    else:
        base = scales_file.read(path / scales_file.FILE).base_sha256
        size = 0
    own = summary.gptq.meta.get("base_sha256") if summary.gptq else None
    if base is not None and own is not None:  # other programs' files do not say
        check_base(base, own, path)
    return size


def _of_an_expert(name: str) -> bool:
    return re.search(r"\.experts\.\d+\.", name) is not None


def summarize(path: str | os.PathLike[str]) -> Summary:
    """Summarize a model directory, hub id or ``.gguf`` file.

    Raises:
        ValueError: there is no causal language model.
    """
    source = open_source(path)
    weights = source.weights
    names = weights.names()
    sizes = {name: weights.info(name).nbytes for name in names}
    counts = {name: math.prod(weights.info(name).shape) for name in names}
    total = sum(sizes.values())
    if isinstance(weights, GgufFile):
        total = source.path.stat().st_size
    parameters = sum(counts.values())
    stems = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
    packed = quantized = scales = 0
    inputs: set[int] = set()
    if source.gptq is not None:
        for stem in stems:
            own = [f"{stem}.{suffix}" for suffix in SUFFIXES if f"{stem}.{suffix}" in weights]
            packed += sum(sizes[name] for name in own)
            inputs.add(weights.info(f"{stem}.qweight").shape[0] * 32 // source.gptq.bits)
            quantized += counts[f"{stem}.qweight"] * 32 // source.gptq.bits
            scales += counts[f"{stem}.scales"]
            parameters -= sum(counts[name] for name in own)
        parameters += quantized
    effective = packed * 8 / quantized if quantized else total * 8 / parameters
    return Summary(
        architecture=source.config.architectures[0],
        dtype=str(source.dtype).removeprefix("torch."),
        parameters=parameters,
        total_bytes=total,
        quantized_linears=len(stems),
        quantized_weights=quantized,
        quantized_bytes=packed,
        in_features=tuple(sorted(inputs)),
        experts=tuple(sorted({name.rpartition(".")[2] for name in stems if _of_an_expert(name)})),
        effective_bits=effective,
        scales=scales,
        gptq=source.gptq,
    )

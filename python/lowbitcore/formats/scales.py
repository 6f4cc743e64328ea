"""Scales files: what PEQA (2305.14152) trains, apart from the integers that all tasks share.

`scales.safetensors` holds `<path>.scales` float32 [G, N] for every packed linear, and in its
metadata `bits`, `group_size` and `base_sha256`, the hash of the integers they belong to; of those
that were trained on top of adapters `below_sha256`, the digests of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from lowbitcore.formats import checkpoint
from lowbitcore.formats.checkpoint import Checkpoint, Entry

FILE = "scales.safetensors"


class Scales(NamedTuple):
    """`with_adapter`: they were trained together with an adapter, which should lie beside them."""

    linears: dict[str, torch.Tensor]
    base_sha256: str
    with_adapter: bool
    below_sha256: str | None


def write(
    directory: Path,
    linears: Mapping[str, torch.Tensor],
    *,
    bits: int,
    group_size: int,
    base_sha256: str,
    with_adapter: bool = False,
    below_sha256: str | None = None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"bits": str(bits), "group_size": str(group_size), "base_sha256": base_sha256}
    if with_adapter:
        metadata["with_adapter"] = "true"
    if below_sha256 is not None:
        metadata["below_sha256"] = below_sha256
    entries = [Entry.of(f"{path}.scales", tensor) for path, tensor in linears.items()]
    checkpoint.write_safetensors(directory / FILE, entries, metadata)


def read(path: Path) -> Scales:
    """Reads a scales file; ValueError where it is none, or a scale is not a finite number or too
    large for a GPTQ checkpoint. Training does not constrain signs: negative ones and 0 are fine.
    """
    weights = Checkpoint.from_file(path)
    metadata = weights.metadata()
    base = metadata.get("base_sha256")
    if base is None:
        raise ValueError(f"{path}: expected base_sha256 in its metadata, got none")
    linears = {}
    for name, tensor in weights.tensors():
        if not name.endswith(".scales") or tensor.dtype != torch.float32 or tensor.dim() != 2:
            raise ValueError(
                f"{path}: expected float32 matrices called .scales, got {name!r}, {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name}: holds NaN or Inf")
        if not torch.isfinite(tensor.half()).all():
            worst = float(tensor.abs().max())
            raise ValueError(f"{path}: {name}: expected values within fp16 (65504), got {worst:g}")
        linears[name.removesuffix(".scales")] = tensor
    with_adapter = metadata.get("with_adapter") == "true"
    return Scales(linears, base, with_adapter, metadata.get("below_sha256"))

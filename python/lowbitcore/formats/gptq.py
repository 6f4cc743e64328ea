"""GPTQ files: packed zeros and their two conventions, configurations, and who can load them.

`gptq_v2` stores the zero point z; `gptq` (v1) stores z - 1. GPTQModel subtracts and adds the ones
of 2, 4 and 8 bits as one whole 32-bit word, so that a field with z = 0 borrows from its neighbour;
AutoGPTQ and others go field by field, and so does everybody at 3 bits. Where no z is 0 all agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lowbitcore import ops

V1: Literal["gptq"] = "gptq"
V2: Literal["gptq_v2"] = "gptq_v2"
BITS = (2, 3, 4, 8)
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class GptqConfig:
    """What `quantization_config` of a GPTQ checkpoint says.

    `checkpoint_format` is how zeros are stored; `quantizers` are the programs named in
    `meta.quantizer`, lower case, without versions; `excluded` are GPTQModel's `-:` patterns.
    """

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    checkpoint_format: Literal["gptq", "gptq_v2"] = V2
    meta: Mapping[str, Any] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()

    @property
    def quantizers(self) -> tuple[str, ...]:
        value = self.meta.get("quantizer", [])
        values = value if isinstance(value, list) else [value]
        return tuple(str(item).split(":")[0].strip().lower() for item in values)

    @property
    def whole_word_zeros(self) -> bool:
        """Whether v1 zeros were made by GPTQModel's arithmetic on whole words."""
        return "gptqmodel" in self.quantizers and self.bits in _ONES

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for `config.json:quantization_config` and `quantize_config.json`."""
        out: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
            "lm_head": False,
            "meta": dict(self.meta),
        }
        if self.excluded:
            out["dynamic"] = {f"-:{pattern}": {} for pattern in self.excluded}
        return out

    @staticmethod
    def from_dict(value: Any, *, where: str = "quantization_config") -> GptqConfig:
        """Parses and checks; ValueError names the field, what was expected and what came."""
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {type(value).__name__}")

        def bad(name: str, expected: str) -> ValueError:
            return ValueError(f"{where}: {name}: expected {expected}, got {value.get(name)!r}")

        if value.get("quant_method", value.get("method", "gptq")) != "gptq":
            raise bad("quant_method", "'gptq'")
        if type(value.get("bits")) is not int or value["bits"] not in BITS:
            raise bad("bits", "2, 3, 4 or 8")
        group_size = value.get("group_size")
        if type(group_size) is not int or not (
            group_size == -1 or (group_size > 0 and group_size % 32 == 0)
        ):
            raise bad("group_size", "-1 or a multiple of 32")
        for name in ("desc_act", "sym", "lm_head"):
            if not isinstance(value.get(name, False), bool):
                raise bad(name, "true or false")
        if value.get("lm_head", False):
            raise bad("lm_head", "false (a quantized lm_head is not supported)")
        # GPTQModel and transformers write `format` too; `checkpoint_format` wins, as it does there.
        format_name = "checkpoint_format" if "checkpoint_format" in value else "format"
        checkpoint_format = value.get(format_name, V1)
        if checkpoint_format not in (V1, V2):
            raise bad(format_name, "'gptq' or 'gptq_v2'")
        if value.get("is_marlin_format"):
            raise bad("is_marlin_format", "false")
        if str(value.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
            raise bad("pack_dtype", "'int32'")
        meta = value.get("meta") or {}
        if not isinstance(meta, dict):
            raise bad("meta", "an object")
        return GptqConfig(
            bits=value["bits"],
            group_size=group_size,
            desc_act=value.get("desc_act", False),
            sym=value.get("sym", True),
            checkpoint_format=checkpoint_format,
            meta=meta,
            excluded=_parse_dynamic(value, where),
        )


def _parse_dynamic(value: dict[str, Any], where: str) -> tuple[str, ...]:
    """GPTQModel's per-module rules: exclusions are kept, overrides must change nothing."""
    dynamic = value.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ValueError(f"{where}: dynamic: expected an object, got {type(dynamic).__name__}")
    excluded = []
    for pattern, override in dynamic.items():
        if pattern.startswith("-:"):
            excluded.append(pattern[2:])
            continue
        for name in ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "format"):
            wanted = value.get(name)
            if isinstance(override, dict) and override.get(name, wanted) != wanted:
                raise ValueError(
                    f"{where}: dynamic: {pattern!r} sets {name} to {override[name]!r} instead of "
                    f"{wanted!r}; per-module widths are not supported"
                )
    return tuple(excluded)


def exclusions(prefix: str, blocks: int, kept: Iterable[str]) -> tuple[str, ...]:
    """GPTQModel's patterns for those linears of a model's blocks that stay in 16 bits, by their
    paths. It looks for the integers of all others."""
    found: dict[str, list[str]] = {}
    for path in kept:
        index, _, inside = path.removeprefix(f"{prefix}.").partition(".")
        found.setdefault(inside, []).append(index)
    patterns = []
    for inside, indices in found.items():
        which = r"\d+" if len(indices) == blocks else f"({'|'.join(indices)})"
        patterns.append(rf"{re.escape(prefix)}\.{which}\.{re.escape(inside)}$")
    return tuple(patterns)


def v1_to_v2(qzeros: torch.Tensor, *, bits: int, whole_word: bool) -> torch.Tensor:
    """v1 zeros (z - 1) [G, N*bits/32] int32 to v2 (z); `whole_word` is GPTQModel's arithmetic."""
    return _shift_zeros(qzeros, 1, bits=bits, whole_word=whole_word)


def v2_to_v1(qzeros: torch.Tensor, *, bits: int) -> torch.Tensor:
    """v2 zeros (z) [G, N*bits/32] int32 to v1 (z - 1), which has to be free of z = 0.

    Raises ValueError where a z is 0: such a file means different weights to different readers.
    """
    if has_zero(qzeros, bits=bits):
        raise ValueError("v2_to_v1: qzeros: expected every zero point to be at least 1, got a 0")
    return _shift_zeros(qzeros, -1, bits=bits, whole_word=False)


def has_zero(qzeros: torch.Tensor, *, bits: int) -> bool:
    """Whether any zero point of v2 zeros [G, N*bits/32] is 0."""
    return bool((ops.unpack_qzeros(qzeros, bits=bits) == 0).any())


def _shift_zeros(qzeros: torch.Tensor, amount: int, *, bits: int, whole_word: bool) -> torch.Tensor:
    if whole_word and bits in _ONES:
        # The cast back to int32 wraps as GPTQModel's int32 addition does.
        return (qzeros.to(torch.int64) + amount * _ONES[bits]).to(torch.int32)
    fields = ops.unpack_qzeros(qzeros, bits=bits).to(torch.int16)
    shifted = (fields + amount).bitwise_and(2**bits - 1).to(torch.uint8)
    return ops.pack_qzeros(shifted, bits=bits)


def with_v2_zeros(
    tensors: Mapping[str, torch.Tensor], config: GptqConfig
) -> dict[str, torch.Tensor]:
    """One linear's tensors with v2 zeros. What is no matrix of zeros stays for who takes it to
    refuse."""
    zeros = tensors["qzeros"]
    if config.checkpoint_format == V1 and zeros.dtype == torch.int32 and zeros.dim() == 2:
        zeros = v1_to_v2(zeros, bits=config.bits, whole_word=config.whole_word_zeros)
    return {**tensors, "qzeros": zeros}


def half_scales(scales: torch.Tensor, *, where: str) -> torch.Tensor:
    """fp32 scales [G,N] as fp16; ValueError where fp16 cannot hold one.

    One that training brought next to nothing becomes 0 if that is less than what fp16 rounds off
    the largest.
    """
    half = scales.to(torch.float16)
    largest = float(scales.abs().max())
    if not torch.isfinite(half).all():
        raise ValueError(f"{where}.scales: expected values within fp16 (65504), got {largest:g}")
    lost = scales[(half == 0) & (scales != 0)].abs()
    if (lost > 2**-12 * largest).any():
        least = float(lost.max())
        raise ValueError(f"{where}.scales: expected 0 or values within fp16 (6e-8), got {least:g}")
    return half


def choose_format(*, sym: bool, any_zero: bool) -> Literal["gptq", "gptq_v2"]:
    """v1 only where every reader agrees on it.

    A z of 0 means different things to different readers of v1, and GPTQModel refuses asymmetric
    v1 files that it did not write itself (7.7: `models/loader.py`), so both go out as v2.
    """
    return V1 if sym and not any_zero else V2


@dataclass(frozen=True)
class Loader:
    """A program, and why it cannot load a checkpoint, if so."""

    name: str
    reason: str = ""


def compatible_loaders(
    config: GptqConfig, in_features: Iterable[int] = (), experts: Iterable[str] = ()
) -> list[Loader]:
    """Who can load a file with this configuration, whose linears have so many inputs, and whose
    experts' linears are called so (rules of GPTQModel 7.7, vLLM 0.33)."""
    gptqmodel: list[str] = []
    if config.group_size not in (-1, 16, 32, 64, 128, 256, 512, 1024):
        gptqmodel.append(f"group_size {config.group_size} (only -1 and powers of 2 to 1024)")
    if config.checkpoint_format == V1 and not config.sym and "gptqmodel" not in config.quantizers:
        gptqmodel.append("asymmetric in format gptq (v1) and not written by gptqmodel")
    transformers = list(gptqmodel)
    if experts:  # seen with 5.24: it fills them at random, and warns
        transformers.append("experts one by one (it stacks them)")
    if others := sorted(set(experts) - {"gate_proj", "up_proj", "down_proj"}):
        gptqmodel.append(f"experts' linears called {', '.join(others)} (only gate_proj and so on)")
    vllm: list[str] = []
    if config.bits not in (4, 8):
        vllm.append(f"{config.bits} bits (only 4 and 8)")
    if not config.sym:
        vllm.append("asymmetric (only symmetric)")
    if config.desc_act and config.group_size != -1:
        vllm.append("desc_act with groups (only without, or group_size -1)")
    if config.excluded:
        vllm.append("linears in 16 bits (it fuses some, under other names)")
    if config.group_size not in (-1, 32, 64, 128):
        vllm.append(f"group_size {config.group_size} (only -1, 32, 64, 128)")
    short = [k for k in in_features if config.group_size > 0 and k % config.group_size]
    if short:
        vllm.append(
            f"a last group that is short ({short[0]} inputs, groups of {config.group_size})"
        )
    return [
        Loader("lowbitcore"),
        Loader("GPTQModel", "; ".join(gptqmodel)),
        Loader("transformers (optimum + gptqmodel)", "; ".join(transformers)),
        Loader("vLLM", "; ".join(vllm)),
    ]

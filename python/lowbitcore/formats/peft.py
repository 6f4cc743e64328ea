"""PEFT's files of a LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.<path>.lora_A.weight` [r, K] and `.lora_B.weight` [N, r], of 8 (E4M3),
16 or 32 bits.
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowbitcore import files
from lowbitcore.formats import checkpoint
from lowbitcore.formats.checkpoint import Checkpoint, Entry

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Where beside a quantized model the adapter lies that was fitted along with its integers.
CORRECTION = "correction"

# Of an adapter's matrices, by their bits in a file.
DTYPES = {8: torch.float8_e4m3fn, 16: torch.float16}
# What files may hold; training keeps its checkpoints in the first.
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)

_PREFIX = "base_model.model."
# What would change the product and is not done here.
_UNSUPPORTED = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": ([], None),
    "lora_bias": (False, None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "velora_config": (None,),
    "arrow_config": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    # With other starts (PiSSA, OLoRA, CorDA, LoftQ, ...) PEFT takes the start out of the base.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


class LowRankTensors(NamedTuple):
    """One linear's adapter: ``scaling * b a x`` with a [r, K], b [N, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def product(item: LowRankTensors) -> torch.Tensor:
    """What the adapter adds to a weight: float32 [N, K]."""
    return item.scaling * (item.b.float() @ item.a.float())


def rounded(item: LowRankTensors, dtype: torch.dtype) -> LowRankTensors:
    """The same adapter in the type of a file; rounding once more changes nothing.

    E4M3 has four bits of precision over fifteen octaves. Matrices go to the upper end of these by
    powers of two, which the scaling takes back (`settled` undoes it), so that next to nothing is
    lost below.
    """
    if dtype != torch.float8_e4m3fn:
        return LowRankTensors(item.a.to(dtype), item.b.to(dtype), item.scaling)
    up_a, up_b = _octaves_below(item.a, dtype), _octaves_below(item.b, dtype)
    a, b = (torch.ldexp(x.float(), up).to(dtype) for x, up in ((item.a, up_a), (item.b, up_b)))
    return LowRankTensors(a, b, item.scaling * 2.0 ** -int(up_a + up_b))


def settled(item: LowRankTensors) -> LowRankTensors:
    """The same adapter in float32, with matrices of such sizes as rates of learning are made for:
    what `rounded` moved into the scaling goes back into both, and makes them about equally long."""
    a, b, scaling = item.a.detach().float(), item.b.detach().float(), item.scaling
    if item.a.dtype == torch.float8_e4m3fn and scaling > 0:
        octaves = math.frexp(scaling)[1] - 1
        if a.any() and b.any():
            down_a = round((octaves + math.log2(float(b.norm() / a.norm()))) / 2)
        else:  # one was never moved, or there is nothing at all
            down_a = octaves if a.any() else 0
        a, b = a * 2.0**down_a, b * 2.0 ** (octaves - down_a)
        scaling *= 2.0**-octaves
    return LowRankTensors(a, b, scaling)


def _octaves_below(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By how many octaves the largest element can grow at least."""
    largest = matrix.float().abs().amax().double()
    room = torch.floor(torch.log2(torch.finfo(dtype).max / largest))
    return torch.where(torch.isfinite(room), room, 0.0).int()


class PeftAdapter(NamedTuple):
    """`metadata` is what the writer said of the model it was trained on."""

    linears: dict[str, LowRankTensors]
    dropout: float
    metadata: dict[str, str]


def write(
    directory: Path,
    linears: Mapping[str, LowRankTensors],
    *,
    dropout: float,
    base_model: str | None,
    metadata: Mapping[str, str],
) -> None:
    """Writes an adapter; the config comes last, so nothing half-written loads."""
    directory.mkdir(parents=True, exist_ok=True)
    ranks = {path: item.a.shape[0] for path, item in linears.items()}
    alphas = {path: item.scaling * item.a.shape[0] for path, item in linears.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": dropout,
        # Whole paths: last parts alone could name linears outside, such as a second `proj`.
        "target_modules": sorted(linears),
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: _number(a) for path, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    entries = []
    for path, item in linears.items():
        entries.append(Entry.of(f"{_PREFIX}{path}.lora_A.weight", item.a))
        entries.append(Entry.of(f"{_PREFIX}{path}.lora_B.weight", item.b))
    checkpoint.write_safetensors(directory / WEIGHTS_FILE, entries, metadata)
    files.write_json(directory / CONFIG_FILE, config)


def _number(value: float) -> float | int:
    """An integer where it is one: PEFT's files have them so."""
    return int(value) if float(value).is_integer() else value


def read(directory: Path) -> PeftAdapter:
    """Reads an adapter; ValueError where it is none, or is of a kind not known here."""
    path = directory / CONFIG_FILE
    config = files.read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: expected LORA, got {config.get('peft_type')!r}")
    for name, allowed in _UNSUPPORTED.items():
        if config.get(name) not in allowed:
            raise ValueError(f"{path}: {name}: expected {allowed[0]!r}, got {config[name]!r}")
    weights = Checkpoint.from_file(directory / WEIGHTS_FILE)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.tensors():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise ValueError(f"{weights.files[0]}: expected LoRA matrices, got tensor {name!r}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{weights.files[0]}: {name}: expected floating point")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    linears = {}
    for module, pair in pairs.items():
        where = f"{weights.files[0]}: {module}"
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{where}: expected lora_A and lora_B, got lora_{next(iter(pair))}")
        a, b = pair["A"], pair["B"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.numel():
            raise ValueError(
                f"{where}: expected [r, K] and [N, r], got {list(a.shape)} and {list(b.shape)}"
            )
        if not (torch.isfinite(a.float()).all() and torch.isfinite(b.float()).all()):
            raise ValueError(f"{where}: holds NaN or Inf")
        rank = _for_module(config, "r", "rank_pattern", module, path)
        if rank != a.shape[0]:
            raise ValueError(f"{where}: expected rank {rank}, as {path} says, got {a.shape[0]}")
        alpha = _for_module(config, "lora_alpha", "alpha_pattern", module, path)
        scaling = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        linears[module] = settled(LowRankTensors(a, b, scaling))
    if not linears:
        raise ValueError(f"{weights.files[0]}: holds no adapter")
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: lora_dropout: expected 0 or more and below 1, got {dropout!r}")
    return PeftAdapter(linears, float(dropout), weights.metadata())


def _for_module(
    config: Mapping[str, Any], name: str, pattern_name: str, module: str, where: Path
) -> float:
    """A setting of one linear: what a pattern says of it, or what holds for all."""
    value = config.get(name, 8)  # PEFT's default for both
    patterns = config.get(pattern_name) or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{where}: {name}: expected patterns by name, got {patterns!r}")
    for pattern, special in patterns.items():
        # PEFT's rule: a pattern matches a whole path or its end.
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise ValueError(f"{where}: {pattern_name}: {pattern!r}: {error}") from error
        if matches:
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {name}: expected a number, got {value!r}")
    return value


def find_correction(model: str | os.PathLike[str]) -> Path | None:
    """The adapter beside a quantized model that was fitted along with its integers, if any."""
    directory = Path(model) / CORRECTION
    return directory if (directory / CONFIG_FILE).is_file() else None


def stored_bytes(directory: Path) -> int:
    """Bytes of an adapter's tensors in its file."""
    weights = Checkpoint.from_file(directory / WEIGHTS_FILE)
    return sum(weights.info(name).nbytes for name in weights.names())

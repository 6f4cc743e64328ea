"""Which file belongs to which: hashes of integers, scales, adapters, weights and configs.

Scales and adapters know by `base_hash` the integers that they were trained on, and by
`adapters_digests` and `scales_digest` what lay between; a training that is resumed, by `identity`,
all that it goes on from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lowbitcore.blocks import adapter_stacks, plain_tensors, quantized_linears, without_adapters
from lowbitcore.formats import checkpoint, peft
from lowbitcore.formats.peft import LowRankTensors
from lowbitcore.nn import LowRank


def base_hash(canonical: Mapping[str, Callable[[], Mapping[str, torch.Tensor]]]) -> str:
    """SHA-256 over qweight, qzeros (v2) and g_idx of all linears in sorted order of path."""
    digest = hashlib.sha256()
    for path in sorted(canonical):
        tensors = canonical[path]()
        for name in ("qweight", "qzeros", "g_idx"):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Of which integers of each linear a model's hash is known.
_HASHES: WeakKeyDictionary[PreTrainedModel, tuple[dict[str, object], str]] = WeakKeyDictionary()


def packed_hash(model: PreTrainedModel) -> str | None:
    """The base_hash of a model, computed once for the integers that it has; None if nothing is
    packed."""
    with without_adapters(model):
        linears = quantized_linears(model)
    if not linears:
        return None
    integers = {path: linear.integers for path, linear in linears.items()}
    known = _HASHES.get(model)
    if known is None or known[0] != integers:
        known = integers, base_hash({path: x.canonical for path, x in linears.items()})
        _HASHES[model] = known
    return known[1]


def note_packed_hash(model: PreTrainedModel, base: str) -> None:
    """Of a model that was read from a file which says so."""
    integers = {path: linear.integers for path, linear in quantized_linears(model).items()}
    _HASHES[model] = integers, base


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and some 4,096 values of each tensor of a state_dict."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 4096)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_digest(config: PretrainedConfig) -> str:
    """SHA-256 over what a config says of a model, but for its name, its types and how it is
    quantized."""
    settings = config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "quantization_config"):
        settings.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def check_base(base: str, own: str | None, where: object) -> None:
    """ValueError where `base`, the hash that a file was made for, is not the model's own."""
    if base != own:
        raise ValueError(f"{where}: belongs to another base: its integers are not this model's")


def adapters_digest(
    stacks: Mapping[str, Sequence[LowRank | LowRankTensors]], dtype: torch.dtype
) -> str:
    """SHA-256 of adapters as they are read back from files of that type; of their matrices alone,
    as a file's alpha may give their scaling back with its last bit changed."""
    matrices = {}
    for path, stack in stacks.items():
        for i, x in enumerate(stack):
            stored = peft.rounded(LowRankTensors(x.a, x.b, x.scaling), dtype)
            matrices[f"{path}.{i}.a"], matrices[f"{path}.{i}.b"], _ = peft.settled(stored)
    return checkpoint.digest(matrices)


def adapters_digests(stacks: Mapping[str, Sequence[LowRank | LowRankTensors]]) -> str:
    """Of adapters as files of each type hold them: in this process they may be the masters of one
    of fewer bits."""
    return " ".join(adapters_digest(stacks, item) for item in peft.STORED_DTYPES)


def digests_on(model: PreTrainedModel) -> Iterator[tuple[set[str], frozenset[str]]]:
    """Of each adapter on a model: by which digests it or its parts may be known, and those of the
    adapters from which its training started."""
    groups: dict[int, dict[str, list[LowRank]]] = {}
    for path, stack in adapter_stacks(model).items():
        for adapter in stack:
            groups.setdefault(adapter.order, {})[path] = [adapter]
    for group in groups.values():
        first = next(iter(group.values()))[0]
        yield {*adapters_digests(group).split(), *first.parts}, first.starts


def scales_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the scales in use as a GPTQ checkpoint stores them: a model that was written with
    them has the same."""
    with without_adapters(model):
        linears = quantized_linears(model)
    return checkpoint.digest({path: x.scales.detach().half() for path, x in linears.items()})


def note_scales(model: PreTrainedModel) -> None:
    """Before scales change: adapters, but those that train along, keep the digest of their own."""
    left = [
        adapter
        for stack in adapter_stacks(model).values()
        for adapter in stack
        if adapter.upon is None and not (adapter.with_scales and adapter.a.requires_grad)
    ]
    digest = scales_digest(model) if left else None
    for adapter in left:
        adapter.upon = digest


def identity(model: PreTrainedModel) -> dict[str, str | None]:
    """Digests of a model, its scales and its adapters: what a training goes on from."""
    base = packed_hash(model)
    with without_adapters(model):
        rest = fingerprint(plain_tensors(model).items())
    return {
        "model": rest if base is None else f"{base} {rest}",
        "config": config_digest(model.config),
        "scales": scales_digest(model),
        "adapters": adapters_digest(adapter_stacks(model), torch.float32),
    }

"""What training leaves behind, on a model and on disk: LoRA adapters and scales."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lowbitcore import run_directory
from lowbitcore.blocks import (
    adapted_linears,
    adapter_stacks,
    block_linears,
    linear_features,
    quantized_linears,
    without_adapters,
)
from lowbitcore.checks import check_kind, check_path
from lowbitcore.formats import checkpoint, peft, scales
from lowbitcore.formats.checkpoint import Checkpoint
from lowbitcore.formats.peft import LowRankTensors
from lowbitcore.lora import add_adapter, newest_adapters, next_order
from lowbitcore.nn import LowRank, QuantLinear
from lowbitcore.peqa import prepare_peqa, thaw_scales
from lowbitcore.provenance import (
    adapters_digest,
    adapters_digests,
    check_base,
    digests_on,
    note_scales,
    packed_hash,
    scales_digest,
)

# What an adapter's metadata calls the digest of the scales that were trained with it, or of those
# that it was trained upon (or put upon it since), the digests of adapters that it was trained upon,
# those of adapters from which its training started, and those of what was folded into it.
_SCALES, _SCALES_BELOW = "scales_sha256", "scales_below_sha256"
_BELOW, _START, _PARTS = "below_sha256", "start_sha256", "folded_sha256"


def save_adapter(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes what trains: scales, a LoRA adapter in PEFT's format, or both; where nothing does, the
    newest adapter or, without one, the scales.

    An adapter that was trained together with scales goes with them: it is written with them, and
    its metadata has their digest. What was trained upon other scales or adapters says which, and
    loads on these alone. `dtype` is that of a LoRA
    adapter's file: float32, bfloat16, float16 or float8_e4m3fn; scales are float32 always. Raises
    ValueError where the model has neither adapters nor packed linears, where `dtype` cannot hold an
    adapter, and where `out` would then hold an adapter and scales that do not belong together.
    """
    check_kind("save_adapter: model", model, PreTrainedModel)
    check_path("save_adapter: out", out)
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"save_adapter: out: expected a directory, got the file {out}")
    if dtype not in peft.STORED_DTYPES:
        names = ", ".join(str(item).removeprefix("torch.") for item in peft.STORED_DTYPES)
        raise ValueError(f"save_adapter: dtype: expected one of {names}, got {dtype}")
    adapted, packed = bool(adapted_linears(model)), bool(quantized_linears(model))
    if not adapted and not packed:
        raise ValueError("save_adapter: model: expected adapters or packed linears, got neither")
    scales_train = trains_scales(model)
    if adapted and (trains_adapter(model) or not scales_train):
        _save_lora(model, Path(out), dtype, with_scales=scales_train)
    else:
        save_scales(model, out)


def trains_scales(model: PreTrainedModel) -> bool:
    """Whether scales train; there may be adapters all the same, which do or do not."""
    return any(linear.scales.requires_grad for linear in quantized_linears(model).values())


def trains_adapter(model: PreTrainedModel) -> bool:
    return any(adapter.a.requires_grad for adapter in newest_adapters(model).values())


def round_adapter(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds the newest adapter to what a file of that type will hold."""
    with torch.no_grad():
        for adapter in newest_adapters(model).values():
            item = peft.rounded(LowRankTensors(adapter.a, adapter.b, adapter.scaling), dtype)
            adapter.a.copy_(item.a)
            adapter.b.copy_(item.b)
            adapter.scaling = item.scaling


def round_scales(model: PreTrainedModel) -> None:
    """Gives scales the values that they have in a GPTQ checkpoint, of fp16: a model saved with them
    computes the same. What fp16 cannot hold stays, for `save` to refuse."""
    for linear in _packed(model, "round_scales").values():
        rounded = linear.scales.detach().half().float()
        linear.scales.data = torch.where(rounded.isfinite(), rounded, linear.scales.detach())


def _save_lora(model: PreTrainedModel, out: Path, dtype: torch.dtype, *, with_scales: bool) -> None:
    adapters = newest_adapters(model)
    tensors = {
        path: peft.rounded(LowRankTensors(x.a.detach(), x.b.detach(), x.scaling), dtype)
        for path, x in adapters.items()
    }
    for path, item in tensors.items() if dtype != torch.float32 else ():
        if not (torch.isfinite(item.a.float()).all() and torch.isfinite(item.b.float()).all()):
            raise ValueError(f"save_adapter: {path}: expected values that fit {dtype}")
    with_scales = with_scales or any(item.with_scales for item in adapters.values())
    if not with_scales and (out / scales.FILE).exists():
        raise ValueError(
            f"save_adapter: {out}: expected no {scales.FILE}, which would not be loaded with the "
            "adapter, got one"
        )
    base = packed_hash(model)
    metadata = {} if base is None else {"base_sha256": base}
    below = {
        path: [x for x in stack if x is not adapters.get(path)]
        for path, stack in adapter_stacks(model).items()
    }
    if any(below.values()):
        metadata[_BELOW] = adapters_digests(below)
    if starts := frozenset().union(*(x.starts for x in adapters.values())):
        metadata[_START] = " ".join(sorted(starts))
    if parts := frozenset().union(*(x.parts for x in adapters.values())):
        metadata[_PARTS] = " ".join(sorted(parts))
    if with_scales:
        _write_scales(model, out, "save_adapter", with_adapter=True)
        metadata[_SCALES] = checkpoint.digest(_own_scales(_packed(model, "save_adapter")))
    elif base is not None:
        upon, current = next(iter(adapters.values())).upon, scales_digest(model)
        # Those in use were trained upon it: a model that was saved with them wants it, too.
        known = [] if upon is None else upon.split()
        metadata[_SCALES_BELOW] = " ".join(dict.fromkeys([*known, current]))
    peft.write(
        out,
        tensors,
        dropout=next(iter(adapters.values())).dropout.p,
        base_model=getattr(model.config, "name_or_path", None) or None,
        metadata=metadata,
    )


def save_scales(model: PreTrainedModel, out: str | os.PathLike[str]) -> None:
    """Writes `scales.safetensors`: one task's scales, without the integers."""
    out = Path(out)
    if (out / peft.CONFIG_FILE).exists():
        raise ValueError(
            f"save_scales: {out}: expected no {peft.CONFIG_FILE}, whose adapter would be loaded "
            "without the scales or refused with them, got one"
        )
    _write_scales(model, out, "save_scales", with_adapter=False)


def _write_scales(model: PreTrainedModel, out: Path, where: str, *, with_adapter: bool) -> None:
    linears = _packed(model, where)
    config = model.config.quantization_config
    scales.write(
        out,
        _own_scales(linears),
        bits=config["bits"],
        group_size=config["group_size"],
        base_sha256=str(packed_hash(model)),
        with_adapter=with_adapter,
        below_sha256=None
        if with_adapter or not adapted_linears(model)
        else adapters_digests(adapter_stacks(model)),
    )


def load_adapter(
    model: PreTrainedModel, path: str | os.PathLike[str], *, trainable: bool = False
) -> PreTrainedModel:
    """Puts a saved adapter on a model: LoRA goes on top of what is there, scales replace scales.

    `path` is a directory with `adapter_config.json` (ours or PEFT's), with `scales.safetensors`, or
    with both, trained together. With `trainable` it goes on learning and everything else is frozen.
    All is checked before anything changes. Raises ValueError for an adapter of another base, for
    one whose scales are gone or others, for one that was trained upon scales or adapters that are
    not there, for scales other than those of an adapter that is there, for one that is there
    already, and for one beside what training made of it.
    """
    check_kind("load_adapter: model", model, PreTrainedModel)
    check_path("load_adapter: path", path)
    directory = Path(path)
    if (directory / peft.CONFIG_FILE).is_file():
        _load_lora(model, directory, trainable)
    elif (directory / scales.FILE).is_file():
        swap_scales(model, directory)
        if trainable:
            prepare_peqa(model)
    else:
        raise ValueError(
            f"load_adapter: adapter: {directory}: expected a directory with {peft.CONFIG_FILE} or "
            f"{scales.FILE}, got {_kind(directory)}"
        )
    return model


def load_adapters(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """One after another, as commands are given them. Raises ValueError as `load_adapter` does, and
    for scales that would replace what an earlier one brought or was trained upon."""
    for number, path in enumerate(paths):
        file = Path(path) / scales.FILE
        if file.is_file() and Checkpoint.from_file(file).metadata().get("below_sha256") is None:
            earlier = [x for x in paths[:number] if (Path(x) / scales.FILE).is_file()]
            if earlier:
                raise ValueError(
                    f"--adapter: {path}: expected one with scales, got {earlier[0]}, too, whose "
                    "scales it would replace"
                )
            if number and not (Path(path) / peft.CONFIG_FILE).is_file():
                raise ValueError(
                    f"--adapter: {path}: expected its scales before {paths[0]}, got them after it"
                )
        load_adapter(model, path)


def note_correction(model: PreTrainedModel, say: Callable[[str], None]) -> None:
    """Says so where the integers of a model, as loaded, were fitted along with a correction, and
    none of its adapters is that or started from it."""
    path = model.config.name_or_path  # on this disk: of a hub id that of its snapshot
    directory = peft.find_correction(path)
    if directory is None:
        return
    if adapted_linears(model):
        own = adapters_digest(_stacked(peft.read(directory)), torch.float32)
        if any(own in digests | starts for digests, starts in digests_on(model)):
            return
    say(
        f"note: {path} was quantized to be used with its correction (--adapter {directory}), or "
        "with what lrec made of it"
    )


def _stacked(adapter: peft.PeftAdapter) -> dict[str, list[LowRankTensors]]:
    return {path: [item] for path, item in adapter.linears.items()}


def _kind(path: Path) -> str:
    if not path.exists():
        return "nothing there"
    if (path / run_directory.RECORD).exists():
        return "an unfinished training (to be resumed)"
    return "one with neither" if path.is_dir() else "a file"


def _load_lora(model: PreTrainedModel, directory: Path, trainable: bool) -> None:
    adapter = peft.read(directory)
    base = adapter.metadata.get("base_sha256")
    if base is not None:  # PEFT's own adapters do not say; then shapes have to do
        if not quantized_linears(model):
            raise ValueError(
                f"load_adapter: {directory}: expected the quantized model that it was trained "
                "upon, got one of 16 bits (PEFT puts it on one that is written by dequantize)"
            )
        check_base(base, packed_hash(model), directory)
    linears = block_linears(model)
    for path, (a, b, _) in adapter.linears.items():
        if path not in linears:
            raise ValueError(f"load_adapter: {directory}: {path}: the model has no such linear")
        expected = linear_features(linears[path])
        if (a.shape[1], b.shape[0]) != expected:
            raise ValueError(
                f"load_adapter: {directory}: {path}: expected a linear {expected[1]} x "
                f"{expected[0]}, got an adapter for {b.shape[0]} x {a.shape[1]}"
            )
    stacks = adapter_stacks(model)
    _check_below(f"load_adapter: {directory}", stacks, adapter.metadata.get(_BELOW))
    upon = adapter.metadata.get(_SCALES_BELOW)
    if upon is not None and scales_digest(model) not in upon.split():
        raise ValueError(
            f"load_adapter: {directory}: expected the scales that it was trained upon, got others"
        )
    own = adapters_digest(_stacked(adapter), torch.float32)
    starts, parts = (set(adapter.metadata.get(name, "").split()) for name in (_START, _PARTS))
    known = {*adapters_digests(_stacked(adapter)).split(), *parts} if stacks else set()
    for digests, others in digests_on(model):
        if starts & digests or others & known:
            raise ValueError(
                f"load_adapter: {directory}: expected either an adapter or what training made of "
                "it, which takes its place, got both"
            )
        if known & digests:
            raise ValueError(
                f"load_adapter: {directory}: expected it, and what it was folded of, once, got it "
                "twice"
            )
    wanted = adapter.metadata.get(_SCALES)
    if wanted is not None:
        found = scales.read(directory / scales.FILE)
        if checkpoint.digest(found.linears) != wanted:
            raise ValueError(
                f"load_adapter: {directory}: its {scales.FILE} is not the one it was trained with"
            )
        if _BELOW not in adapter.metadata:
            present = [x for stack in stacks.values() for x in stack]
            _check_scales(f"load_adapter: {directory}", model, present, found)
        note_scales(model)
        _swap(model, found, directory / scales.FILE)
    if trainable:
        model.requires_grad_(False)
    if trainable and wanted is not None:
        thaw_scales(model)
    order = next_order(model)
    for path, (a, b, scaling) in adapter.linears.items():
        added = add_adapter(model, path, rank=a.shape[0], scaling=scaling, dropout=adapter.dropout)
        with torch.no_grad():
            added.a.copy_(a)
            added.b.copy_(b)
        added.order, added.with_scales = order, wanted is not None
        added.starts = frozenset({*starts, own} if trainable else starts)
        added.parts = frozenset(parts)
        added.upon = None if trainable or wanted is not None else upon
        added.requires_grad_(trainable)


def _check_below(where: str, stacks: Mapping[str, Sequence[LowRank]], below: str | None) -> None:
    """ValueError unless the adapters that are there have one of these digests; None: any."""
    if below is not None and adapters_digest(stacks, torch.float32) not in below.split():
        raise ValueError(
            f"{where}: expected under it the adapters that it was trained upon, got "
            f"{'others' if stacks else 'none'}"
        )


def _check_scales(
    where: str, model: PreTrainedModel, adapters: Sequence[LowRank], found: scales.Scales
) -> None:
    """ValueError where one of these adapters of the model goes with other scales."""
    if not adapters:
        return
    digest = checkpoint.digest({path: x.half() for path, x in found.linears.items()})
    own = scales_digest(model)
    if any(digest not in (own if x.upon is None else x.upon).split() for x in adapters):
        raise ValueError(
            f"{where}: expected the scales that the adapters on the model were put upon, or that "
            "were trained upon these, got others"
        )


def swap_scales(model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Gives a packed model another task's scales: all of them, or on any error none.

    `path` is a scales file or its directory. Raises ValueError where they belong to other integers,
    or to adapters, trained with them or before them, that are not there, and where an adapter is
    there that belongs to other scales.
    """
    check_kind("swap_scales: model", model, PreTrainedModel)
    check_path("swap_scales: path", path)
    file = Path(path) / scales.FILE if Path(path).is_dir() else Path(path)
    found = scales.read(file)
    stacks = adapter_stacks(model)
    present = [x for stack in stacks.values() for x in stack]
    theirs = [x for x in present if x.with_scales]
    if found.with_adapter and not theirs:
        raise ValueError(
            f"swap_scales: {file}: expected the adapter that it was trained with (load_adapter "
            "takes both), got none"
        )
    _check_below(f"swap_scales: {file}", stacks, found.below_sha256)
    if found.below_sha256 is None:
        # What lay below an adapter when they were trained with it does not say.
        concerned = theirs if found.with_adapter else present
        _check_scales(f"swap_scales: {file}", model, concerned, found)
    note_scales(model)
    _swap(model, found, file)


def restore_scales(model: PreTrainedModel, file: Path) -> None:
    """The same of a checkpoint of the training that goes on."""
    _swap(model, scales.read(file), file)


def _swap(model: PreTrainedModel, found: scales.Scales, file: Path) -> None:
    linears = _packed(model, "swap_scales")
    check_base(found.base_sha256, packed_hash(model), file)
    if found.linears.keys() != linears.keys():
        odd = sorted(found.linears.keys() ^ linears.keys())[0]
        raise ValueError(f"swap_scales: {file}: {odd}: in the file or the model only")
    for name, linear in linears.items():
        if found.linears[name].shape != linear.scales.shape:
            raise ValueError(
                f"swap_scales: {file}: {name}: expected {list(linear.scales.shape)}, got "
                f"{list(found.linears[name].shape)}"
            )
    old = {name: linear.scales.data for name, linear in linears.items()}
    try:
        _set_scales(linears, found.linears)
    except BaseException:  # Ctrl-C between two linears
        _set_scales(linears, old)
        raise


def _set_scales(linears: Mapping[str, QuantLinear], values: Mapping[str, torch.Tensor]) -> None:
    for name, linear in linears.items():
        # Parameters stay the same objects, for whoever holds them.
        linear.scales.data = values[name].to(linear.scales.device)


def _own_scales(linears: Mapping[str, QuantLinear]) -> dict[str, torch.Tensor]:
    return {path: linear.scales.detach() for path, linear in linears.items()}


def _packed(model: PreTrainedModel, where: str) -> dict[str, QuantLinear]:
    check_kind(f"{where}: model", model, PreTrainedModel)
    with without_adapters(model):
        linears = quantized_linears(model)
    if not linears:
        raise ValueError(f"{where}: model: expected a quantized one, got no packed linear in it")
    return linears

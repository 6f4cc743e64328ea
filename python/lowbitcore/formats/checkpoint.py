"""Safe, lazy reading of safetensors directories and atomic writing of sharded ones.

Headers are checked against the files before any data is touched, so a truncated or forged file
is refused with one line that names the file and the tensor, and never asks for absurd memory.
Layout: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON header,
then the data of all tensors without holes).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowbitcore.files import atomic_path, file_fingerprint, one_line, read_json, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4_000_000_000
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

# In the order of the library, which writes the tensors of a file from the last dtype to the first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; known from the header alone."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of one safetensors file.

    Raises ValueError where the header does not describe exactly the bytes that follow it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ValueError(f"{path}: not a safetensors file: expected 8 bytes, got {size}")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(
                    f"{path}: header of {length} bytes does not fit a file of {size} bytes"
                )
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: header is not valid JSON: {one_line(error)}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header is not a JSON object")
    header.pop("__metadata__", None)
    data_bytes = size - 8 - length
    infos = {}
    spans = []
    for name, entry in header.items():
        info, begin, end = _parse_entry(path, name, entry, data_bytes)
        infos[name] = info
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(
                f"{path}: tensor {name!r}: expected to start at byte {position}, got {begin} "
                "(overlap or hole)"
            )
        position = end
    if position != data_bytes:
        raise ValueError(f"{path}: header describes {position} bytes, the file holds {data_bytes}")
    return infos


def _parse_entry(path: Path, name: str, entry: Any, data_bytes: int) -> tuple[TensorInfo, int, int]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{where}: header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where}: unknown dtype {dtype!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: shape and data_offsets must be lists of sizes")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected or end > data_bytes:
        raise ValueError(
            f"{where}: shape {shape} of {dtype} takes {expected} bytes, "
            f"header says {begin}..{end} of {data_bytes}"
        )
    return TensorInfo(name, path, DTYPES[dtype], tuple(shape)), begin, end


def _is_sizes(value: Any) -> bool:
    # bool is an int to isinstance, and JSON's true is no size.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


class Checkpoint:
    """A directory of safetensors, read tensor by tensor.

    Accepts `model.safetensors`, shards with `model.safetensors.index.json`, or (older GPTQ files)
    exactly one `*.safetensors` of another name.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.files = _weight_files(self.directory)
        self._infos: dict[str, TensorInfo] = {}
        index = self.directory / INDEX_FILE
        if self.files == [self.directory / SINGLE_FILE] or not index.is_file():
            for file in self.files:
                self._infos.update(read_header(file))
            return
        headers = {file.name: read_header(file) for file in self.files}
        for name, file_name in _weight_map(index).items():
            if name not in headers[file_name]:
                raise ValueError(f"{index}: tensor {name!r} is not in {file_name}")
            self._infos[name] = headers[file_name][name]

    @classmethod
    def from_file(cls, path: Path) -> Checkpoint:
        """The same for one safetensors file."""
        self = cls.__new__(cls)
        self.directory, self.files, self._infos = path.parent, [path], read_header(path)
        return self

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def names(self) -> list[str]:
        return sorted(self._infos)

    def info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise ValueError(f"{self.directory}: tensor {name!r} is missing")
        return self._infos[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor into memory of its own.

        The file is mapped only for the copy: pages of a mapping that stayed open would count as
        memory in use, and streaming a model would end with all of it resident.
        """
        info = self.info(name)
        try:
            with safe_open(info.file, framework="pt") as file:
                return file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{info.file}: tensor {name!r}: {one_line(error)}") from error

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, each file opened once: for files of many small ones."""
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  (it is not a dict)
                        yield name, file.get_tensor(name).clone()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: {one_line(error)}") from error

    def metadata(self) -> dict[str, str]:
        """What the headers carry beside tensors."""
        found: dict[str, str] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                found.update(file.metadata() or {})
        return found

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and the ends of each file; cheap for any size."""
        digest = hashlib.sha256()
        for name in self.names():
            info = self._infos[name]
            digest.update(f"{name} {info.dtype} {info.shape} {info.file.name}\n".encode())
        for path in self.files:
            digest.update(file_fingerprint(path).encode())
        return digest.hexdigest()


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and values as float32, of whatever tensors must be known again."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if index.is_file():
        files = [directory / name for name in sorted(set(_weight_map(index).values()))]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{index}: names {file.name}, which does not exist")
        return files
    others = sorted(
        path for path in directory.glob("*.safetensors") if not path.name.startswith("adapter_")
    )
    if len(others) == 1:
        return others
    if others:
        raise ValueError(
            f"{directory}: {len(others)} safetensors files but neither {SINGLE_FILE} "
            f"nor {INDEX_FILE}"
        )
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    if pickled:
        raise ValueError(
            f"{directory}: only pickled weights ({pickled[0]}), which can run code when read; "
            "convert them to safetensors"
        )
    raise ValueError(f"{directory}: no safetensors weights")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is missing or empty")
    for name, file_name in weight_map.items():
        # Bare file names only: an index must not reach outside its directory.
        plain = (
            isinstance(file_name, str)
            and file_name.endswith(".safetensors")
            and not set(file_name) & set("/\\\0")
        )
        if not plain:
            raise ValueError(
                f"{index}: tensor {name!r}: expected a safetensors file name in the same "
                f"directory, got {file_name!r}"
            )
    return weight_map


@dataclass(frozen=True)
class Entry:
    """A tensor to write: what it is, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Entry:
        return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_safetensors(
    path: str | os.PathLike[str],
    entries: Iterable[Entry],
    metadata: Mapping[str, str] | None = None,
    *,
    before_replacing: Callable[[], None] = lambda: None,
) -> None:
    """Writes one safetensors file atomically, holding one tensor in memory at a time.

    The library's own writer wants all tensors of a file at once, which for shards of 4 GB would
    break the promise that a model larger than memory can be quantized. Raises OSError (disk full).
    """
    # The library's order, wide dtypes first: it keeps every tensor aligned.
    rank = {dtype: -number for number, dtype in enumerate(DTYPES.values())}
    ordered = sorted(entries, key=lambda entry: (rank[entry.dtype], entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for entry in ordered:
        if entry.name in header:
            raise ValueError(f"write_safetensors: {path}: tensor {entry.name!r} given twice")
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for entry in ordered:
            tensor = entry.load().detach().cpu().contiguous()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(
                    f"write_safetensors: tensor {entry.name!r}: expected {entry.dtype} "
                    f"{list(entry.shape)}, got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        before_replacing()


def write_shards(
    directory: str | os.PathLike[str],
    entries: Sequence[Entry],
    *,
    max_shard_bytes: int | None = None,
    before_replacing: Callable[[], None] = lambda: None,
) -> list[str]:
    """Writes `model.safetensors`, or shards and their index; returns the file names.

    `before_replacing` is called whenever a file is whole and may take an earlier one's place.

    Weight files of an earlier save that are not overwritten are removed, since a stale
    `model.safetensors` would win over a new index.
    """
    directory = Path(directory)
    limit = MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    if len(shards) == 1:
        names = [SINGLE_FILE]
    else:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(directory / name, shard, before_replacing=before_replacing)
    if len(shards) > 1:
        weight_map = {
            entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard
        }
        total = sum(entry.nbytes for entry in entries)
        write_json(
            directory / INDEX_FILE,
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
        names.append(INDEX_FILE)
    for path in list(directory.iterdir()):
        ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name)
        if path.name not in names and (ours or path.name == INDEX_FILE):
            path.unlink()
    return names

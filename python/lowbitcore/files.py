"""Files that are whole or not there: JSON, atomic replacement, locks, fingerprints."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_LEFTOVER = ".*.????????.tmp"  # of atomic_path


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def remove_leftovers(directory: Path) -> None:
    """What a run that was killed while it wrote left in a directory; of a living one, too."""
    for leftover in directory.glob(_LEFTOVER):
        leftover.unlink()


def check_free(where: str, directory: Path, *ours: str) -> None:
    """ValueError unless there is a directory, or room for one, that can be written and has nothing
    in it but these names and what a run that was killed while it wrote may have left."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{where}: expected a directory, got a file")
    found = set(directory.iterdir()) if directory.exists() else set()
    strangers = found - {directory / name for name in ours} - set(directory.glob(_LEFTOVER))
    if strangers:
        first = min(strangers).name
        raise ValueError(f"{where}: expected an empty or new directory, got {first!r} in it")
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"{where}: cannot be written: {place}: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError (one line, naming the file) for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Writes a JSON object atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and takes its place.

    On any exception (a full disk, Ctrl-C) the temporary file is removed and `path` is untouched.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's 0600 would keep other users out
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def lock(path: Path) -> IO[str]:
    """Keeps other runs out until it is closed; ValueError where one is in."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"{path.parent}: another run is writing there") from error
    return file


def file_fingerprint(path: Path) -> str:
    """SHA-256 over a file's size and 17 samples of 64 KiB spread over it."""
    sample = 1 << 16
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for step in range(17):
            file.seek(max(0, size - sample) * step // 16)
            digest.update(file.read(sample))
    return digest.hexdigest()

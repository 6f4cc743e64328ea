"""The directory of a training: whether one may begin or go on there, and what is kept of it.

While a run is unfinished its record says with what settings it began, and a lock keeps others out;
both are there before the first checkpoint. What a training leaves is written last.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import IO, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lowbitcore import files
from lowbitcore.formats import peft, scales
from lowbitcore.formats.checkpoint import read_header

RECORD, _LOCK = "training.json", ".lock"


def is_main() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def open_run(out: Path, settings: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """The record of an unfinished run in `out`, with the same settings, to resume; empty where
    there is none. Raises ValueError where `out` holds anything that would be lost, and for a run
    with other settings."""
    record = out / RECORD
    if not is_main():  # the first process may have begun already
        return files.read_json(record) if resume and record.exists() else {}
    if is_finished(out) and not (resume and (out / _LOCK).exists()):
        raise ValueError(f"{out}: holds a finished training already")
    if record.exists():
        files.lock(out / _LOCK).close()  # said first: a living run must not be deleted
        if not resume:
            if newest_checkpoint(out) is None:  # nothing is lost
                return {}
            raise ValueError(f"{out}: holds an unfinished training: give --resume, or delete it")
        found = files.read_json(record)
        before, now = _flat(found.get("recipe", {})), _flat(settings)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{out}: cannot resume: {name}: expected {before.get(name)!r}, as in the "
                    f"unfinished run, got {now.get(name)!r}"
                )
        return found
    files.check_free(str(out), out, _LOCK)
    return {}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def begin(out: Path, settings: dict[str, Any], *, steps: int, identity: dict[str, Any]) -> IO[str]:
    """Begins, or goes on with, a run in `out`; the lock that keeps others out of it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = files.lock(out / _LOCK)
    try:
        files.remove_leftovers(out)
        record = {"recipe": settings, "steps": steps, "identity": identity}
        files.write_json(out / RECORD, record)
    except BaseException:  # a full disk, Ctrl-C
        lock.close()
        raise
    return lock


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Into the record, as `result`."""
    files.write_json(out / RECORD, {**files.read_json(out / RECORD), "result": result})


def is_finished(out: Path) -> bool:
    """Whether what is written last is there: of an adapter with its scales, these come first."""
    if (out / peft.CONFIG_FILE).exists():
        return True
    if not (out / scales.FILE).exists():
        return False
    record = out / RECORD
    recipe = files.read_json(record).get("recipe", {}) if record.exists() else {}
    return recipe.get("lora") is None


def newest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The last checkpoint that is whole: a kill may have cut off the newest, or a power loss."""
    found = []
    for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:  # the Trainer writes its state last
            state = json.loads((path / "trainer_state.json").read_text())
            found.append((int(state["global_step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return next((path for _, path in sorted(found, reverse=True) if _is_whole(path)), None)


def _is_whole(directory: Path) -> bool:
    """Whether torch's archives in it are as their checksums say, and no tensor is cut off."""
    try:
        for path in directory.iterdir():
            if path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        return False
            elif path.suffix == ".safetensors":
                read_header(path)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return True


def clean_up(out: Path) -> None:
    """What a finished training needs no more."""
    for old in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(old)
    (out / _LOCK).unlink(missing_ok=True)  # last: until then a resumed run comes here again

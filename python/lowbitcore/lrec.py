"""LREC (INT2.1, 2306.08162, section 3.2): low-rank adapters that make a quantized model say what
its 16-bit teacher says.

The loss is lambda_kl KL + lambda_ce CE, both means over scored tokens (the paper's equations 2 and
3). KL(teacher || student) is "forward", the direction of the authors' public code; the paper's
formula is written the other way round, "reverse".
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from lowbitcore import files
from lowbitcore.blocks import quantized_linears
from lowbitcore.blockwise import BlockwiseModel
from lowbitcore.checks import check_kind
from lowbitcore.data import TrainingSet
from lowbitcore.formats import checkpoint
from lowbitcore.formats.checkpoint import Entry
from lowbitcore.head import open_head, run_body
from lowbitcore.losses import Direction, distillation
from lowbitcore.modeling import use_own_operations
from lowbitcore.provenance import config_digest, fingerprint
from lowbitcore.training import Loss, PackedTrainer, TrainedModel

# Of a cache's directory.
_RECORD, _LOCK = "cache.json", ".lock"
# What else than this the states there are of.
_OTHERS = {
    "config": "a teacher with another config",
    "data": "other data, or of another number, length or order of its tokens",
    "examples": "another number of examples",
}
# Examples in a file of the cache.
SHARD = 32
# Tokens, at least, of the files that go through a block of the teacher while that is in memory: so
# many that reading it takes little time beside multiplying by it. A killed run may have to do them
# again.
TOKENS_TOGETHER = 1 << 15


class LrecTrainer(PackedTrainer):
    """Trains the adapters of `prepare_lora(model, targets=None)` against a frozen teacher.

    `teacher` is the 16-bit model, which then runs beside the student, with this library's
    operations in the place of transformers', or a `TeacherCache` of the very `train_dataset`.
    Raises ValueError for lambdas below 0, infinite or both 0, and where a cached teacher's head is
    not the student's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: Any,
        train_dataset: Dataset[Any],
        *,
        teacher: PreTrainedModel | TeacherCache,
        lambda_kl: float = 1.0,
        lambda_ce: float = 0.1,
        kl: Direction = "forward",
        **kwargs: Any,
    ) -> None:
        check_loss(lambda_kl, lambda_ce, kl)
        self._weights = (lambda_kl, lambda_ce, kl)
        self._teacher: PreTrainedModel | None = None
        if isinstance(teacher, TeacherCache):
            teacher.check_head(model)
            train_dataset = teacher.attach(train_dataset)
        else:
            check_kind("LrecTrainer: teacher", teacher, PreTrainedModel)
            check_kind("LrecTrainer: model", model, PreTrainedModel)
            if quantized_linears(teacher):
                raise ValueError("LrecTrainer: teacher: expected a 16-bit model, got a packed one")
            sizes = [item.get_output_embeddings().weight.shape[0] for item in (teacher, model)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"LrecTrainer: teacher: expected one of {sizes[1]} tokens, as the student's "
                    f"vocabulary has, got {sizes[0]}"
                )
            use_own_operations(teacher)
            # The Trainer moves what it trains, and the teacher is no part of that.
            self._teacher = teacher.to(args.device).eval().requires_grad_(False)
        super().__init__(model, args, train_dataset, **kwargs)

    def _trained(self, model: PreTrainedModel) -> TrainedModel:
        return _DistilledModel(model, self._teacher, *self._weights)


def check_loss(lambda_kl: float, lambda_ce: float, kl: Direction) -> None:
    """ValueError for lambdas below 0, infinite or both 0, and for an unknown direction."""
    for name, value in (("lambda_kl", lambda_kl), ("lambda_ce", lambda_ce)):
        if not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise ValueError(f"LrecTrainer: {name}: expected 0 or more, got {value!r}")
    if lambda_kl == lambda_ce == 0:
        raise ValueError("LrecTrainer: lambda_kl: expected one lambda above 0, got 0 and 0")
    if kl not in ("forward", "reverse"):
        raise ValueError(f"LrecTrainer: kl: expected forward or reverse, got {kl!r}")


class _DistilledModel(TrainedModel):
    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        lambda_kl: float,
        lambda_ce: float,
        kl: Direction,
    ) -> None:
        super().__init__(model)
        # Not a submodule: it neither trains nor is it saved or wrapped.
        self.__dict__["teacher"] = teacher
        self._lambda_kl, self._lambda_ce, self._kl = lambda_kl, lambda_ce, kl

    @torch.no_grad()
    def loss(self, batch: dict[str, Tensor | None], scored: Tensor, output: Any) -> Loss:
        teacher = self.__dict__["teacher"]
        states = batch.pop("teacher_hidden", None)
        if states is None:
            output = run_body(teacher, **batch)
            states = output.last_hidden_state
        wanted = states[:, :-1][scored]
        head = self.model if teacher is None else teacher

        def loss(logits: Tensor, targets: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), open_head(head, output) as teacher_logits:
                teacher_rows = teacher_logits(wanted[rows])
            return distillation(
                logits,
                teacher_rows,
                targets,
                lambda_kl=self._lambda_kl,
                lambda_ce=self._lambda_ce,
                kl=self._kl,
            )

        return loss


# --- The teacher on disk -----------------------------------------------------------------------


class TeacherCache:
    """A teacher's last hidden states for every token of a training set, on disk.

    Quantization leaves the head alone, so teacher and student share it, and logits made from the
    stored states are the teacher's to the last bit: at the vocabulary's size over the features'
    (8 times on LLaMA-7B) less than the logits that the paper stores. The directory is bound to the
    teacher and to the tokens by hash, and a killed run goes on where it was.
    """

    def __init__(self, directory: str | os.PathLike[str], binding: dict[str, Any]) -> None:
        self._directory, self._binding = Path(directory), binding

    @staticmethod
    def bytes_needed(teacher: PreTrainedModel | BlockwiseModel, dataset: TrainingSet) -> int:
        features = teacher.config.get_text_config().hidden_size
        return dataset.tokens * features * teacher.dtype.itemsize

    @classmethod
    @torch.no_grad()
    def fill(
        cls,
        directory: str | os.PathLike[str],
        teacher: PreTrainedModel | BlockwiseModel,
        dataset: TrainingSet,
        *,
        progress: bool = True,
    ) -> TeacherCache:
        """Runs the teacher over the data, or over what an earlier call left to do, with this
        library's operations in the place of transformers'; a BlockwiseModel with one of its blocks
        in memory at a time, to the same states.

        Raises ValueError where the directory holds another teacher's or other data's states or
        cannot be written, and OSError where the disk has no room for them.
        """
        if isinstance(teacher, BlockwiseModel):
            states_of: Callable[[list[Tensor]], Iterable[Tensor]] = teacher.last_hidden_states
            tensors = teacher.tensors()
        else:
            check_kind("TeacherCache: teacher", teacher, PreTrainedModel)
            use_own_operations(teacher)
            states_of = partial(_last_hidden_states, teacher.eval())
            tensors = iter(teacher.state_dict().items())
        path = Path(directory)
        binding = {
            "config": config_digest(teacher.config),
            "teacher": fingerprint(tensors),
            "head": head_fingerprint(teacher),
            "data": dataset.digest(),
            "dtype": str(teacher.dtype),
            "examples": len(dataset),
        }
        cache = cls(path, binding)
        shards = [range(i, min(i + SHARD, len(dataset))) for i in range(0, len(dataset), SHARD)]

        def missing() -> list[range]:
            return [shard for shard in shards if not cache._shard(shard[0]).exists()]

        if cls._begun(path, binding) and not missing():
            return cache  # as several processes may find it at once
        path.mkdir(parents=True, exist_ok=True)
        with files.lock(path / _LOCK):
            files.remove_leftovers(path)
            needed = cls.bytes_needed(teacher, dataset)
            if not cls._begun(path, binding):
                free = shutil.disk_usage(path).free
                if needed > free:
                    raise OSError(
                        f"TeacherCache: {path}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} are "
                        "free"
                    )
                files.write_json(path / _RECORD, binding)
            todo = missing()
            what = f"teacher cache, {needed / 1e6:,.1f} MB"
            with tqdm(total=len(todo), desc=what, unit="shard", disable=not progress) as bar:
                for group in _passes(todo, dataset):
                    states = iter(
                        states_of([dataset[i]["input_ids"] for shard in group for i in shard])
                    )
                    for shard in group:
                        entries = [_entry(index, next(states)) for index in shard]
                        checkpoint.write_safetensors(cache._shard(shard[0]), entries)
                        bar.update()
        return cache

    @staticmethod
    def _begun(path: Path, binding: dict[str, Any]) -> bool:
        """Whether a directory was begun for this; ValueError where it is for something else."""
        record = path / _RECORD
        if not record.exists():
            files.check_free(f"TeacherCache: {path}", path, _LOCK)
            return False
        found = files.read_json(record)
        for name, value in binding.items():
            if found.get(name) != value:
                raise ValueError(
                    f"TeacherCache: {path}: holds states of {_OTHERS.get(name, f'another {name}')}"
                    ": choose an empty directory, or delete it"
                )
        return True

    def _shard(self, index: int) -> Path:
        return self._directory / f"states-{index // SHARD:05d}.safetensors"

    def states(self, index: int) -> Tensor:
        """The states of one example, [tokens, features]."""
        try:
            with safe_open(self._shard(index), framework="pt") as file:
                return cast(Tensor, file.get_tensor(str(index)))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"TeacherCache: {self._shard(index)}: damaged: delete it, and it is made again"
            ) from error

    def check_head(self, student: PreTrainedModel) -> None:
        """ValueError unless the student's head is the teacher's."""
        if head_fingerprint(student) != self._binding["head"]:
            raise ValueError(
                f"TeacherCache: {self._directory}: the student's head or its dtype is not the "
                "teacher's: train without a cache"
            )

    def attach(self, dataset: Dataset[Any]) -> Dataset[Any]:
        """The same examples with `teacher_hidden` beside their tokens."""
        if not isinstance(dataset, TrainingSet) or dataset.digest() != self._binding["data"]:
            raise ValueError(f"TeacherCache: {self._directory}: holds states of other data")
        return _WithStates(dataset, self)


def head_fingerprint(model: PreTrainedModel | BlockwiseModel) -> str:
    """Of what makes logits of its last hidden states."""
    if isinstance(model, BlockwiseModel):
        return fingerprint(model.tensors(model.head))
    return fingerprint(model.get_output_embeddings().state_dict().items())


def _passes(shards: Sequence[range], dataset: TrainingSet) -> Iterator[list[range]]:
    """What goes through the teacher together."""
    group: list[range] = []
    tokens = 0
    for shard in shards:
        group.append(shard)
        tokens += sum(len(dataset.items[i][0]) for i in shard)
        if tokens >= TOKENS_TOGETHER:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _entry(index: int, states: Tensor) -> Entry:
    if not torch.isfinite(states).all():
        raise ValueError(f"TeacherCache: teacher: its states for example {index} are not finite")
    return Entry.of(str(index), states.cpu())


def _last_hidden_states(teacher: PreTrainedModel, sequences: Sequence[Tensor]) -> Iterator[Tensor]:
    for ids in sequences:
        inputs = ids[None].to(teacher.device)
        yield run_body(teacher, input_ids=inputs).last_hidden_state[0]


class _WithStates(Dataset[dict[str, Tensor]]):
    def __init__(self, dataset: TrainingSet, cache: TeacherCache) -> None:
        self._dataset, self._cache = dataset, cache

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self._dataset[index], "teacher_hidden": self._cache.states(index)}

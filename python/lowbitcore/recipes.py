"""Training from files to files: what the commands peqa, emef and lrec do.

A run writes checkpoints into its directory as it goes; one that was killed goes on from the last of
them to the result it would have had. At its end the directory holds the adapter or the scales, a
plot and the Trainer's log, and no checkpoints.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
)

from lowbitcore import adapters, data, run_directory
from lowbitcore.blocks import quantized_linears
from lowbitcore.blockwise import BlockwiseModel
from lowbitcore.checks import check_length, check_tokens
from lowbitcore.data import TrainingSet
from lowbitcore.evaluate import check_text, perplexity
from lowbitcore.formats import peft, scales
from lowbitcore.heap import keep_heap_small
from lowbitcore.lora import prepare_lora
from lowbitcore.lrec import LrecTrainer, TeacherCache, check_loss, head_fingerprint
from lowbitcore.model import load
from lowbitcore.peqa import prepare_peqa, thaw_scales
from lowbitcore.progress import Bar, draw
from lowbitcore.provenance import config_digest, identity
from lowbitcore.run_directory import is_main
from lowbitcore.runtime import resolve_device, synchronize
from lowbitcore.source import Source, load_tokenizer, open_source
from lowbitcore.training import (
    Checkpointing,
    Deadline,
    EmefTrainer,
    PackedTrainer,
    PeqaTrainer,
    SaveEvery,
    collate,
    restore,
)

_STATE = "trainer_state.json"
_PATHS = ("model", "adapters", "data", "eval_text", "start", "cache")
# Evaluations during a training look at the start of the text; the last one at all of it.
_EVALUATIONS, _EVALUATION_WINDOWS = 5, 4
# A kill costs at most a tenth of a training, or so long.
_CHECKPOINTS, _SAVE_SECONDS = 10, 300


@dataclass(frozen=True)
class Schedule:
    """How long to train, on what, and how fast. One of steps, tokens and minutes is given.

    `batch` sequences of up to `length` tokens make a step, `micro_batch` of them at a time.
    """

    data: str
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    length: int = 512
    batch: int = 2
    micro_batch: int | None = None
    lr: float = 3e-4
    seed: int = 0
    mask_prompt: bool = False
    eval_text: str | None = None
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        given = [self.steps, self.tokens, self.minutes]
        if sum(value is not None for value in given) != 1:
            raise ValueError("--steps: expected one of --steps, --tokens and --minutes")
        for name in ("steps", "tokens", "minutes", "length", "batch", "micro_batch", "lr"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: expected a positive number, got {value}")
        if not 0 <= self.seed < 2**32:  # numpy's
            raise ValueError(f"--seed: expected 0 to 2^32 - 1, got {self.seed}")
        if self.batch % (self.micro_batch or self.batch):
            raise ValueError(
                f"--micro-batch: expected a divisor of --batch {self.batch}, got {self.micro_batch}"
            )


@dataclass(frozen=True)
class Lora:
    """A new adapter; or, with `start`, the one in that directory goes on learning. `bits` are those
    of its elements in the end; checkpoints keep all that the masters know."""

    rank: int
    alpha: float
    targets: Sequence[str] | None
    dropout: float
    start: str | None = None
    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in peft.DTYPES:
            raise ValueError(f"--adapter-bits: expected 8 or 16, got {self.bits}")


@dataclass(frozen=True)
class Teacher:
    """Whom LREC learns from, and how; `cache` is a directory for its hidden states."""

    model: str
    lambda_kl: float
    lambda_ce: float
    kl: Literal["forward", "reverse"]
    cache: str | None

    def __post_init__(self) -> None:
        check_loss(self.lambda_kl, self.lambda_ce, self.kl)  # before a cache is filled


@dataclass(frozen=True)
class Recipe:
    """PEQA without `lora`; with it EMEF or, given a `teacher`, LREC. With `scales_lr` scales train
    beside the adapter, at that rate relative to their size; without, only where the adapter that
    training starts from was trained with its own."""

    model: str
    schedule: Schedule
    lora: Lora | None = None
    teacher: Teacher | None = None
    adapters: tuple[str, ...] = ()
    scales_lr: float | None = None
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        rate = self.scales_lr
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"--scales-lr: expected a positive number, got {rate}")


def train(
    recipe: Recipe, out: Path, *, resume: bool, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Trains as the recipe says, into `out`; returns what the commands report.

    Under torchrun it trains in several processes, and returns that in the first of them alone.
    `say` is told what happens. Raises ValueError for bad input and for an `out` that exists, or
    that a run with other settings began.
    """
    schedule = recipe.schedule
    device = training_device(recipe.device)
    _check_minutes(recipe)
    micro = _micro_batch(schedule)
    if schedule.checkpointing == "full":
        keep_heap_small()  # whoever asks for it is short of memory
    start = time.perf_counter()
    _check_cache(recipe, out)
    settings = _settings(recipe)
    planned = run_directory.open_run(out, settings, resume=resume)
    if "result" in planned and run_directory.is_finished(out):
        say(f"{out}: finished already")
        return _finish(recipe, out, planned["result"]) if is_main() else None
    if resume and not planned and is_main():
        say(f"{out}: nothing to resume: training from the start")
    model = _load_student(recipe, device, say)
    tokenizer = load_tokenizer(recipe.model)
    measure = _evaluation(schedule, model, tokenizer)
    examples = _examples(schedule, model, tokenizer)
    source = None if recipe.teacher is None else open_source(recipe.teacher.model)
    found = _identity(model, examples, source)
    if planned and planned.get("identity") != found:
        names = ", ".join(k for k, v in found.items() if planned.get("identity", {}).get(k) != v)
        raise ValueError(f"{out}: cannot resume: not as in the unfinished run: {names}")
    torch.manual_seed(schedule.seed)
    _prepare(recipe, model, say)
    teacher = _teacher(recipe, source, model, examples, say)

    def trainer(steps: int) -> PackedTrainer:
        arguments = _arguments(schedule, micro, out, steps, device, evaluate=measure is not None)
        return _trainer(recipe, model, arguments, examples, teacher, measure)

    steps: int | None = _planned_steps(schedule, examples) or planned.get("steps")
    if steps is None:
        seconds = 60 * cast(float, schedule.minutes)
        steps = max(1, int(seconds / _seconds_a_step(trainer(1), schedule, micro, examples)))
    run = trainer(steps)
    run.remove_callback(PrinterCallback)
    bar = Bar()
    run.add_callback(bar)
    run.add_callback(SaveEvery(_SAVE_SECONDS))
    if schedule.minutes is not None:
        run.add_callback(Deadline(schedule.minutes))
    lock = run_directory.begin(out, settings, steps=steps, identity=found) if is_main() else None
    with lock or contextlib.nullcontext():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(
            f"training {trained:,} parameters for {steps} steps of {schedule.batch} sequences, "
            f"{len(examples)} of them at hand"
        )
        before = time.perf_counter()
        begun = run_directory.newest_checkpoint(out) if resume else None
        state = TrainerState()
        if begun is not None:
            say(f"going on from {begun}")
            state = TrainerState.load_from_json(str(begun / _STATE))
        try:
            if begun is not None and state.global_step >= steps:  # the Trainer would take one more
                restore(model, begun)
                run.state = state
            else:
                run.train(resume_from_checkpoint=begun)
        except BaseException as error:
            bar.close()
            if lock is not None and isinstance(error, KeyboardInterrupt):
                say(f"stopped after step {run.state.global_step}: {_what_is_kept(out)}")
            raise
        training_seconds = time.perf_counter() - before
        _leave_the_others()
        if lock is None:
            return None
        model.eval()
        dtype = torch.float32 if recipe.lora is None else peft.DTYPES[recipe.lora.bits]
        if recipe.lora is not None:
            adapters.round_adapter(model, dtype)
        if adapters.trains_scales(model):
            adapters.round_scales(model)
        ppl = None if measure is None else measure(model, None)
        draw(run.state.log_history, out / "training.png", windows=_EVALUATION_WINDOWS, final=ppl)
        run.state.save_to_json(str(out / _STATE))
        losses = [item["loss"] for item in run.state.log_history if "loss" in item]
        tokens = int(run.state.num_input_tokens_seen)
        result = {
            "out": str(out),
            "steps": run.state.global_step,
            "tokens": tokens,
            "tokens_per_second": (tokens - state.num_input_tokens_seen) / training_seconds,
            "seconds": time.perf_counter() - start,
            "training_seconds": training_seconds,
            "loss": sum(losses[-10:]) / len(losses[-10:]) if losses else None,
            "ppl": ppl,
        }
        run_directory.write_result(out, result)
        # Last: it says that the training is finished.
        adapters.save_adapter(model, out, dtype=dtype)
        return _finish(recipe, out, result)


def _what_is_kept(out: Path) -> str:
    kept = run_directory.newest_checkpoint(out)
    if kept is None:
        return "there is no checkpoint yet, --resume begins again"
    return f"{kept} is kept, --resume goes on from there"


def _finish(recipe: Recipe, out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What a training reports, whose directory needs nothing but its product any more."""
    run_directory.clean_up(out)
    product = peft.WEIGHTS_FILE if recipe.lora is not None else scales.FILE
    return {**result, "adapter_bytes": (out / product).stat().st_size}


# --- The parts of a run ------------------------------------------------------------------------


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What a resumed run has to share with the one it goes on with."""

    def portable(name: str, value: Any) -> Any:
        """As it is read back from disk, from whatever directory."""
        if isinstance(value, dict):
            return {key: portable(key, item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [portable(name, item) for item in value]
        if name not in _PATHS or value is None:
            return value
        # A model may be a hub id; a cache need not be there yet.
        return os.path.abspath(value) if name == "cache" or os.path.exists(value) else value

    return cast(dict[str, Any], portable("", asdict(recipe)))


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_device(name: str) -> torch.device:
    """Where this process trains, of "cpu" or "cuda": under torchrun each one has a GPU of its own.

    Raises ValueError where that cannot be computed on, and for another GPU than transformers takes.
    """
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = resolve_device(own if name == "cuda" and _processes() > 1 else name)
    if device.type == "cuda" and device.index is not None and device != torch.device(own):
        raise ValueError(
            f"train: device: expected cuda, got {name}: a process trains on {own}: choose the GPU "
            "by CUDA_VISIBLE_DEVICES"
        )
    return device


# The perplexity of a model on the first so many windows of the evaluation text, or on all.
_Measure = Callable[[PreTrainedModel, int | None], float]


def _check_minutes(recipe: Recipe) -> None:
    if recipe.schedule.minutes is None:
        return
    if _processes() > 1:
        raise ValueError("--minutes: expected --steps or --tokens where several processes train")
    if recipe.teacher is not None and recipe.teacher.cache:
        raise ValueError("--cache: expected --steps or --tokens, which tell how much to keep")


def _check_cache(recipe: Recipe, out: Path) -> None:
    cache = None if recipe.teacher is None else recipe.teacher.cache
    if cache is not None and out.resolve() in Path(cache).resolve().parents:
        raise ValueError(f"--cache: expected a directory outside of {out}, got {cache}")


def _load_student(
    recipe: Recipe, device: torch.device, say: Callable[[str], None]
) -> PreTrainedModel:
    model = load(recipe.model, dtype=recipe.dtype, device=device)
    if model.dtype == torch.float16:
        say(f"{recipe.model}: is of float16, in which gradients underflow: trained in bfloat16")
        model = model.to(torch.bfloat16)
    if recipe.lora is not None and not quantized_linears(model):
        say(f"note: {recipe.model} is not quantized: the adapter is trained on dense weights")
    check_length("--length", recipe.schedule.length, model.config)
    adapters.load_adapters(model, recipe.adapters)
    return model


def _evaluation(schedule: Schedule, model: PreTrainedModel, tokenizer: Any) -> _Measure | None:
    """The text is read and checked before anything is trained, and not after hours of it."""
    if schedule.eval_text is None:
        return None
    text = "\n\n".join(data.read_texts(schedule.eval_text))
    check_text("--eval-text", model, tokenizer, text)
    return lambda subject, windows: perplexity(subject, tokenizer, text, windows=windows).ppl


def _examples(schedule: Schedule, model: PreTrainedModel, tokenizer: Any) -> TrainingSet:
    examples = TrainingSet(
        data.read_examples(schedule.data),
        tokenizer,
        length=schedule.length,
        mask_prompt=schedule.mask_prompt,
        limit=None if schedule.steps is None else schedule.steps * schedule.batch,
        tokens=schedule.tokens,
        seed=schedule.seed,
    )
    for ids, _ in examples.items:
        check_tokens("--data", ids, model)
    return examples


def _planned_steps(schedule: Schedule, examples: TrainingSet) -> int | None:
    """None where minutes are given: what a step takes has to be measured."""
    if schedule.tokens is None:
        return schedule.steps
    # Instructions are shorter than `length`. Where there are too few, they come again; a pass over
    # them ends with what is left.
    passes, rest = divmod(schedule.tokens, examples.tokens)
    mean = examples.tokens / len(examples)
    steps = passes * math.ceil(len(examples) / schedule.batch)
    return steps + math.ceil(rest / (schedule.batch * mean))


def _identity(
    model: PreTrainedModel, examples: TrainingSet, source: Source | None
) -> dict[str, Any]:
    """What a resumed run has to find as it was, by hash."""
    found: dict[str, Any] = {"data": examples.digest(), **identity(model)}
    if source is not None:
        found["teacher"] = source.weights.fingerprint() + config_digest(source.config)
    return found


def _prepare(recipe: Recipe, model: PreTrainedModel, say: Callable[[str], None]) -> None:
    """Chooses what trains."""
    if recipe.lora is None:
        prepare_peqa(model)
    elif recipe.lora.start is not None:
        adapters.load_adapter(model, recipe.lora.start, trainable=True)
    else:
        prepare_lora(
            model,
            rank=recipe.lora.rank,
            alpha=recipe.lora.alpha,
            targets=recipe.lora.targets,
            dropout=recipe.lora.dropout,
        )
    adapters.note_correction(model, say)
    if recipe.scales_lr is not None:
        thaw_scales(model)


def _shape(model: PreTrainedModel) -> tuple[str, int, int]:
    config = model.config.get_text_config()
    return config.model_type, config.num_hidden_layers, config.hidden_size


def _teacher(
    recipe: Recipe,
    source: Source | None,
    model: PreTrainedModel,
    examples: TrainingSet,
    say: Callable[[str], None],
) -> PreTrainedModel | TeacherCache | None:
    if recipe.teacher is None or source is None:
        return None
    if recipe.teacher.cache is not None and Path(recipe.teacher.cache).is_file():
        raise ValueError(f"--cache: expected a directory, got the file {recipe.teacher.cache}")
    if source.gptq is not None:
        raise ValueError(f"--teacher: {recipe.teacher.model}: expected a 16-bit model")
    if source.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise ValueError(f"--teacher: {recipe.teacher.model}: its vocabulary is not the student's")
    if recipe.teacher.cache is None:
        loaded = load(recipe.teacher.model, dtype=model.dtype, device=model.device)
        if _shape(loaded) != _shape(model) or head_fingerprint(loaded) != head_fingerprint(model):
            say(
                f"note: {recipe.teacher.model} is not what {recipe.model} was quantized from: its "
                "blocks or its head are others"
            )
        return loaded
    teacher = BlockwiseModel(source, dtype=model.dtype, device=model.device)
    if head_fingerprint(teacher) != head_fingerprint(model):  # before it runs over all the data
        raise ValueError(
            f"--teacher: {recipe.teacher.model}: its head is not that of {recipe.model}: expected "
            "the model that this was quantized from, or no --cache"
        )
    # The others find it filled, whenever that may be.
    patience = timedelta(weeks=4)
    with PartialState(cpu=model.device.type == "cpu", timeout=patience).main_process_first():
        return TeacherCache.fill(recipe.teacher.cache, teacher, examples)


def _micro_batch(schedule: Schedule) -> int:
    """How many sequences a process takes at a time."""
    processes = _processes()
    micro = schedule.micro_batch or max(1, schedule.batch // processes)
    if schedule.batch % (micro * processes):
        raise ValueError(
            f"--batch: expected a multiple of {micro * processes} sequences, {micro} on each of "
            f"{processes} processes, got {schedule.batch}"
        )
    return micro


def _arguments(
    schedule: Schedule, micro: int, out: Path, steps: int, device: torch.device, *, evaluate: bool
) -> TrainingArguments:
    processes = _processes()
    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=schedule.batch // (micro * processes),
        learning_rate=schedule.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps // 10),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=schedule.seed,
        logging_steps=max(1, steps // 200),
        save_steps=max(1, steps // _CHECKPOINTS),
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,  # a Deadline's
        eval_strategy="steps" if evaluate else "no",
        eval_steps=max(1, steps // _EVALUATIONS) if evaluate else None,
        eval_on_start=evaluate,  # where it starts from, and whether the text will do
        disable_tqdm=True,  # its bar prints every log on stdout
        report_to="tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if processes > 1 and device.type == "cpu" else None,
    )


def _trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    examples: TrainingSet,
    teacher: PreTrainedModel | TeacherCache | None,
    measure: _Measure | None,
) -> PackedTrainer:
    options: dict[str, Any] = {
        "evaluation": None if measure is None else lambda m: measure(m, _EVALUATION_WINDOWS),
        "checkpointing": recipe.schedule.checkpointing,
        "scales_lr": recipe.scales_lr,
    }
    if recipe.teacher is not None:
        return LrecTrainer(
            model,
            arguments,
            examples,
            teacher=teacher,
            lambda_kl=recipe.teacher.lambda_kl,
            lambda_ce=recipe.teacher.lambda_ce,
            kl=recipe.teacher.kl,
            **options,
        )
    kind = PeqaTrainer if recipe.lora is None else EmefTrainer
    return kind(model, arguments, examples, **options)


def _leave_the_others() -> None:
    """Ends what several processes have in common, or its threads may outlive the interpreter, which
    then aborts."""
    if _processes() == 1:
        return
    PartialState().wait_for_everyone()
    # Gloo's threads let go of the last barrier as soon as they get the interpreter's lock. The
    # group's end, which holds it, waits for them: without a pause it may for ever (torch 2.13).
    time.sleep(0.1)
    PartialState().destroy_process_group()


def _seconds_a_step(
    trainer: PackedTrainer, schedule: Schedule, micro: int, examples: TrainingSet
) -> float:
    """What a step takes, from two micro-batches of which the first one warms up."""
    model = trainer.model
    batch = collate([trainer.train_dataset[i % len(examples)] for i in range(micro)])
    batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
    model.train()
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        model(**batch)["loss"].backward()
        synchronize()
        seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds * schedule.batch / (micro * _processes())

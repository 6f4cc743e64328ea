"""Training what is small on a model that stays packed, with transformers' Trainer underneath.

The Trainer sees a `TrainedModel`, whose forward returns a loss; so accumulation, resuming, logging,
evaluation and several processes work as for any model. Checkpoints hold the adapter or the scales,
never the base. Neither the logits of a batch nor the dense gradient of a weight is ever in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from lowbitcore import adapters
from lowbitcore.blocks import evaluating
from lowbitcore.checks import check_kind
from lowbitcore.data import IGNORED
from lowbitcore.formats import peft, scales
from lowbitcore.head import chunk_tokens, open_head, run_body
from lowbitcore.lora import newest_adapters
from lowbitcore.losses import cross_entropy

Checkpointing = Literal["none", "selective", "full"]

# Of TrainingArguments, with what there is in their place.
_NOT_HERE = {
    "activation_checkpointing": 'but checkpointing="full"',
    "gradient_checkpointing": 'but checkpointing="full"',
    "label_smoothing_factor": "losses are the methods' own",
    "neftune_noise_alpha": "losses are the methods' own",
}


# --- Losses ----------------------------------------------------------------------------------


class Loss(Protocol):
    """A sum over tokens, with its gradient in closed form."""

    def __call__(self, logits: Tensor, targets: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The loss summed over a chunk, and its gradient in the logits, of their type.

        logits [t, vocabulary], targets int64 [t], rows: where the chunk lies among the batch's
        scored tokens.
        """


class _ChunkedLoss(torch.autograd.Function):
    """The loss of all tokens, and the gradient in their hidden states, a few logits at a time.

    The head does not train, so its backward can run right after its forward, chunk by chunk: the
    logits of a chunk are gone before those of the next are made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Callable[[Tensor], Tensor],
        loss: Loss,
        size: int,
        differentiate: bool,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if differentiate else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            part = hidden[rows].detach().requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate):
                logits = head(part)
            value, wanted = loss(logits.detach(), targets[rows], rows)
            total += value
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(logits, part, wanted)[0]
            del logits, wanted
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grads[0], None, None, None, None, None


class TrainedModel(nn.Module):
    """A causal language model whose forward returns the mean loss over scored tokens.

    A position is scored where the label of the next one is not -100.
    """

    accepts_loss_kwargs = True  # the Trainer then gives the number of scored tokens of a whole step
    loss_type = "ForCausalLM"  # and counts labels as a causal language model shifts them

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def loss(self, batch: dict[str, Tensor | None], scored: Tensor, output: Any) -> Loss:
        """The loss of a batch, given what the body made of it; `scored` bool [batch, length - 1]
        are the positions that count."""
        return lambda logits, targets, rows: cross_entropy(logits, targets)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        targets = labels[:, 1:]
        scored = targets != IGNORED
        if attention_mask is not None and _comes_after(attention_mask, scored):
            attention_mask = None
        output = run_body(self.model, input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state[:, :-1][scored]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, **extra}
        loss = self.loss(batch, scored, output)
        with open_head(self.model, output) as head:
            total = _ChunkedLoss.apply(
                hidden,
                targets[scored],
                head,
                loss,
                chunk_tokens(self.model),
                torch.is_grad_enabled(),
            )
        count = len(hidden) if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}


def _comes_after(mask: Tensor, scored: Tensor) -> bool:
    """Whether padding lies behind all tokens of its row, none of it scored: no causal model then
    sees it from where it counts, and without a mask attention is several times as fast."""
    if mask.dim() != 2:
        return False
    here, next_one = mask[:, :-1].bool(), mask[:, 1:].bool()
    return bool(((here | ~next_one) & (here | ~scored)).all())


# --- Activations -----------------------------------------------------------------------------


def set_checkpointing(model: PreTrainedModel, kind: Checkpointing) -> None:
    """What of a block's forward is kept for its backward.

    "none" keeps all that the backward wants, which of a frozen packed linear is nothing.
    "selective" keeps the outputs of packed products and of attention and computes the rest again;
    on the CPU that saves next to nothing, as the core's operations keep their inputs alone. "full"
    keeps a block's input alone and runs its forward twice.
    """
    if kind == "none":
        model.activation_checkpointing_disable()
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    elif kind != "full":
        raise ValueError(f"checkpointing: expected none, selective or full, got {kind!r}")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    # Wanted by PEFT and by reentrant checkpoints; here it would only differentiate the first block
    # as far as the embeddings.
    model.disable_input_require_grads()


KEPT = (
    "lowbitcore::qgemm_nt",
    "lowbitcore::attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = getattr(operator, "_schema", None) and operator._schema.name
    return CheckpointPolicy.MUST_SAVE if name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


# --- The Trainer -----------------------------------------------------------------------------


class PackedTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer for what was prepared on a model: scales, or an adapter.

    `model` comes from `prepare_peqa` or `prepare_lora`, or from `prepare_lora` and `thaw_scales`;
    `train_dataset` gives `input_ids` and `labels`, int64 tensors (see `data.TrainingSet`).
    `evaluation` returns the perplexity that is
    logged as eval_ppl, with its logarithm as eval_loss, whenever `args` ask for an evaluation.
    Everything else is the Trainer's.

    Scales learn at a relative rate: `scales_lr` (by default `args.learning_rate`) times the median
    size of a linear's that are not 0. They differ tenfold between the linears of one model, and
    more between models, and the optimizers in use move any parameter by about the rate in a step.

    Raises ValueError where nothing was prepared, and FloatingPointError at the first loss or
    gradient that is NaN or Inf; the checkpoints before it are kept. Under a gradient scaler (fp16)
    infinite gradients are normal: it skips their steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        *,
        evaluation: Callable[[PreTrainedModel], float] | None = None,
        checkpointing: Checkpointing = "none",
        scales_lr: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_kind(f"{type(self).__name__}: model", model, PreTrainedModel)
        check_kind(f"{type(self).__name__}: args", args, TrainingArguments)
        if isinstance(train_dataset, str | Mapping) or not hasattr(train_dataset, "__getitem__"):
            raise ValueError(
                f"{type(self).__name__}: train_dataset: expected a TrainingSet, or another data "
                f"set of input_ids and labels, got {type(train_dataset).__name__}"
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"{type(self).__name__}: model: expected one prepared for training, got one with "
                "nothing to train"
            )
        own = {"a", "b", "scales"}  # of adapters and packed linears: all that is saved
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.rpartition(".")[2] not in own:
                raise ValueError(
                    f"{type(self).__name__}: model: expected one prepared for training, got one "
                    f"in which {name} trains, which is not saved"
                )
        self._check_prepared(model)
        if "eval_dataset" in kwargs:
            raise ValueError(
                f"{type(self).__name__}: eval_dataset: expected evaluation, a function of the "
                "model, in its place"
            )
        for name, instead in _NOT_HERE.items():
            if getattr(args, name, None):
                raise ValueError(
                    f"{type(self).__name__}: args: expected no {name} ({instead}), got "
                    f"{getattr(args, name)}"
                )
        if model.dtype == torch.float16 and not args.fp16:
            raise ValueError(
                f"{type(self).__name__}: model: expected bfloat16 or float32, or fp16=True in "
                "args, got float16, in which gradients underflow"
            )
        set_checkpointing(model, checkpointing)
        self._evaluation = evaluation
        self._micro_batch = 0  # of a step's, the one that was run last
        self._scales_lr = args.learning_rate if scales_lr is None else scales_lr
        args.remove_unused_columns = False  # what a batch holds is for the loss to know
        args.include_num_input_tokens_seen = "no"  # counted here, padding left out
        if args.ddp_broadcast_buffers is None:
            # Packed weights are buffers, the same in all processes: no traffic for each forward.
            args.ddp_broadcast_buffers = False
        if args.n_gpu > 1:
            args._n_gpu = 1  # a process for each GPU: DataParallel would leave the teacher behind
        if model.device.type == args.device.type == "cuda" and model.device != args.device:
            raise ValueError(
                f"{type(self).__name__}: model: expected one on {args.device}, where transformers "
                f"trains, got one on {model.device}: choose the GPU by CUDA_VISIBLE_DEVICES"
            )
        super().__init__(
            model=self._trained(model),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=train_dataset if evaluation is not None else None,
            data_collator=collate,
            **kwargs,
        )

    def _check_prepared(self, model: PreTrainedModel) -> None:
        """ValueError where something else was prepared than the method trains."""
        if not adapters.trains_adapter(model):
            raise ValueError(
                f"{type(self).__name__}: model: expected one from prepare_lora, got one whose "
                "scales alone train (see PeqaTrainer)"
            )

    def _trained(self, model: PreTrainedModel) -> TrainedModel:
        return TrainedModel(model)

    @property
    def language_model(self) -> PreTrainedModel:
        return cast(TrainedModel, self.model).model

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_batch = 0
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        mask = inputs.get("attention_mask")  # the Trainer's own count takes padding in
        tokens = torch.tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        everywhere = self.accelerator.gather(tokens.to(self.args.device))
        self.state.num_input_tokens_seen += int(everywhere.sum())
        self._micro_batch += 1
        if not torch.isfinite(loss):
            step, count = self.state.global_step + 1, self.current_gradient_accumulation_steps
            raise FloatingPointError(
                f"training: step {step}, micro-batch {self._micro_batch} of {count}: its loss is "
                f"{float(loss)}"
            )
        # A gradient scaler sees to its gradients by itself.
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            self._check_gradients()
        return loss

    def _check_gradients(self) -> None:
        """A loss may be finite and its gradient not: that must not reach the parameters. Clipping,
        which follows, would make NaN of all of them."""
        gradients = {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        # One number for all of them: to look at it is to wait for the GPU.
        if torch.isfinite(nn.utils.get_total_norm(gradients.values(), math.inf)):
            return
        name = next(name for name, grad in gradients.items() if not torch.isfinite(grad).all())
        raise FloatingPointError(
            f"training: step {self.state.global_step + 1}: the gradient of {name} holds NaN or Inf"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        seen = {"num_input_tokens_seen": self.state.num_input_tokens_seen}
        super().log({**logs, **seen}, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        if self._evaluation is None:
            return {}
        with evaluating(self.language_model):
            ppl = self._evaluation(self.language_model)
        metrics = {f"{metric_key_prefix}_loss": math.log(ppl), f"{metric_key_prefix}_ppl": ppl}
        self.log(metrics)
        handler = self.callback_handler
        self.control: TrainerControl = handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        current: torch.optim.Optimizer | None = self.optimizer  # type: ignore[has-type]
        scaled: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in (model or self.model).named_parameters():
            if parameter.requires_grad:
                (scaled if name.rpartition(".")[2] == "scales" else others).append(parameter)
        if current is not None or not scaled:
            return cast(torch.optim.Optimizer, super().create_optimizer(model))
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args
        )
        options = {**options, "weight_decay": self.args.weight_decay}  # AdamW's own is not 0
        groups: list[dict[str, Any]] = [{"params": others}] if others else []  # its rate is logged
        for item in scaled:
            # Not the mean: groups of nothing but zeros may have large scales.
            sizes = item.detach().abs()
            used = sizes[sizes > 0]
            size = float(used.median()) if len(used) else 0.0
            groups.append({"params": [item], "lr": self._scales_lr * size})
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            adapters.save_adapter(self.language_model, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.language_model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        restore(self.language_model, Path(str(self.state.best_model_checkpoint)))


class PeqaTrainer(PackedTrainer):
    """PEQA (2305.14152): cross-entropy, and of the model nothing but scales, which
    `prepare_peqa` has thawed."""

    def _check_prepared(self, model: PreTrainedModel) -> None:
        if adapters.trains_adapter(model):
            raise ValueError(
                "PeqaTrainer: model: expected one from prepare_peqa, got one in which an adapter "
                "trains (see EmefTrainer)"
            )


class EmefTrainer(PackedTrainer):
    """EMEF (INT2.1, 2306.08162, section 3.1): cross-entropy, and a LoRA adapter on packed linears
    from `prepare_lora`."""


@torch.no_grad()
def restore(model: PreTrainedModel, directory: Path) -> None:
    """Puts what a checkpoint holds into the very parameters that train."""
    if adapters.trains_scales(model):
        adapters.restore_scales(model, directory / scales.FILE)
    if not adapters.trains_adapter(model):
        return
    saved = peft.read(directory).linears
    current = newest_adapters(model)
    if saved.keys() != current.keys():
        raise ValueError(f"{directory}: its adapter covers other linears than the one in training")
    for path, adapter in current.items():
        a, b, scaling = saved[path]
        # A file has alpha, by which a scaling may come back with its last bit changed.
        same = math.isclose(scaling, adapter.scaling, rel_tol=1e-12)
        if a.shape != adapter.a.shape or b.shape != adapter.b.shape or not same:
            raise ValueError(f"{directory}: {path}: its adapter has another rank or alpha")
        adapter.a.copy_(a)
        adapter.b.copy_(b)


class Deadline(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Ends a training that has used up its minutes, after the step it is at; where callbacks are
    restored from a checkpoint, those of the runs before it count."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self._minutes, self._begin = minutes, time.monotonic() - spent

    def state(self) -> dict[str, Any]:
        spent = time.monotonic() - self._begin
        return {"args": {"minutes": self._minutes, "spent": spent}, "attributes": {}}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if time.monotonic() - self._begin >= 60 * self._minutes:
            control.should_training_stop = True


class SaveEvery(TrainerCallback):  # type: ignore[misc]
    """A checkpoint after the step at which the last one is so many seconds old, for steps that
    take long; of several processes, by the clock of the first."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = time.monotonic()

    on_save = on_train_begin

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        due = torch.tensor(time.monotonic() - self._last >= self._seconds, device=args.device)
        if broadcast(due):
            control.should_save = True


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pads on the right to the longest of a batch; the mask is left out where nothing is padded and
    the examples have none of their own.

    What else they have needs a row for each token, as `teacher_hidden` has: ValueError for others.
    """
    for name in ("input_ids", "labels"):
        if any(name not in example for example in examples):
            raise ValueError(f"collate: {name}: expected them in each example of train_dataset")
    lengths = [len(example["input_ids"]) for example in examples]
    longest = max(lengths)
    padding = {"input_ids": 0, "labels": IGNORED}
    if min(lengths) < longest or any("attention_mask" in example for example in examples):
        padding["attention_mask"] = 0
    batch = {
        name: torch.full((len(examples), longest), value, dtype=torch.int64)
        for name, value in padding.items()
    }
    for row, example in enumerate(examples):
        given = {"attention_mask": 1, **example}
        for name, target in batch.items():
            target[row, : lengths[row]] = torch.as_tensor(given[name])
    for name in examples[0].keys() - batch.keys():
        batch[name] = torch.stack([_padded(name, example[name], longest) for example in examples])
    return batch


def _padded(name: str, rows: Any, length: int) -> Tensor:
    if not isinstance(rows, Tensor) or rows.dim() != 2:
        got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"collate: {name}: expected none, or a tensor [tokens, features], got {got}: leave it "
            "out of train_dataset"
        )
    return nn.functional.pad(rows, (0, 0, 0, length - len(rows)))

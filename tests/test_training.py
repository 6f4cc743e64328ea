"""Losses against autograd, and the Trainer: learning, resuming, several processes, faults."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    LlamaConfig,
    PreTrainedModel,
    TrainingArguments,
)
from typer.testing import CliRunner

import lowbitcore as lbc
from lowbitcore import adapters, cli, head, lrec, recipes, run_directory, training
from lowbitcore.blocks import quantized_linears
from lowbitcore.data import IGNORED, Example, TrainingSet, calibration_windows, read_examples
from lowbitcore.formats import peft
from lowbitcore.lora import newest_adapters
from lowbitcore.run_directory import newest_checkpoint
from lowbitcore.training import PackedTrainer, TrainedModel, collate
from test_adapters import excite
from test_cli import fail, run, start, succeed
from test_data import make_tokenizer, text_of
from test_models import LLAMA_LIKE, VOCABULARY, logits, make_model, quantized, windows

# --- Losses ------------------------------------------------------------------------------------


def batch_of(lengths: list[int], *, masked: int = 0) -> dict[str, torch.Tensor]:
    ids = windows(len(lengths), seed=3)
    items = []
    for row, length in zip(ids, lengths, strict=True):
        labels = row[:length].clone()
        labels[:masked] = IGNORED
        items.append({"input_ids": row[:length], "labels": labels})
    return collate(items)


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def whole_logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False
    )
    return output.logits[:, :-1]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 7 * VOCABULARY)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("checkpointing", ["selective", "full", "none"])
def test_cross_entropy(name: str, checkpointing: Any, small_chunks: None) -> None:
    """Loss and gradients, chunk by chunk, are those of torch on all logits at once."""
    model = excite(lbc.prepare_lora(quantized(name), rank=4, targets=None)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    batch = batch_of([48, 20, 33], masked=5)
    targets = batch["labels"][:, 1:]
    expected = functional.cross_entropy(whole_logits(model, batch).transpose(1, 2), targets)
    expected.backward()
    wanted = gradients(model)
    training.set_checkpointing(model, checkpointing)
    loss = TrainedModel(model)(**batch)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found = gradients(model)
    assert found.keys() == wanted.keys() and found
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("where", ["behind", "before", "scored"])
def test_masks_that_models_need(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding behind the tokens, unless it is scored, does without."""
    model = TrainedModel(quantized("llama"))
    batch = batch_of([48, 20])
    if where == "before":
        batch = {name: item.flip(1) for name, item in batch.items()}
    if where == "scored":
        batch["labels"][1, 30] = 5
    expected = functional.cross_entropy(
        whole_logits(model.model, batch).transpose(1, 2), batch["labels"][:, 1:]
    )
    seen = []
    original = training.run_body
    monkeypatch.setattr(
        training,
        "run_body",
        lambda model, **inputs: seen.append(inputs) or original(model, **inputs),
    )
    torch.testing.assert_close(model(**batch)["loss"], expected, rtol=1e-5, atol=0)
    mask = seen[0]["attention_mask"]
    assert (mask is None) == (where == "behind")


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize(("lambda_kl", "lambda_ce"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
def test_distillation(kl: Any, lambda_kl: float, lambda_ce: float, small_chunks: None) -> None:
    model = excite(lbc.prepare_lora(quantized("llama", bits=2), rank=4, targets=None)).train()
    teacher = make_model("llama")
    batch = batch_of([48, 20, 33])
    targets = batch["labels"][:, 1:]
    student = whole_logits(model, batch).log_softmax(-1)
    with torch.no_grad():
        wanted_log = whole_logits(teacher, batch).log_softmax(-1)
    p, q = (wanted_log, student) if kl == "forward" else (student, wanted_log)
    scored = targets != IGNORED
    divergence = ((p.exp() * (p - q)).sum(-1) * scored).sum() / scored.sum()
    entropy = functional.cross_entropy(student.transpose(1, 2), targets)
    expected = lambda_kl * divergence + lambda_ce * entropy
    expected.backward()
    wanted = gradients(model)
    distilled = lrec._DistilledModel(model, teacher, lambda_kl, lambda_ce, kl)
    loss = distilled(**batch)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6)


def test_the_loss_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 5 * VOCABULARY)
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    batch = batch_of([48, 48])
    TrainedModel(model)(**batch)["loss"].backward()
    assert max(sizes) == 5 and sum(sizes) == 2 * 47


# --- Data ------------------------------------------------------------------------------------


def test_training_windows() -> None:
    items = TrainingSet(
        [Example("", text_of(100, seed=i)) for i in range(5)], make_tokenizer(), length=16
    )
    assert len(items) == 5 * 100 // 16
    assert all(torch.equal(item["input_ids"], item["labels"]) for item in items)
    assert {len(item["input_ids"]) for item in items} == {16}
    for wanted in (1, 16, 17, 40):
        part = TrainingSet([Example("", text_of(100))], make_tokenizer(), length=16, tokens=wanted)
        assert len(part) == -(-wanted // 16)
    limited = TrainingSet([Example("", text_of(100))], make_tokenizer(), length=16, limit=2)
    assert len(limited) == 2 and limited.tokens == 32
    assert limited.digest() != items.digest()


def test_training_instructions() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "</s>"
    examples = [Example(text_of(6) + " ", text_of(4)), Example(text_of(30) + " ", text_of(4))]
    plain = TrainingSet(examples, tokenizer, length=20)
    assert sorted(len(item["input_ids"]) for item in plain) == [11, 20]
    assert len(TrainingSet(examples, tokenizer, length=20, tokens=9)) == 1
    assert len(TrainingSet(examples, tokenizer, length=20, tokens=21)) == 2
    masked = TrainingSet(examples, tokenizer, length=20, mask_prompt=True)
    (item,) = list(masked)  # the other's answer lies behind the cut
    silent = [examples[0], Example(text_of(6) + " ", "")]
    assert len(TrainingSet(silent, tokenizer, length=20, mask_prompt=True)) == 1
    assert len(TrainingSet(silent, tokenizer, length=20)) == 2
    assert item["labels"].tolist()[:6] == [IGNORED] * 6
    assert item["labels"].tolist()[6:] == item["input_ids"].tolist()[6:]
    assert item["input_ids"][-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="an instruction whose prompt is shorter, got none in 2"):
        TrainingSet(examples, tokenizer, length=5, mask_prompt=True)


def test_texts_among_instructions() -> None:
    """They are cut into windows, too, and not to the first."""
    tokenizer = make_tokenizer()
    examples = [Example(text_of(6) + " ", text_of(4)), Example("", text_of(100))]
    mixed = TrainingSet(examples, tokenizer, length=20)
    assert sorted(len(item["input_ids"]) for item in mixed) == [10, 20, 20, 20, 20, 20]
    assert len(TrainingSet(examples, tokenizer, length=20, limit=3)) == 3
    with pytest.raises(ValueError, match="mask_prompt: expected instructions, got texts alone"):
        TrainingSet(examples[1:], tokenizer, length=20, mask_prompt=True)


# --- The Trainer -------------------------------------------------------------------------------


def arguments(out: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(out),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        }
    )


def lesson(count: int = 64) -> TrainingSet:
    """The same sentence over and over: quickly learnt."""
    text = " ".join([text_of(8)] * (2 * count))
    return TrainingSet([Example("", text)], make_tokenizer(), length=16, limit=count)


def losses(trainer: Any) -> list[float]:
    return [item["loss"] for item in trainer.state.log_history if "loss" in item]


def test_peqa_learns_with_scales_alone(tmp_path: Path) -> None:
    model = lbc.prepare_peqa(quantized("llama"))
    frozen = {
        name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad
    }
    codes = [linear.packed.clone() for linear in quantized_linears(model).values()]
    trainer = lbc.PeqaTrainer(model, arguments(tmp_path, learning_rate=0.1), lesson())
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    current = dict(model.named_parameters())
    assert all(torch.equal(current[name], value) for name, value in frozen.items())
    after = [linear.packed for linear in quantized_linears(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(codes, after, strict=True))
    lbc.save_adapter(model, tmp_path / "task")
    other = quantized("llama")
    lbc.swap_scales(other, tmp_path / "task")
    assert torch.equal(logits(other.eval()), logits(model.eval()))
    lbc.save(model, tmp_path / "exported")  # scales rounded to fp16
    exported = lbc.load(tmp_path / "exported")
    torch.testing.assert_close(logits(exported), logits(model), rtol=5e-3, atol=5e-3)


def test_peqas_learning_rate_is_relative(tmp_path: Path) -> None:
    """AdamW's first step moves a parameter by the rate: here by so much of its linear's median,
    which a few scales, such as those of groups of zeros, do not move."""
    model = lbc.prepare_peqa(quantized("llama"))
    linears = quantized_linears(model)
    with torch.no_grad():
        for i, linear in enumerate(linears.values()):
            linear.scales *= 1 + i
            linear.scales[0, :3] *= 100
    before = [linear.scales.detach().clone() for linear in linears.values()]
    settings = arguments(tmp_path, learning_rate=0.01, max_steps=1)
    lbc.PeqaTrainer(model, settings, lesson()).train()
    for old, linear in zip(before, linears.values(), strict=True):
        moved = (linear.scales - old).flatten()[3:].abs().max()
        torch.testing.assert_close(moved, 0.01 * old.abs().median(), rtol=1e-3, atol=0)


def test_scales_of_which_most_are_zero_learn(tmp_path: Path) -> None:
    model = lbc.prepare_peqa(quantized("llama"))
    linears = list(quantized_linears(model).values())
    with torch.no_grad():
        for linear in linears:
            linear.scales[:, : linear.scales.shape[1] * 3 // 4] = 0
        linears[-1].scales.zero_()
    optimizer = lbc.PeqaTrainer(model, arguments(tmp_path), lesson()).create_optimizer()
    rates = [group["lr"] for group in optimizer.param_groups]
    wanted = [1e-2 * float(x.scales[x.scales != 0].detach().abs().median()) for x in linears[:-1]]
    assert rates == pytest.approx([*wanted, 0.0]) and min(wanted) > 0


def test_optimizers_of_ones_own(tmp_path: Path) -> None:
    """Scales have rates of their own; everything else is the Trainer's business."""
    model = lbc.prepare_lora(quantized("llama"), rank=2, targets=None)
    settings = arguments(tmp_path / "run", learning_rate=1e-3)
    choice = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}
    plain = lbc.EmefTrainer(model, settings, lesson(), **choice).create_optimizer()
    assert type(plain) is torch.optim.SGD and len(plain.param_groups) == 2  # with and without decay
    assert {group["lr"] for group in plain.param_groups} == {0.5}
    lbc.thaw_scales(model)
    scales = [linear.scales for linear in quantized_linears(model).values()]
    both = lbc.EmefTrainer(model, settings, lesson(), scales_lr=0.01, **choice).create_optimizer()
    assert type(both) is torch.optim.SGD and both.param_groups[0]["lr"] == 0.5
    assert len(both.param_groups) == 1 + len(scales)
    for group, item in zip(both.param_groups[1:], scales, strict=True):
        assert group["params"][0] is item
        assert group["lr"] == pytest.approx(0.01 * float(item.detach().abs().median()))


def test_emef_learns(tmp_path: Path) -> None:
    model = lbc.prepare_lora(quantized("llama", bits=3), rank=4)
    trainer = lbc.EmefTrainer(model, arguments(tmp_path), lesson())
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


def test_lrec_repairs(tmp_path: Path) -> None:
    """The student comes nearer to its teacher, the same from a live and from a stored one."""
    data = TrainingSet([Example("", text_of(40 * 32))], make_tokenizer(), length=32)
    teacher = make_model("llama")
    unseen = text_of(200, seed=8)
    ids = torch.tensor([make_tokenizer()(unseen)["input_ids"][:100]])

    @torch.no_grad()
    def distance(model: PreTrainedModel) -> float:
        p, q = (m.eval()(input_ids=ids).logits.log_softmax(-1) for m in (teacher, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    runs = []
    cache = lbc.TeacherCache.fill(tmp_path / "cache", teacher, data, progress=False)
    for source in (teacher, cache):
        torch.manual_seed(0)
        model = lbc.prepare_lora(quantized("llama", bits=2), rank=8, alpha=8, targets=None)
        before = distance(model)
        settings = arguments(tmp_path / "run", max_steps=60, learning_rate=3e-3)
        trainer = lbc.LrecTrainer(model, settings, data, teacher=source, lambda_ce=0.0)
        trainer.train()
        assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]
        assert distance(model) < 0.95 * before  # the teacher is random: little carries over
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_accumulation_and_unequal_lengths(tmp_path: Path) -> None:
    """A step's loss is the mean over all its tokens, however it is cut into micro-batches."""
    tokenizer = make_tokenizer()
    examples = [Example(text_of(3 + i % 5) + " ", text_of(2 + i, seed=i)) for i in range(16)]
    data = TrainingSet(examples, tokenizer, length=24, mask_prompt=True)
    runs = []
    for micro, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = lbc.prepare_lora(quantized("llama"), rank=4)
        settings = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
        trainer = lbc.EmefTrainer(model, arguments(tmp_path, max_steps=4, **settings), data)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.parametrize("lengths", [[6, 6], [6, 4]])
def test_a_data_set_with_masks_of_its_own(lengths: list[int], tmp_path: Path) -> None:
    """They are taken as they are, of tensors as of lists."""
    examples = [
        {
            "input_ids": list(range(1, length + 1)),
            "attention_mask": [0] + [1] * (length - 1),
            "labels": [IGNORED, *range(2, length + 1)],
        }
        for length in lengths
    ]
    batch = collate(examples)
    wanted = [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, *([1, 1] if lengths[1] == 6 else [0, 0])]]
    assert batch["attention_mask"].tolist() == wanted
    tensors = Dataset.from_list(examples).with_format("torch")
    again = collate([tensors[0], tensors[1]])
    assert again.keys() == batch.keys()
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    trainer = lbc.EmefTrainer(model, arguments(tmp_path, max_steps=1), tensors)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(lengths) - 2


@pytest.mark.parametrize("value", [[0, 0, 0], torch.zeros(3, dtype=torch.int64), "w1 w2 w3", 3])
def test_columns_that_nobody_knows(value: Any) -> None:
    example = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "token_type_ids": value}
    with pytest.raises(ValueError, match="collate: token_type_ids: expected none, or a tensor"):
        collate([example, example])


@pytest.mark.parametrize("missing", ["input_ids", "labels"])
def test_columns_that_are_needed(missing: str) -> None:
    whole = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    part = {name: value for name, value in whole.items() if name != missing}
    with pytest.raises(ValueError, match=f"collate: {missing}: expected them in each example"):
        collate([whole, part])


def test_evaluation_and_early_stop(tmp_path: Path) -> None:
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    values = iter([9.0, 8.0, 8.5, 8.6, 8.7, 8.8])
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    trainer = lbc.EmefTrainer(
        model,
        arguments(tmp_path, **settings),
        lesson(),
        evaluation=lambda model: next(values),
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert trainer.state.global_step == 8
    assert [x["eval_ppl"] for x in trainer.state.log_history if "eval_ppl" in x] == [9, 8, 8.5, 8.6]
    saved = lbc.load_adapter(quantized("llama"), tmp_path / "checkpoint-4")
    assert torch.equal(logits(saved), logits(model.eval()))


def poison(model: PreTrainedModel, step: int) -> Callable[..., None]:
    count = [0]

    def hook(module: Any, args: Any, output: Any) -> Any:
        count[0] += 1
        return output * float("nan") if count[0] == step else None

    return hook


def test_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    trainer = lbc.EmefTrainer(
        model, arguments(tmp_path, save_strategy="steps", save_steps=2), lesson()
    )
    model.model.norm.register_forward_hook(poison(model, 6))
    with pytest.raises(FloatingPointError, match="step 6, micro-batch 1 of 1: its loss is nan"):
        trainer.train()
    good = newest_checkpoint(tmp_path)
    assert good is not None and good.name == "checkpoint-4"
    lbc.load_adapter(quantized("llama"), good)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_loss_that_is_not_a_number_in_a_part_of_a_step(tmp_path: Path) -> None:
    """The last step of a pass over the data may have fewer of them."""
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    for examples, bad, message in (
        (64, 7, "step 2, micro-batch 3 of 4: its loss is nan"),
        (6, 6, "step 2, micro-batch 2 of 2: its loss is nan"),
    ):
        trainer = lbc.EmefTrainer(model, arguments(tmp_path, **cut), lesson(examples))
        handle = model.model.norm.register_forward_hook(poison(model, bad))
        with pytest.raises(FloatingPointError, match=message):
            trainer.train()
        handle.remove()


def test_a_gradient_that_is_not_a_number(tmp_path: Path) -> None:
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    # Not the first one: clipping makes NaN of all of them.
    name, parameter = [(n, p) for n, p in model.named_parameters() if p.requires_grad][2]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = parameter.detach().clone()
    trainer = lbc.EmefTrainer(model, arguments(tmp_path), lesson())
    with pytest.raises(FloatingPointError, match=f"step 1: the gradient of model.{name} holds NaN"):
        trainer.train()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_all_gradients_are_looked_at_once(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    trainer = lbc.EmefTrainer(model, arguments(tmp_path), lesson())
    trainer.state.global_step = 6
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for _, parameter in trained[:-1]:
        parameter.grad = torch.full_like(parameter, 1e30)  # whose squares are infinite
    looks = []
    finite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: looks.append(x) or finite(x))
    trainer._check_gradients()
    assert len(looks) == 1 and looks[0].numel() == 1
    name, parameter = trained[-2]
    parameter.grad[0, 1] = value
    with pytest.raises(FloatingPointError, match=f"step 7: the gradient of model.{name} holds"):
        trainer._check_gradients()


def test_a_scaler_sees_to_its_gradients_by_itself(tmp_path: Path) -> None:
    """It skips the step, and tries a smaller scale."""
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    trainer = lbc.EmefTrainer(model, arguments(tmp_path), lesson())
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda x: x * torch.inf)
    trainer.accelerator.scaler = SimpleNamespace(scale=lambda loss: loss)
    trainer.training_step(trainer.model, collate([lesson()[0]]))
    trainer.accelerator.scaler = None
    with pytest.raises(FloatingPointError, match="gradient"):
        trainer.training_step(trainer.model, collate([lesson()[0]]))


def test_settings_that_mean_something_else_here(tmp_path: Path) -> None:
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    for name, value, message in (
        ("activation_checkpointing", True, 'but checkpointing="full"'),
        ("label_smoothing_factor", 0.1, "losses are the methods' own"),
        ("neftune_noise_alpha", 5, "losses are the methods' own"),
    ):
        with pytest.raises(ValueError, match=f"args: expected no {name} .{message}"):
            lbc.EmefTrainer(model, arguments(tmp_path, **{name: value}), lesson())
    counted = arguments(tmp_path, include_num_input_tokens_seen="all", max_steps=2)
    trainer = lbc.EmefTrainer(model, counted, lesson())
    trainer.train()
    in_a_step = counted.per_device_train_batch_size * counted.gradient_accumulation_steps
    assert trainer.state.num_input_tokens_seen == 2 * in_a_step * len(lesson()[0]["input_ids"])
    with pytest.raises(ValueError, match="float16, in which gradients underflow"):
        lbc.EmefTrainer(model.half(), arguments(tmp_path), lesson())


def test_gradients_of_a_float16_checkpoint(place: Path, tmp_path: Path) -> None:
    """They are those of bfloat16, which does not lose what a mean over many tokens makes small."""
    model = lbc.load(place / "quantized").half()
    lbc.save(model, tmp_path / "q", make_tokenizer())
    assert lbc.load(tmp_path / "q").dtype == torch.float16
    data = ("--data", place / "text.txt", "--length", 32, "--steps", 2)
    done = run("emef", tmp_path / "q", tmp_path / "out", *data)
    assert done.returncode == 0, done.stderr
    assert "gradients underflow: trained in bfloat16" in done.stderr


def test_an_adapter_of_any_scaling_is_taken_up_again(tmp_path: Path) -> None:
    """A file has alpha: 8 / sqrt(5) comes back with its last bit changed."""
    model = lbc.prepare_lora(quantized("llama"), rank=5)
    for adapter in newest_adapters(model).values():
        adapter.scaling = 8 / 5**0.5
        assert adapter.scaling * 5 / 5 != adapter.scaling
    lbc.save_adapter(model, tmp_path)
    training.restore(model, tmp_path)
    for adapter in newest_adapters(model).values():
        adapter.scaling *= 1.001
    with pytest.raises(ValueError, match="another rank or alpha"):
        training.restore(model, tmp_path)


def test_nothing_to_train(tmp_path: Path) -> None:
    model = quantized("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="got one with nothing to train"):
        lbc.EmefTrainer(model, arguments(tmp_path), lesson())


def test_arguments_of_other_kinds(tmp_path: Path) -> None:
    lora, peqa = lbc.prepare_lora(quantized("llama")), lbc.prepare_peqa(quantized("llama"))
    settings, teacher = arguments(tmp_path), make_model("llama")
    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA_LIKE, "vocab_size": 64}))
    for call, message in (
        (lambda: lbc.EmefTrainer(lora, None, lesson()), "args: expected a TrainingArguments"),
        (lambda: lbc.EmefTrainer(lora, settings, "t.txt"), "train_dataset: expected a TrainingSet"),
        (lambda: lbc.EmefTrainer(peqa, settings, lesson()), "expected one from prepare_lora"),
        (lambda: lbc.PeqaTrainer(lora, settings, lesson()), "expected one from prepare_peqa"),
        (
            lambda: lbc.LrecTrainer(lora, settings, lesson(), teacher=quantized("llama")),
            "teacher: expected a 16-bit model, got a packed one",
        ),
        (
            lambda: lbc.LrecTrainer(lora, settings, lesson(), teacher=other),
            "teacher: expected one of 96 tokens, .*, got 64",
        ),
        (
            lambda: lbc.LrecTrainer(lora, settings, lesson(), teacher=teacher, lambda_kl="1"),
            "lambda_kl: expected 0 or more, got '1'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_would_not_be_saved_does_not_train(tmp_path: Path) -> None:
    """A model as it is loaded, which nobody has prepared."""
    model = quantized("llama")
    with pytest.raises(ValueError, match=r"in which model\.embed_tokens\.weight trains"):
        lbc.EmefTrainer(model, arguments(tmp_path), lesson())
    lbc.prepare_peqa(model)
    with pytest.raises(ValueError, match="eval_dataset: expected evaluation"):
        lbc.PeqaTrainer(model, arguments(tmp_path), lesson(), eval_dataset=lesson())


def test_newest_checkpoint_passes_over_what_a_kill_cut_off(tmp_path: Path) -> None:
    for step, text in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-14").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert newest_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", "empty"),
        ("optimizer.pt", "cut off"),
        ("optimizer.pt", "changed"),
        ("adapter_model.safetensors", "empty"),
        ("adapter_model.safetensors", "cut off"),  # they have no checksum
    ],
)
def test_newest_checkpoint_passes_over_a_damaged_one(
    name: str, damage: str, tmp_path: Path
) -> None:
    for step in (2, 10):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        torch.save({"step": torch.arange(100)}, directory / "optimizer.pt")
        save_file({"a": torch.arange(100)}, directory / "adapter_model.safetensors")
        (directory / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    path = tmp_path / "checkpoint-10" / name
    content = bytearray(path.read_bytes())
    middle = content.index(torch.arange(100).numpy().tobytes()) + 400
    if damage == "changed":
        content[middle] ^= 1
    path.write_bytes(content[: {"empty": 0, "cut off": middle, "changed": None}[damage]])
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_run_without_a_checkpoint_may_begin_anew(place: Path) -> None:
    (place / "begun").mkdir()
    (place / "begun" / "training.json").write_text("{}")
    _, result = succeed(*command(place, "peqa", "begun", "--steps", 1))
    assert result["steps"] == 1


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_whose_record_was_not_written(
    killed: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a full disk, or as it was killed: neither its lock nor what it had begun is in the way."""
    trained = command(place, "peqa", "", "--steps", 1)
    trained[2] = tmp_path

    def full(*arguments: Any) -> None:
        if killed:
            (tmp_path / ".training.json.k2n4_abc.tmp").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.files, "write_json", full)
        assert "No space left" in run(*trained).stderr
        with pytest.raises(OSError, match="No space left") as caught:
            run_directory.begin(tmp_path, {}, steps=1, identity={})
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".tmp"] == [".lock"]
    _, result = succeed(*trained)
    assert result["steps"] == 1 and caught.value.errno == 28
    assert not list(tmp_path.glob(".*"))


def test_a_training_that_failed_keeps_no_lock(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its exception is still at hand."""
    schedule = recipes.Schedule(str(place / "text.txt"), steps=1, length=32)
    recipe = recipes.Recipe(str(place / "quantized"), schedule)

    def train(resume: bool) -> None:
        recipes.train(recipe, tmp_path / "out", resume=resume, say=lambda line: None)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_result", full)
        with pytest.raises(OSError, match="No space left") as caught:
            train(resume=False)
    train(resume=True)
    assert caught.value.errno == 28


# --- The teacher's cache -----------------------------------------------------------------------


def test_a_cache_is_bound_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lrec, "SHARD", 8)
    teacher, data = make_model("llama"), lesson(20)
    size = lbc.TeacherCache.bytes_needed(teacher, data)
    assert size == 20 * 16 * 64 * 4
    cache = lbc.TeacherCache.fill(tmp_path, teacher, data, progress=False)
    shards = sorted(tmp_path.glob("states-*"))
    assert len(shards) == 3
    assert size < sum(shard.stat().st_size for shard in shards) < 1.1 * size
    kept, lost = shards[0].stat().st_mtime_ns, shards[1].read_bytes()
    shards[1].unlink()
    lbc.TeacherCache.fill(tmp_path, teacher, data, progress=False)
    assert shards[0].stat().st_mtime_ns == kept and shards[1].read_bytes() == lost
    with pytest.raises(ValueError, match="another teacher"):
        lbc.TeacherCache.fill(tmp_path, make_model("llama", seed=1), data, progress=False)
    with pytest.raises(ValueError, match="states of other data, or of another number"):
        lbc.TeacherCache.fill(tmp_path, teacher, lesson(19), progress=False)
    with pytest.raises(ValueError, match="holds states of other data"):
        cache.attach(lesson(19))
    with pytest.raises(ValueError, match="head or its dtype is not the teacher's"):
        cache.check_head(make_model("llama", seed=1))
    shards[0].write_bytes(shards[0].read_bytes()[:-9])
    with pytest.raises(ValueError, match="states-00000.safetensors: damaged: delete it"):
        cache.states(0)


def test_a_cache_knows_its_teachers_config(tmp_path: Path) -> None:
    """By which the same weights make other states."""
    teacher, data = make_model("llama"), lesson(4)
    lbc.TeacherCache.fill(tmp_path, teacher, data, progress=False)
    teacher.config.rms_norm_eps *= 10
    with pytest.raises(ValueError, match="another config"):
        lbc.TeacherCache.fill(tmp_path, teacher, data, progress=False)


def test_a_cache_whose_filling_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves is taken away; while it runs, others are kept out."""
    leftover = tmp_path / ".cache.json.k2n4_abc.tmp"
    leftover.write_text("{")
    teacher, data = make_model("llama"), lesson(4)
    entry = lrec._entry

    def and_another(*arguments: Any) -> Any:
        with pytest.raises(ValueError, match="another run is writing there"):
            lbc.TeacherCache.fill(tmp_path, teacher, data, progress=False)
        return entry(*arguments)

    monkeypatch.setattr(lrec, "_entry", and_another)
    lbc.TeacherCache.fill(tmp_path, teacher, data, progress=False)
    assert not leftover.exists()


def test_a_cache_with_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(lrec.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs 0\.00 GB"):
        lbc.TeacherCache.fill(tmp_path / "cache", make_model("llama"), lesson(), progress=False)


@pytest.mark.parametrize(
    ("processes", "more", "message"),
    [
        (1, ["--lambda-ce", -1], "--lambda-ce: expected 0 or more, got -1"),
        (1, ["--lambda-kl", "inf"], "--lambda-kl: expected 0 or more, got inf"),
        (1, ["--lambda-kl", 0, "--lambda-ce", 0], "--lambda-kl: expected one lambda above 0"),
        (
            2,
            ["--micro-batch", 4],
            "--batch: expected a multiple of 8 sequences, 4 on each of 2",
        ),
    ],
)
def test_settings_are_checked_before_a_cache_is_filled(
    processes: int, more: list[object], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    cache = place / "cache-of-none"
    trained = command(place, "lrec", "bad", "--steps", 5, "--cache", cache)
    assert message in fail(*trained, *more)
    assert not cache.exists() and not (place / "bad").exists()


def test_where_nothing_can_be_written_is_said_first(place: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    trained = command(place, "lrec", "text.txt/out", "--steps", 1, "--cache", cache)
    assert re.search(r"text\.txt/out: cannot be written: .*: Not a directory", fail(*trained))
    assert not cache.exists()
    beside = command(place, "lrec", "bad", "--steps", 1, "--cache", place / "text.txt" / "cache")
    assert re.search(r"text\.txt/cache: cannot be written: ", fail(*beside))


def test_a_cache_that_holds_other_things(place: Path, tmp_path: Path) -> None:
    """Nothing is said of what it would take."""
    (tmp_path / "notes").write_text("x")
    done = run(*command(place, "lrec", "bad", "--steps", 5, "--cache", tmp_path))
    said = "expected an empty or new directory, got 'notes' in it"
    assert said in done.stderr and " MB" not in done.stderr
    (tmp_path / "notes").unlink()
    done = run(*command(place, "lrec", "cached", "--steps", 1, "--cache", tmp_path))
    assert "teacher cache, 0.0 MB" in done.stderr
    other = command(place, "lrec", "bad", "--steps", 5, "--seed", 9, "--cache", tmp_path)
    done = run(*other)
    assert "holds states of other data" in done.stderr and " MB" not in done.stderr


# --- The commands ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, `quantized` (2 bits), `text.txt` and `alpaca.json`."""
    directory = tmp_path_factory.mktemp("training")
    model = make_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(directory / "model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory / "model")
    (directory / "text.txt").write_text(text_of(6000))
    records = [
        {"instruction": text_of(4, seed=i), "input": "", "output": text_of(6, seed=i)}
        for i in range(50)
    ]
    (directory / "alpaca.json").write_text(json.dumps(records))
    calibration = ("--calib", directory / "text.txt", "--samples", 8, "--length", 64)
    succeed(
        *("quantize", directory / "model", directory / "quantized"),
        *("--bits", 2, "--group-size", 32, *calibration),
    )
    return directory


def command(place: Path, method: str, out: str, *more: object) -> list[object]:
    data = place / ("alpaca.json" if method == "emef" else "text.txt")
    common = ["--data", data, "--length", 32, "--batch", 4, "--lr", 0.003]
    if method == "lrec":
        common += ["--teacher", place / "model"]
    return [method, place / "quantized", place / out, *common, *more]


@pytest.mark.parametrize("method", ["peqa", "emef", "lrec"])
def test_commands(method: str, place: Path) -> None:
    more = ["--mask-prompt"] if method == "emef" else []
    out, result = succeed(
        *command(place, method, method, "--steps", 20, "--eval-text", place / "text.txt", *more)
    )
    directory = place / method
    product = "scales.safetensors" if method == "peqa" else "adapter_model.safetensors"
    assert result["adapter_bytes"] == (directory / product).stat().st_size
    assert result["steps"] == 20
    assert 0 < result["tokens"] <= 20 * 4 * 32
    assert "20 steps" in out
    left = {path.name for path in directory.iterdir() if not path.name.startswith("runs")}
    expected = {product, "training.png", "trainer_state.json", "training.json"}
    assert left == expected | ({"adapter_config.json"} if method != "peqa" else set())
    _, evaluated = succeed(
        *("eval", place / "quantized", "--text", place / "text.txt", "--context", 128),
        *("--adapter", directory),
    )
    assert evaluated["ppl"] == pytest.approx(result["ppl"], rel=1e-6)
    _, plain = succeed(
        *("eval", place / "quantized", "--text", place / "text.txt", "--context", 128)
    )
    other = "emef" if method == "peqa" else "peqa"
    assert "holds a finished training" in fail(*command(place, other, method, "--steps", 20))
    if method != "emef":  # which saw other text
        assert evaluated["ppl"] < plain["ppl"]
    if method == "peqa":  # as they are in a model saved with them
        stored = load_file(directory / product).values()
        assert all(torch.equal(x, x.half().float()) for x in stored)
    assert "holds a finished training" in fail(*command(place, method, method, "--steps", 20))


def test_lrec_with_scales(place: Path) -> None:
    """Adapter and scales train at once, lie side by side, and count no bytes but the adapter's."""
    text = ("--text", place / "text.txt", "--context", 128)
    results = {}
    for name, more in (("alone", ()), ("joint", ("--scales-lr", 0.02))):
        trained = command(place, "lrec", name, "--steps", 20, "--eval-text", place / "text.txt")
        _, results[name] = succeed(*trained, *more)
    joint = ("--adapter", place / "joint")
    assert results["joint"]["ppl"] < results["alone"]["ppl"]
    _, evaluated = succeed("eval", place / "quantized", *text, *joint)
    assert evaluated["ppl"] == pytest.approx(results["joint"]["ppl"], rel=1e-6)
    sizes = [
        succeed("info", place / "quantized", "--adapter", place / name)[1]["bits_with_adapters"]
        for name in results
    ]
    assert sizes[0] == sizes[1]
    # What was trained apart is not put together.
    shutil.copy(place / "joint" / "scales.safetensors", place / "joint-scales")
    lbc.save_adapter(lbc.load(place / "quantized"), place / "other-scales")
    shutil.copy(place / "other-scales" / "scales.safetensors", place / "joint")
    assert "not the one it was trained with" in fail("eval", place / "quantized", *text, *joint)
    (place / "joint" / "scales.safetensors").unlink()
    assert "scales.safetensors" in fail("eval", place / "quantized", *text, *joint)
    shutil.copy(place / "joint-scales", place / "joint" / "scales.safetensors")
    succeed("eval", place / "quantized", *text, *joint)


@pytest.mark.parametrize("words", [6000, 300])
def test_a_kill_between_scales_and_adapter(
    words: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scales of a pair are written first, and are no finished training. To resume it takes no
    step more, in the middle of a pass over the data, too."""
    (tmp_path / "text.txt").write_text(text_of(words))
    options = ["--data", tmp_path / "text.txt", "--steps", 4, "--scales-lr", 0.02]
    _, whole = succeed(*command(place, "lrec", f"whole-{words}", *options))
    out = f"pair-{words}"
    trained = command(place, "lrec", out, *options)
    write = peft.write

    def killed(directory: Path, *arguments: Any, **more: Any) -> None:
        if directory == place / out:
            raise KeyboardInterrupt
        write(directory, *arguments, **more)

    monkeypatch.setattr(peft, "write", killed)
    assert CliRunner().invoke(cli.app, [str(word) for word in trained]).exit_code != 0
    assert (place / out / "scales.safetensors").exists()
    monkeypatch.setattr(peft, "write", write)
    _, result = succeed(*trained, "--resume")
    for name in ("steps", "tokens", "loss"):
        assert result[name] == whole[name]
    for name in ("scales.safetensors", "adapter_model.safetensors"):
        ours, theirs = (load_file(place / x / name) for x in (out, f"whole-{words}"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert "holds a finished training" in fail(*trained)


def test_a_kill_after_the_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To resume is then to clean up."""
    trained = command(place, "emef", "ended", "--steps", 4)

    remove = shutil.rmtree

    def killed(path: Any, *more: Any, **settings: Any) -> None:
        if (place / "ended" / "adapter_config.json").exists():
            raise KeyboardInterrupt
        remove(path, *more, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        assert CliRunner().invoke(cli.app, [str(word) for word in trained]).exit_code != 0
    assert list((place / "ended").glob("checkpoint-*"))
    assert "holds a finished training" in fail(*trained)
    _, result = succeed(*trained, "--resume")
    assert result["steps"] == 4 and result["adapter_bytes"] > 0
    assert not list((place / "ended").glob("checkpoint-*"))
    assert "holds a finished training" in fail(*trained, "--resume")


def test_as_many_tokens_as_asked_for(place: Path) -> None:
    """Though a pass over few examples ends with less than a batch."""
    (place / "little.txt").write_text(text_of(100))
    data = ("--data", place / "little.txt", "--length", 32, "--batch", 2)
    examples = TrainingSet(read_examples(place / "little.txt"), make_tokenizer(), length=32)
    assert len(examples) == 3
    _, result = succeed("emef", place / "quantized", place / "few", *data, "--tokens", 384)
    assert result["tokens"] == 384


def test_stack_of_commands(place: Path) -> None:
    """INT2.1, D.2: correct, freeze, fine-tune on top; both are given to the other commands."""
    succeed(*command(place, "lrec", "below", "--tokens", 1000, "--cache", place / "cache"))
    succeed(*command(place, "emef", "above", "--steps", 5, "--adapter", place / "below"))
    stack = ["--adapter", place / "below", "--adapter", place / "above"]
    _, result = succeed(
        *("eval", place / "quantized", "--text", place / "text.txt", "--context", 128, *stack)
    )
    assert result["ppl"] > 1


def test_minutes(place: Path) -> None:
    begin = time.monotonic()
    _, result = succeed(*command(place, "emef", "minutes", "--minutes", 0.05))
    assert time.monotonic() - begin < 60
    # A step takes some 0.05 s; how many fit was estimated from one.
    assert result["steps"] > 3 and result["training_seconds"] > 0.5


def test_minutes_go_on_where_a_run_was_killed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of ten seconds, by this clock, of which the second run has two left."""
    clock = [0.0]
    trained = [str(word) for word in command(place, "emef", "", "--minutes", 1)]
    trained[2] = str(tmp_path / "out")
    step = PackedTrainer.training_step

    def slow(self: PackedTrainer, *arguments: Any, **more: Any) -> torch.Tensor:
        clock[0] += 10
        return step(self, *arguments, **more)

    def interrupted(self: PackedTrainer, *arguments: Any, **more: Any) -> torch.Tensor:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return slow(self, *arguments, **more)

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(recipes, "_seconds_a_step", lambda *_: 1.0)
    monkeypatch.setattr(recipes, "_SAVE_SECONDS", 0)
    monkeypatch.setattr(PackedTrainer, "training_step", interrupted)
    assert CliRunner().invoke(cli.app, trained).exit_code == 130
    monkeypatch.setattr(PackedTrainer, "training_step", slow)
    clock[0] += 1000  # nobody was training
    _, result = succeed(*trained, "--resume")
    assert result["steps"] == 6


def history(directory: Path) -> list[tuple[int, float]]:
    state = json.loads((directory / "trainer_state.json").read_text())
    return [(item["step"], item["loss"]) for item in state["log_history"] if "loss" in item]


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


@pytest.mark.parametrize("method", ["peqa", "emef", "lrec"])
def test_a_killed_run_goes_on_bit_for_bit(method: str, place: Path) -> None:
    straight, killed = place / f"straight-{method}", place / f"killed-{method}"
    steps = 60
    more: tuple[object, ...] = ("--steps", steps, "--micro-batch", 2, "--seed", 5)
    adapter, scales = "adapter_model.safetensors", "scales.safetensors"
    products = {"peqa": [scales], "emef": [adapter], "lrec": [adapter, scales]}[method]
    if method == "lrec":
        more = (*more, "--scales-lr", 0.005)
    process = start(*command(place, method, straight.name, *more))
    assert process.wait(timeout=300) == 0, process.communicate()
    last = random.Random(os.urandom(8)).randrange(1, steps // 2)  # before it is killed
    process = start(*command(place, method, killed.name, *more))
    while newest_checkpoint(killed) is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    again = fail(*command(place, method, killed.name, *more, "--resume"))
    assert "another run is writing there" in again
    process.send_signal(signal.SIGCONT)
    while step_of(newest_checkpoint(killed)) < last:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (killed / "training.png").exists():
        pytest.fail("the run was over before it could be killed")
    at = step_of(newest_checkpoint(killed))
    assert "give --resume" in fail(*command(place, method, killed.name, *more))
    other = fail(*command(place, method, killed.name, *more, "--lr", 0.1, "--resume"))
    assert "cannot resume: schedule.lr: expected 0.003, as in the unfinished run, got 0.1" in other
    process = start(*command(place, method, killed.name, *more, "--resume"))
    assert process.wait(timeout=300) == 0, process.communicate()
    assert history(killed) == history(straight)
    # Steps before the checkpoint were not run again: the Trainer's own mean lacks them.
    losses = [loss for step, loss in history(killed) if step > at]
    assert len(losses) == steps - at
    assert mean_loss(killed) == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert mean_loss(killed) != pytest.approx(mean_loss(straight), rel=1e-6)
    for name in products:
        same = (straight / name).read_bytes() == (killed / name).read_bytes()
        assert same, f"{name}: resumed at step {at}"


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [
        (0, "6: .*checkpoint-6 is kept, --resume goes"),
        (math.inf, "6: there is no checkpoint yet, --resume begins"),
        (None, "0: there is no checkpoint yet, --resume begins"),
    ],
)
def test_a_training_that_is_interrupted(
    seconds: float | None, kept: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints come by the clock, too; Ctrl-C says what there is."""
    trained = [str(word) for word in command(place, "emef", "", "--steps", 70)]
    trained[2] = str(tmp_path / "out")
    step = PackedTrainer.training_step

    def interrupted(self: PackedTrainer, *arguments: Any, **more: Any) -> torch.Tensor:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *arguments, **more)

    def at_once(self: PackedTrainer, *arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "_SAVE_SECONDS", 1000 if seconds is None else seconds)
    with monkeypatch.context() as patch:
        if seconds is None:
            patch.setattr(PackedTrainer, "train", at_once)
        else:
            patch.setattr(PackedTrainer, "training_step", interrupted)
        ended = CliRunner().invoke(cli.app, trained)
    assert ended.exit_code == 130
    assert re.search(f"stopped after step {kept}", ended.stderr)
    newest = newest_checkpoint(tmp_path / "out")
    assert step_of(newest) == (6 if seconds == 0 else 0)
    ended = CliRunner().invoke(cli.app, [*trained, "--resume"])
    assert ended.exit_code == 0
    assert (f"going on from {newest}" in ended.stderr) == (seconds == 0)


def mean_loss(directory: Path) -> float:
    """Of the steps that the last process ran."""
    state = json.loads((directory / "trainer_state.json").read_text())
    (found,) = [item["train_loss"] for item in state["log_history"] if "train_loss" in item]
    return float(found)


@pytest.mark.parametrize("method", ["emef", "lrec"])
def test_two_processes(method: str, place: Path) -> None:
    """Over gloo: a global batch cut in two gives the losses of one process."""
    more: tuple[object, ...] = ("--steps", 8, "--seed", 3)
    more += ("--dropout", 0) if method == "emef" else ("--cache", place / "cache-of-two")
    single, double = place / f"single-{method}", place / f"double-{method}"
    succeed(*command(place, method, single.name, *more))
    if method == "lrec":
        shutil.rmtree(place / "cache-of-two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *(*torchrun, "--nproc-per-node", "2", "-m", "lowbitcore"),
            *map(str, command(place, method, double.name, *more)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = history(single), history(double)
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [x for _, x in two] == pytest.approx([x for _, x in one], rel=5e-3)  # bf16
    trained = [load_file(path / "adapter_model.safetensors") for path in (single, double)]
    for name in (name for name in trained[0] if "lora_B" in name):  # which start as zeros
        a, b = (item[name].float() for item in trained)
        assert float((a - b).norm() / a.norm()) < 0.1, name


def test_settings_do_not_depend_on_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that is not there yet, or no longer, is the same setting; a hub id stays one."""
    (tmp_path / "below").mkdir()
    (tmp_path / "text.txt").touch()

    def settings(above: str) -> dict[str, Any]:
        teacher = recipes.Teacher("organization/name", 1.0, 0.1, "forward", f"{above}cache")
        schedule = recipes.Schedule(f"{above}text.txt", steps=1)
        return recipes._settings(recipes.Recipe(f"{above}below", schedule, teacher=teacher))

    monkeypatch.chdir(tmp_path)
    found = settings("")
    (tmp_path / "cache").mkdir()
    assert settings("") == found
    monkeypatch.chdir(tmp_path / "below")
    assert settings("../") == found
    assert found["teacher"]["model"] == "organization/name"
    assert found["schedule"]["data"] == str(tmp_path / "text.txt")


def test_training_begins_with_other_documents_than_calibration() -> None:
    """Of 640 documents both take a tenth, each in an order of its own."""
    texts = [text_of(50, seed=i) for i in range(640)]
    tokenizer = make_tokenizer()
    calibrated = calibration_windows(texts, tokenizer, samples=64, length=50, seed=3)
    trained = TrainingSet([Example("", x) for x in texts], tokenizer, length=50, limit=64, seed=3)
    seen = {tuple(ids) for ids in calibrated.tolist()}
    again = [tuple(item["input_ids"].tolist()) in seen for item in trained]
    assert len(seen) == len(again) == 64 and sum(again) < 20


def test_an_instruction_begins_as_a_prompt_does() -> None:
    """With bos, where the tokenizer puts one before whatever a model is to answer."""
    example = [Example("a b ", "c")]
    plain, leading = make_tokenizer(), make_tokenizer()
    leading._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert leading("a").input_ids[0] == 1 != plain("a").input_ids[0]
    without, with_bos = (
        TrainingSet(example, tokenizer, length=20, mask_prompt=True)[0]
        for tokenizer in (plain, leading)
    )
    assert with_bos["input_ids"].tolist() == [1, *without["input_ids"].tolist()]
    assert with_bos["labels"].tolist() == [IGNORED, *without["labels"].tolist()]


def test_tokens_are_tokens(place: Path) -> None:
    """Also where examples are shorter than --length."""
    _, result = succeed(*command(place, "emef", "so-many", "--tokens", 1500))
    shown = TrainingSet(
        read_examples(place / "alpaca.json"), make_tokenizer(), length=32, tokens=1500
    )
    mean = shown.tokens / len(shown)
    assert 1500 <= result["steps"] * 4 * mean < 1500 + 4 * 32


def test_another_teacher_is_noted(place: Path, tmp_path: Path) -> None:
    """Beside the student any will do that has its vocabulary; a cache's has to have its head."""
    note = "is not what"
    trained = command(place, "lrec", "", "--steps", 1, "--adapter-bits", 16)
    trained[2] = tmp_path / "own"
    assert note not in CliRunner().invoke(cli.app, [str(word) for word in trained]).stderr
    torch.manual_seed(5)
    other = make_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "model")
    trained[2] = tmp_path / "other"
    trained[trained.index("--teacher") + 1] = tmp_path / "model"
    done = CliRunner().invoke(cli.app, [str(word) for word in trained])
    assert done.exit_code == 0
    assert note in done.stderr
    trained[2] = tmp_path / "cached"
    said = fail(*trained, "--cache", tmp_path / "cache")
    assert "--teacher: " in said and "its head is not that of" in said
    assert not (tmp_path / "cache").exists()


def test_training_of_16_bits_is_noted(place: Path, tmp_path: Path) -> None:
    trained = command(place, "emef", "", "--steps", 1)
    for model, noted in (("quantized", False), ("model", True)):
        trained[1:3] = place / model, tmp_path / model
        done = CliRunner().invoke(cli.app, [str(word) for word in trained])
        assert done.exit_code == 0
        assert ("is not quantized: the adapter" in done.stderr) == noted


def test_presets_are_defaults(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[recipes.Recipe] = []
    monkeypatch.setattr(recipes, "train", lambda recipe, *_, **__: given.append(recipe))

    def recipe_of(*options: str) -> Any:
        arguments = ["lrec", place / "quantized", place / "preset", "--data", place / "text.txt"]
        arguments += ["--teacher", place / "model", "--steps", 1, *options]
        done = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return given.pop()

    recipe = recipe_of("--preset", "int2")
    targets = ("q_proj", "v_proj", "k_proj", "o_proj", "up_proj", "gate_proj")
    assert recipe.lora == recipes.Lora(32, 128, targets, 0.05, bits=8)
    assert (recipe.teacher.lambda_kl, recipe.teacher.kl) == (1, "forward")
    assert recipe.teacher.lambda_ce * 2048 == 120
    assert (recipe.schedule.length, recipe.schedule.batch, recipe.schedule.lr) == (2048, 7, 3e-5)
    for options in (("--rank", "4", "--preset", "int4"), ("--preset", "int4", "--rank", "4")):
        recipe = recipe_of(*options)
        assert (recipe.lora.rank, recipe.lora.alpha, recipe.schedule.lr) == (4, 128, 1e-5)
        assert recipe.teacher.lambda_ce * 2048 == 10
    assert recipe_of().lora == recipes.Lora(8, 8, None, 0.0, bits=8)


def test_every_option_arrives(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(recipes, "train", lambda *ours, **rest: given.append((*ours, rest)))
    monkeypatch.setattr(recipes, "training_device", torch.device)  # there may be no GPU

    def recipe_of(method: str, **options: Any) -> Any:
        arguments: list[Any] = [method, place / "quantized", place / "out"]
        for name, value in options.items():
            values = value if isinstance(value, list) else [value]
            for item in values:
                option = f"--{name.replace('_', '-')}"
                arguments += [option] if item is True else [option, item]
        done = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        recipe, out, rest = given.pop()
        assert out == place / "out" and rest["resume"] == ("resume" in options)
        assert recipe.model == str(place / "quantized")
        return recipe

    schedule = {
        "data": "data.json",
        "length": 77,
        "batch": 12,
        "micro_batch": 4,
        "lr": 0.25,
        "seed": 9,
        "eval_text": "text.txt",
        "checkpointing": "full",
    }
    common = {**schedule, "adapter": ["one", "other"], "device": "cuda", "resume": True}
    lora = {"rank": 3, "alpha": 5.0, "dropout": 0.125, "targets": "up_proj, o_proj"}
    wanted = recipes.Lora(3, 5.0, ("up_proj", "o_proj"), 0.125)
    for length in ({"steps": 7}, {"tokens": 700}, {"minutes": 0.5}):
        recipe = recipe_of("peqa", **common, **length)
        assert recipe.schedule == recipes.Schedule(**schedule, **length)  # type: ignore[arg-type]
        assert (recipe.lora, recipe.teacher, recipe.adapters) == (None, None, ("one", "other"))
        assert (recipe.device, recipe.scales_lr) == ("cuda", None)
    recipe = recipe_of("emef", **common, steps=7, **lora, mask_prompt=True)
    assert recipe.schedule == recipes.Schedule(**schedule, steps=7, mask_prompt=True)  # type: ignore[arg-type]
    assert recipe.lora == wanted and recipe.adapters == ("one", "other")
    assert (recipe.device, recipe.teacher) == ("cuda", None)
    losses = {"lambda_kl": 0.5, "lambda_ce": 0.75, "kl": "reverse", "cache": "states"}
    more = {"steps": 7, "teacher": "whom", "scales_lr": 0.5, "adapter_bits": 16}
    recipe = recipe_of("lrec", **common, **lora, **losses, **more)
    assert recipe.schedule == recipes.Schedule(**schedule, steps=7)  # type: ignore[arg-type]
    assert recipe.lora == wanted and recipe.adapters == ("one", "other")
    assert recipe.teacher == recipes.Teacher("whom", 0.5, 0.75, "reverse", "states")
    assert (recipe.device, recipe.scales_lr) == ("cuda", 0.5)


@pytest.mark.parametrize("adapter_bits", [8, 16])
def test_lrec_starts_at_the_correction(adapter_bits: int, place: Path, tmp_path: Path) -> None:
    corrected = tmp_path / "corrected"
    lbc.quantize_checkpoint(
        place / "model",
        corrected,
        windows(),
        lbc.QuantConfig(bits=2, group_size=64, rank=4, adapter_bits=adapter_bits),
        progress=False,
    )
    text = ("--text", place / "text.txt", "--context", 128)
    _, start = succeed("eval", corrected, "--adapter", corrected / "correction", *text)
    bits = ("--adapter-bits", adapter_bits)
    common = [*command(place, "lrec", "from-correction", "--steps", 1, *bits)]
    common[1:3] = corrected, tmp_path / "from-correction"
    assert re.search("--rank: expected that of .*, 4 ", fail(*common, "--rank", 8))
    for option in ("--alpha", "--dropout"):
        assert re.search(f"{option}: .* has its own", fail(*common, option, 0.5))
    common[common.index("--lr") + 1] = 1e-9  # so that it stays where it starts
    succeed(*common)
    _, after = succeed("eval", corrected, "--adapter", tmp_path / "from-correction", *text)
    assert after["ppl"] == pytest.approx(start["ppl"], rel=5e-4)
    files = (path / "adapter_model.safetensors" for path in (corrected / "correction", common[2]))
    one, other = (sum(x.nbytes for x in load_file(file).values()) for file in files)
    assert one == other
    # The correction counts once: it is in what started from it.
    both = [("--adapter", corrected / "correction"), ("--adapter", tmp_path / "from-correction")]
    for one, other in (both, both[::-1]):
        assert "or what training made of it" in fail("eval", corrected, *one, *other, *text)
    twice = ("--adapter", corrected / "correction", "--start", "closed-form")
    assert "--start: expected zeros where --adapter is given" in fail(*common, *twice)
    common[2] = tmp_path / "on-top"
    succeed(*common, "--adapter", corrected / "correction")
    both = ("--adapter", corrected / "correction", "--adapter", tmp_path / "on-top")
    _, after = succeed("eval", corrected, *both, *text)
    assert after["ppl"] == pytest.approx(start["ppl"], rel=5e-4)
    common[2] = tmp_path / "from-zeros"
    succeed(*common, "--start", "zeros", "--rank", 2)
    _, plain = succeed("eval", corrected, *text)
    _, after = succeed("eval", corrected, "--adapter", tmp_path / "from-zeros", *text)
    assert after["ppl"] == pytest.approx(plain["ppl"], rel=5e-4)
    assert abs(plain["ppl"] / start["ppl"] - 1) > 2e-3
    common[2] = tmp_path / "of-two"
    two = ("--targets", "q_proj,k_proj")
    assert "--targets: " in fail(*common, *two)
    assert "expected names of linears" in fail(*common, "--start", "zeros", "--targets", "p")
    succeed(*common, "--start", "zeros", *two)
    names = load_file(tmp_path / "of-two" / "adapter_model.safetensors")
    assert {name.split(".self_attn.")[-1].split(".")[0] for name in names} == {"q_proj", "k_proj"}
    correction = corrected / "correction"
    _, described = succeed("info", corrected, "--adapter", correction)
    stored = sum(x.nbytes for x in load_file(correction / "adapter_model.safetensors").values())
    expected = 8 * (described["quantized_bytes"] + stored) / described["quantized_weights"]
    assert described["bits_with_adapters"] == expected > described["effective_bits"]
    out, _ = succeed("info", corrected)
    assert f"to be used with its correction: --adapter {correction}" in out
    assert "belongs to another base" in fail("info", place / "quantized", "--adapter", correction)
    assert "expected a quantized model" in fail("info", place / "model", "--adapter", correction)
    with pytest.raises(ValueError, match="correction: belongs to other integers: move or delete"):
        lbc.save(lbc.load(place / "quantized"), corrected)
    lbc.save(lbc.load(corrected), corrected)


def test_resuming_with_other_things(place: Path, tmp_path: Path) -> None:
    """Under the same names: neither other data, nor other integers, nor other scales."""
    model, data = tmp_path / "model", tmp_path / "data.txt"
    shutil.copytree(place / "quantized", model)
    data.write_text(text_of(3000))
    run = ["emef", model, tmp_path / "out", "--data", data, "--length", 32, "--steps", 2000]
    process = start(*run)
    while newest_checkpoint(tmp_path / "out") is None:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    data.write_text(text_of(3000, seed=9))
    assert "cannot resume: not as in the unfinished run: data" in fail(*run, "--resume")
    data.write_text(text_of(3000))
    packed = lbc.load(model)
    for linear in quantized_linears(packed).values():
        linear.scales.data *= 1.5
    lbc.save(packed, model)
    assert "cannot resume: not as in the unfinished run: scales" in fail(*run, "--resume")
    shutil.rmtree(model)
    shutil.copytree(place / "quantized", model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    assert "cannot resume: not as in the unfinished run: config" in fail(*run, "--resume")
    (model / "config.json").write_text(json.dumps(settings))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "cannot resume: not as in the unfinished run: model" in fail(*run, "--resume")
    shutil.rmtree(model)
    succeed("quantize", place / "model", model, "--bits", 4, "--group-size", 32, "--method", "rtn")
    assert "not as in the unfinished run: model, scales" in fail(*run, "--resume")
    assert "holds an unfinished training" in fail("peqa", *run[1:])


def test_tokens_are_counted_without_padding(place: Path) -> None:
    """The same for any micro-batch, of instructions of many lengths."""
    records = [
        {"instruction": text_of(1 + i % 9, seed=i), "input": "", "output": text_of(2, seed=i)}
        for i in range(16)
    ]
    (place / "lengths.json").write_text(json.dumps(records))
    found = set()
    for micro in (1, 4):
        run = ["emef", place / "quantized", place / f"count-{micro}", "--steps", 4, "--batch", 4]
        run += ["--data", place / "lengths.json", "--length", 100, "--micro-batch", micro]
        found.add(succeed(*run)[1]["tokens"])
    whole = TrainingSet(
        read_examples(place / "lengths.json"), make_tokenizer(), length=100, limit=16
    )
    assert found == {whole.tokens}


def test_training_without_its_correction_is_noted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = ("--calib", place / "text.txt", "--samples", 4, "--length", 64)
    form = ("--bits", 2, "--group-size", 32, "--rank", 4)
    succeed("quantize", place / "model", tmp_path / "q", *form, *calibration)
    note = "was quantized to be used with its correction"
    data = ("--data", place / "text.txt", "--steps", 2, "--length", 32)
    correction = ("--adapter", tmp_path / "q" / "correction")
    text = ("--text", place / "text.txt", "--context", 64)

    def noted(*arguments: object) -> bool:
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        return note in done.stderr

    for name, more, expected in (("bare", (), True), ("upon", correction, False)):
        assert noted("emef", tmp_path / "q", tmp_path / name, *data, *more) == expected
        trained = ("--adapter", tmp_path / name)
        assert noted("eval", tmp_path / "q", *more, *trained, *text) == expected
    teacher = ("--teacher", place / "model")
    assert not noted("lrec", tmp_path / "q", tmp_path / "on", *data, *teacher)
    assert not noted("eval", tmp_path / "q", "--adapter", tmp_path / "on", *text)
    # Of a hub id it lies in what was fetched.
    monkeypatch.setattr("lowbitcore.source._download", lambda name: tmp_path / "q")
    said: list[str] = []
    adapters.note_correction(lbc.load("somebody/q"), said.append)
    assert len(said) == 1 and note in said[0]
    described, _ = succeed("info", "somebody/q")
    assert f"to be used with its correction: --adapter {correction[1]}" in described
    lora = cli.training._lrec_adapter("somebody/q", None, None, None, None, 0.0, 16, stacked=False)
    assert lora.start == str(correction[1])


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("peqa", [], "--steps: expected one of --steps, --tokens and --minutes"),
        ("peqa", ["--steps", 5, "--minutes", 1], "--steps: expected one of"),
        ("peqa", ["--steps", 0], "--steps: expected a positive number, got 0"),
        ("peqa", ["--steps", 5, "--length", 500], "--length: expected at most 128"),
        ("peqa", ["--steps", 5, "--micro-batch", 3], "--micro-batch: expected a divisor of"),
        ("peqa", ["--steps", 5, "--lr", "nan"], "--lr: expected a positive number, got nan"),
        ("emef", ["--steps", 5, "--rank", 0], "--rank: expected a positive integer, got 0"),
        ("emef", ["--steps", 5, "--targets", "x"], "--targets: expected names of linears"),
        ("emef", ["--steps", 5, "--length", 8, "--mask-prompt"], "--data: .*got none in 50"),
        ("emef", ["--steps", 5, "--eval-text", "SHORT"], "--eval-text: expected at least one win"),
        ("lrec", ["--steps", 5, "--cache", "CACHE"], "--cache: expected a directory outside of"),
        (
            "lrec",
            ["--steps", 5, "--start", "closed-form"],
            "--start: .*expected a correction in it",
        ),
        ("lrec", ["--steps", 5, "--adapter-bits", 4], "--adapter-bits: expected 8 or 16, got 4"),
        ("lrec", ["--steps", 5, "--scales-lr", 0], "--scales-lr: expected a positive number"),
        ("lrec", ["--steps", 5, "--lambda-kl", -1], "--lambda-kl: expected 0 or more"),
        ("lrec", ["--steps", 5, "--adapter", "/nowhere"], "--adapter: /nowhere: .*got nothing the"),
        ("lrec", ["--steps", 5, "--eval-text", "/nowhere"], "/nowhere: cannot be read"),
        ("lrec", ["--steps", 5, "--cache", __file__], "--cache: expected a directory, got the fil"),
        ("lrec", ["--steps", 5, "--teacher", "QUANTIZED"], "--teacher: .*expected a 16-bit model"),
        ("lrec", ["--steps", 5, "--rank", 65], "--rank: expected at most 64, the full rank of"),
        ("lrec", ["--minutes", 1, "--cache", "/nowhere"], "--cache: expected --steps or"),
    ],
)
def test_bad_commands(method: str, more: list[object], message: str, place: Path) -> None:
    (place / "short.txt").write_text("a b")
    places = {"QUANTIZED": "quantized", "SHORT": "short.txt", "CACHE": "bad/cache"}
    more = [place / places[item] if item in places else item for item in more]
    arguments = command(place, method, "bad", *more)
    shutil.rmtree(place / "bad", ignore_errors=True)  # what another case may have left
    assert re.search(message, fail(*arguments))
    assert not (place / "bad").exists()

"""Reading text, cutting and sampling calibration windows, perplexity."""

from __future__ import annotations

import codecs
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lowbitcore as lbc
from lowbitcore import head
from lowbitcore.data import (
    Example,
    TrainingSet,
    alpaca_example,
    calibration_windows,
    read_examples,
    read_texts,
    sample_from_model,
)
from lowbitcore.evaluate import perplexity
from lowbitcore.lora import newest_adapters
from test_models import VOCABULARY, logits, make_model, quantized

WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]


def make_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def text_of(count: int, *, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))


# --- Files -----------------------------------------------------------------------------------


def test_read_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo\n"]


def test_read_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a\u2028b"}, ensure_ascii=False), "", json.dumps({"text": "c"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_texts(tmp_path / "a.jsonl") == ["a\u2028b", "c"]


def test_read_alpaca(tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Name.", "instances": [{"input": "", "output": "Al"}, {"output": "Bo"}]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    texts = read_texts(tmp_path / "a.json")
    assert len(texts) == 4
    assert "### Input:\n1 2\n\n### Response:\n3" in texts[0]
    assert texts[1] == alpaca_example("Greet.", "", "Hi").text and "Input" not in texts[1]
    assert texts[3].endswith("### Response:\nBo")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"words": "a"}', r"a\.jsonl:1: expected an object with text"),
        ("a.jsonl", b'["a"]', r"a\.jsonl:1: expected an object with text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.json", b'{"text": "a"}', "expected a list of objects, got dict"),
        ("a.json", b'[{"instruction": "a", "output": 3}]', "record 0: expected an object"),
        ("a.json", b"[", "not valid JSON"),
        ("a.jsonl", rb'{"text": "\ud800 w"}', r"a\.jsonl:1: expected Unicode, got stray bytes"),
    ],
)
def test_unreadable_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_instruction_that_is_a_text_too(tmp_path: Path) -> None:
    """As in the hub's copy of Alpaca, whose text is what a template made of the rest."""
    record = {"instruction": "Add.", "input": None, "output": "3", "text": "### Add. 3"}
    (tmp_path / "a.JSONL").write_bytes(codecs.BOM_UTF8 + json.dumps(record).encode())
    (found,) = read_examples(tmp_path / "a.JSONL")
    assert found.prompt and found.response == "3"
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"plain")
    assert read_texts(tmp_path / "a.txt") == ["plain"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_texts(tmp_path / "none.txt")


# --- Windows ---------------------------------------------------------------------------------


def test_windows_are_pieces_of_the_text() -> None:
    tokenizer, text = make_tokenizer(), text_of(1000)
    ids = tokenizer(text)["input_ids"]
    windows = calibration_windows([text], tokenizer, samples=5, length=30, seed=3)
    assert windows.shape == (5, 30) and windows.dtype == torch.int64
    starts = []
    for window in windows.tolist():
        starts += [i for i in range(len(ids)) if ids[i : i + 30] == window]
    assert len(starts) == 5 and all(start % 30 == 0 for start in starts)
    assert starts != sorted(starts)


def test_windows_are_fixed_by_the_seed() -> None:
    texts = [text_of(50, seed=i) for i in range(200)]

    def cut(seed: int) -> torch.Tensor:
        return calibration_windows(texts, make_tokenizer(), samples=6, length=40, seed=seed)

    assert torch.equal(cut(0), cut(0))
    assert not torch.equal(cut(0), cut(1))


def test_reading_stops_when_there_is_enough() -> None:
    calls = []

    def tokenizer(batch: list[str], **settings: Any) -> dict[str, Any]:
        calls.append(len(batch))
        assert settings["add_special_tokens"] is False
        return {"input_ids": [[7] * 10 for _ in batch]}

    calibration_windows(["a"] * 1000, tokenizer, samples=2, length=100, seed=0)
    assert calls == [64]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"samples": 4, "length": 30},
            r"120 tokens \(4 windows of 30\), got enough for 3",
        ),
        ({"samples": 0, "length": 30}, "samples: expected an integer of at least 1, got 0"),
        ({"samples": 1, "length": 1}, "length: expected an integer of at least 2, got 1"),
    ],
)
def test_texts_too_short(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_windows([text_of(100)], make_tokenizer(), seed=0, **settings)


def test_arguments_of_other_kinds() -> None:
    with pytest.raises(ValueError, match="read_examples: path: expected a path, got NoneType"):
        read_examples(None)  # type: ignore[arg-type]
    example, tokenizer = [Example("", text_of(50))], make_tokenizer()
    for arguments, message in (
        ((None, tokenizer, 8), "examples: expected a list of Example, got NoneType"),
        ((example, None, 8), "tokenizer: expected a PreTrainedTokenizerBase, got NoneType"),
        ((example, tokenizer, "8"), "length: expected an integer of at least 2, got '8'"),
    ):
        examples, given, length = arguments
        with pytest.raises(ValueError, match=f"TrainingSet: {message}"):
            TrainingSet(examples, given, length=length)  # type: ignore[arg-type]


@pytest.mark.parametrize("example", ["text", {"instruction": "x", "output": "y"}, ("", "text")])
def test_examples_of_other_kinds(example: Any) -> None:
    with pytest.raises(ValueError, match="TrainingSet: examples: expected those of read_examples"):
        TrainingSet([example], make_tokenizer(), length=8)


def test_no_texts() -> None:
    with pytest.raises(ValueError, match="got enough for 0"):
        calibration_windows([], make_tokenizer(), samples=1, length=8, seed=0)


# --- Sampling --------------------------------------------------------------------------------


def test_sampling_is_fixed_by_the_seed() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()

    def sample(seed: int) -> torch.Tensor:
        return sample_from_model(model, tokenizer, samples=3, length=12, seed=seed, progress=False)

    first = sample(0)
    assert first.shape == (3, 12) and first.dtype == torch.int64
    assert (first[:, 0] == 1).all() and len({tuple(row) for row in first.tolist()}) == 3
    assert torch.equal(first, sample(0)) and not torch.equal(first, sample(1))


def test_sampling_follows_the_model() -> None:
    """A model that always prefers the next token writes ascending ones."""
    model = make_model("llama")

    def forward(input_ids: torch.Tensor, **settings: Any) -> Any:
        scores = torch.full((len(input_ids), 1, VOCABULARY), -1e4)
        scores.scatter_(2, (input_ids[:, -1:, None] + 1) % VOCABULARY, 0.0)
        return SimpleNamespace(logits=scores, past_key_values=None)

    model.forward = forward
    windows = sample_from_model(
        model, make_tokenizer(bos=False), samples=40, length=5, seed=0, progress=False
    )
    assert torch.equal(windows[:, 1:], (windows[:, :-1] + 1) % VOCABULARY)
    assert len(set(windows[:, 0].tolist())) > 10 and (windows[:, 0] != 0).all()


def test_sampling_limits() -> None:
    with pytest.raises(ValueError, match="length: expected at most 128 for this model, got 129"):
        sample_from_model(
            make_model("llama"), make_tokenizer(), samples=1, length=129, seed=0, progress=False
        )


# --- Perplexity ------------------------------------------------------------------------------


@torch.no_grad()
def reference_loss(model: Any, ids: torch.Tensor, scored: int) -> float:
    """Whole logits in float64, summed over the last `scored` tokens."""
    whole = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    picked = whole[:-1].gather(1, ids[1:, None])[:, 0]
    return float(-picked[len(picked) - scored :].sum())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt-neox", "gpt2"])
@pytest.mark.parametrize("stride", [None, 5, 16])
def test_perplexity(name: str, stride: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 7 * VOCABULARY)
    model, tokenizer, text = make_model(name), make_tokenizer(), text_of(70)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    step = stride or 16
    starts = range(0, 70 - 16 + 1, step)
    scored = [15] + [min(step, 15)] * (len(starts) - 1)
    total = sum(
        reference_loss(model, ids[start : start + 16], count)
        for start, count in zip(starts, scored, strict=True)
    )
    result = perplexity(model, tokenizer, text, context=16, stride=stride, progress=False)
    assert result.windows == len(starts) and result.tokens == sum(scored)
    assert math.isclose(result.ppl, math.exp(total / sum(scored)), rel_tol=1e-5)
    before = logits(model)
    assert torch.equal(before, logits(model))  # the model's forward is its own again


def test_perplexity_of_what_a_model_does_to_its_logits() -> None:
    """Whatever follows the head (here: a soft cap) takes part."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        final_logit_softcapping=0.5,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.lm_head.weight.data.normal_()
    tokenizer, text = make_tokenizer(), text_of(16)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    expected = math.exp(reference_loss(model, ids, 15) / 15)
    result = perplexity(model, tokenizer, text, context=16, progress=False)
    assert math.isclose(result.ppl, expected, rel_tol=1e-5)


def test_nothing_is_dropped() -> None:
    model, tokenizer = lbc.prepare_lora(quantized("llama"), rank=4, dropout=0.5), make_tokenizer()
    for adapter in newest_adapters(model).values():
        adapter.b.data.normal_()
    model.train()
    text = text_of(64)
    results = [perplexity(model, tokenizer, text, context=16, progress=False) for _ in range(2)]
    assert results[0] == results[1] and model.training
    drawn = [
        sample_from_model(model, tokenizer, samples=2, length=9, seed=1, progress=False)
        for _ in range(2)
    ]
    assert torch.equal(*drawn)


def test_windows_limit() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    short = perplexity(model, tokenizer, text_of(64), context=16, windows=2, progress=False)
    assert short.windows == 2 and short.tokens == 30
    first = perplexity(
        model, tokenizer, " ".join(text_of(64).split()[:32]), context=16, progress=False
    )
    assert short.ppl == first.ppl


def test_perplexity_of_a_quantized_model() -> None:
    tokenizer, text = make_tokenizer(), text_of(64)
    result = perplexity(quantized("llama"), tokenizer, text, context=16, progress=False)
    original = perplexity(make_model("llama"), tokenizer, text, context=16, progress=False)
    assert 0.8 < result.ppl / original.ppl < 1.25 and result.ppl != original.ppl


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 64}, r"at least one window of 64 tokens \(the context\), got 50"),
        ({"context": 1}, "context: expected at least 2, got 1"),
        ({"context": 129}, "context: expected at most 128"),
        ({"context": 16, "stride": 0}, r"stride: expected 1\.\.16, got 0"),
        ({"context": 16, "stride": 17}, r"stride: expected 1\.\.16, got 17"),
        ({"context": 16, "windows": 0}, "windows: expected at least 1, got 0"),
    ],
)
def test_bad_evaluations(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(make_model("llama"), make_tokenizer(), text_of(50), progress=False, **settings)

"""A model with one block in memory at a time: the same states, and no more than that block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbitcore as lbc
from lowbitcore import lrec
from lowbitcore.data import Example, TrainingSet
from lowbitcore.head import run_body
from lowbitcore.provenance import fingerprint
from lowbitcore.source import open_source
from test_data import make_tokenizer, text_of
from test_models import CONFIGS, make_model, quantized

LENGTHS = (3, 17, 17, 40, 1)


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 90, (length,), generator=generator) for length in LENGTHS]


def opened(name: str, directory: Path, **settings: object) -> lbc.BlockwiseModel:
    make_model(name).save_pretrained(directory)
    return lbc.BlockwiseModel.open(directory, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_states_are_the_whole_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    parts = opened(name, tmp_path, dtype=dtype)
    whole = lbc.load(tmp_path, dtype=dtype)
    for _ in range(2):  # what surrounds the blocks stays for the second time
        found = parts.last_hidden_states(sequences())
        for ids, states in zip(sequences(), found, strict=True):
            expected = run_body(whole, input_ids=ids[None]).last_hidden_state[0]
            assert states.dtype == dtype and torch.equal(states, expected)
    assert fingerprint(parts.tensors()) == fingerprint(whole.state_dict().items())
    head = whole.get_output_embeddings().state_dict().items()
    assert fingerprint(parts.tensors(parts.head)) == fingerprint(head)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_one_block_is_in_memory(name: str, tmp_path: Path) -> None:
    parts = opened(name, tmp_path)
    blocks = parts.layout.modules
    seen = []

    def resident_blocks() -> list[int]:
        return [
            index
            for index, block in enumerate(blocks)
            if any(not item.is_meta for item in block.parameters())
        ]

    for block in blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(resident_blocks()))
    parts.last_hidden_states(sequences())
    assert seen == [[index] for index in range(len(blocks)) for _ in LENGTHS]
    assert not resident_blocks()
    assert parts.head.weight.is_meta


def test_a_cache_filled_blockwise_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several files, some of which go through the blocks together, some not."""
    monkeypatch.setattr(lrec, "SHARD", 8)
    monkeypatch.setattr(lrec, "TOKENS_TOGETHER", 200)
    examples = [Example(text_of(2, seed=i) + " ", text_of(3 + i % 9, seed=i)) for i in range(42)]
    data = TrainingSet(examples, make_tokenizer(), length=24)
    parts = opened("llama", tmp_path / "model")
    whole = lbc.load(tmp_path / "model")
    passes = []
    states_of = parts.last_hidden_states
    monkeypatch.setattr(
        parts, "last_hidden_states", lambda items: passes.append(len(items)) or states_of(items)
    )
    directories = tmp_path / "whole", tmp_path / "parts"
    for directory, teacher in zip(directories, (whole, parts), strict=True):
        assert lbc.TeacherCache.bytes_needed(teacher, data) == data.tokens * 64 * 4
        lbc.TeacherCache.fill(directory, teacher, data, progress=False)

    def contents(directory: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.glob("[!.]*")}

    files = [contents(item) for item in directories]
    assert files[0] == files[1] and len(files[0]) == 7
    assert sum(passes) == 42 and 1 < len(passes) < 6
    # And each goes on where the other one was.
    for directory, teacher in zip(directories, (parts, whole), strict=True):
        for name in ("states-00001.safetensors", "states-00004.safetensors"):
            (directory / name).unlink()
        lbc.TeacherCache.fill(directory, teacher, data, progress=False)
        assert contents(directory) == files[0]


@pytest.mark.parametrize("block", [0, 1])
def test_a_failure_leaves_nothing_behind(block: int, tmp_path: Path) -> None:
    opened("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = f"model.layers.{block}.mlp.up_proj.weight"
    kept = weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    parts = lbc.BlockwiseModel.open(tmp_path)
    with pytest.raises(ValueError, match=f"{lost}' of the model is missing"):
        parts.last_hidden_states(sequences())
    blocks = parts.layout.modules
    assert not any(item._forward_pre_hooks for item in blocks)
    assert all(item.is_meta for item in blocks.parameters())
    save_file({**weights, lost: kept}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    parts.source = open_source(tmp_path)
    whole = lbc.BlockwiseModel.open(tmp_path).last_hidden_states(sequences())
    for found, expected in zip(parts.last_hidden_states(sequences()), whole, strict=True):
        assert torch.equal(found, expected)


def test_a_tie_within_the_body(tmp_path: Path) -> None:
    """What is tied to something in a file is read from there, wherever it lies."""
    parts = opened("llama-tied", tmp_path)
    parts.model.all_tied_weights_keys = {"model.embed_tokens.weight": "lm_head.weight"}
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    parts.source = open_source(tmp_path)
    parts.load(parts.surrounding_names())
    assert torch.equal(parts.model.model.embed_tokens.weight, weights["lm_head.weight"])
    assert parts.head.weight.is_meta


def test_bad_input(tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path / "quantized")
    with pytest.raises(ValueError, match="expected a 16-bit model, got a quantized one"):
        lbc.BlockwiseModel.open(tmp_path / "quantized")
    with pytest.raises(ValueError, match="no such model directory"):
        lbc.BlockwiseModel.open(tmp_path / "none")
    opened("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="dtype: expected auto, float32"):
        lbc.BlockwiseModel.open(tmp_path / "model", dtype="int8")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="expected 1 blocks by its config"):
        lbc.BlockwiseModel.open(tmp_path / "model")

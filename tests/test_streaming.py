"""Quantizing checkpoints block by block: equal to in memory, resumable, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import lowbitcore as lbc
from lowbitcore import engine, files, streaming
from lowbitcore.blocks import quantized_linears
from lowbitcore.formats import checkpoint
from test_models import (
    CONFIGS,
    LINEARS,
    assert_excluded,
    logits,
    make_model,
    quantized,
    windows,
)

CONFIG = lbc.QuantConfig(bits=4, group_size=32)


def save_source(name: str, directory: Path, **settings: Any) -> Path:
    make_model(name).save_pretrained(directory, **settings)
    return directory


def run(source: Path, out: Path, config: Any = CONFIG, **settings: Any) -> Any:
    settings.setdefault("calibration", windows())
    calibration = settings.pop("calibration")
    return lbc.quantize_checkpoint(source, out, calibration, config, progress=False, **settings)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_streaming_equals_in_memory(name: str, tmp_path: Path) -> None:
    report = run(save_source(name, tmp_path / "in"), tmp_path / "out")
    expected = quantized(name)
    assert len(report.linears) == LINEARS[name] and not report.skipped
    assert report.linears == expected.quantization_report.linears
    loaded = lbc.load(tmp_path / "out")
    for path, linear in quantized_linears(expected).items():
        for key, tensor in linear.canonical().items():
            assert torch.equal(tensor, loaded.get_submodule(path).canonical()[key]), (path, key)
    assert torch.equal(logits(loaded), logits(expected))
    # And the files are those that `save` writes.
    lbc.save(expected, tmp_path / "saved")
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "saved")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["quantize_config.json"] == theirs["quantize_config.json"]


@pytest.mark.parametrize("settings", [{"sym": True}, {"method": "rtn"}, {"true_sequential": False}])
def test_other_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    config = lbc.QuantConfig(bits=3, group_size=-1, **settings)
    run(save_source("llama-tied", tmp_path / "in"), tmp_path / "out", config)
    expected = quantized("llama-tied", bits=3, group_size=-1, **settings)
    assert torch.equal(logits(lbc.load(tmp_path / "out")), logits(expected))


@pytest.mark.parametrize("adapter_bits", [8, 16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_corrections(name: str, adapter_bits: int, tmp_path: Path) -> None:
    """Integers and corrections, in one pass, bring a model nearer to its original than integers."""
    config = lbc.QuantConfig(bits=2, group_size=32, rank=8, adapter_bits=adapter_bits)
    report = run(save_source(name, tmp_path / "in"), tmp_path / "out", config)
    expected = quantized(name, bits=2, rank=8, adapter_bits=adapter_bits)
    loaded = lbc.load_adapter(lbc.load(tmp_path / "out"), tmp_path / "out" / "correction")
    assert torch.equal(logits(loaded), logits(expected))
    assert not any(p.requires_grad for n, p in expected.named_parameters() if "adapters" in n)
    plain = quantized(name, bits=2)
    original = logits(make_model(name))
    bound = {8: 0.85, 16: 0.8}[adapter_bits]
    assert (logits(loaded) - original).norm() < bound * (logits(plain) - original).norm()
    before, after = plain.quantization_report, report
    assert sum(x.loss for x in after.linears) < 0.6 * sum(x.loss for x in before.linears)
    extra = after.bytes["quantized"] - before.bytes["quantized"]
    adapters = [p for n, p in expected.named_parameters() if ".adapters." in n]
    assert extra == adapter_bits // 8 * sum(p.numel() for p in adapters) > 0
    trained = lbc.load(tmp_path / "out")
    with torch.no_grad():
        for linear in quantized_linears(trained).values():
            linear.scales.mul_(1.1)
    with pytest.raises(ValueError, match="expected the scales that it was trained upon, got othe"):
        lbc.load_adapter(trained, tmp_path / "out" / "correction")


def test_sharded_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source("llama", tmp_path / "in", max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    run(source, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 2
    assert torch.equal(logits(lbc.load(tmp_path / "out")), logits(quantized("llama")))


def test_bf16_source(tmp_path: Path) -> None:
    make_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    loaded = lbc.load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    expected = lbc.quantize_model(
        make_model("llama", dtype=torch.bfloat16), None, windows(), CONFIG, progress=False
    )
    assert torch.equal(logits(loaded), logits(expected))


def test_biases_keep_their_type(tmp_path: Path) -> None:
    """Calibration widens what it runs, of float16 everywhere."""
    make_model("qwen2", dtype=torch.float16).save_pretrained(tmp_path / "in")
    config = replace(CONFIG, rank=4)
    lbc.quantize_checkpoint(tmp_path / "in", tmp_path / "out", windows(), config, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{name}.bias"].dtype == torch.float16
    model = make_model("qwen2", dtype=torch.float16)
    lbc.quantize_model(model, None, windows(), config, progress=False)
    bias = model.get_submodule(name).base.bias
    assert bias.dtype == torch.float16 and torch.equal(bias, tensors[f"{name}.bias"])


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    from test_data import make_tokenizer, text_of

    source = save_source("llama", tmp_path / "in")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"max_length": 77}))
    (tmp_path / "calibration.txt").write_text(text_of(20_000))
    report = run(source, tmp_path / "out", calibration=tmp_path / "calibration.txt")
    assert report.tokens == 128 * 128
    loaded = lbc.load(tmp_path / "out")
    assert loaded.generation_config.max_length == 77
    from lowbitcore.source import load_tokenizer

    assert load_tokenizer(tmp_path / "out")("w5 w6")["input_ids"] == [8, 9]


# --- Resuming --------------------------------------------------------------------------------


class Killed(BaseException):
    """Like a kill: nothing in between may catch and tidy up."""


def killed_run(
    source: Path,
    out: Path,
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
    config: lbc.QuantConfig = CONFIG,
) -> None:
    """Stops right after the given number of blocks is done."""
    save_progress = streaming._StreamingRun._save_progress

    def stop(self: Any) -> None:
        save_progress(self)
        if self._done == blocks:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(streaming._StreamingRun, "_save_progress", stop)
        with pytest.raises(Killed):
            run(source, out, config)


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_resume_gives_the_same_bytes(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_source("qwen3-sliding", tmp_path / "in")
    run(source, tmp_path / "whole")
    killed_run(source, tmp_path / "out", blocks, monkeypatch)
    with pytest.raises(ValueError, match="no config.json .an unfinished quantization"):
        lbc.load(tmp_path / "out")
    quantize = engine.Engine.quantize
    done = []

    def counted(self: Any, index: int) -> Any:
        done.append(index)
        return quantize(self, index)

    monkeypatch.setattr(engine.Engine, "quantize", counted)
    report = run(source, tmp_path / "out", resume=True)
    assert done == list(range(blocks, 3))
    assert len(report.linears) == LINEARS["qwen3-sliding"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resume_gives_the_same_corrections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = lbc.QuantConfig(bits=2, group_size=32, rank=4, adapter_bits=8)
    source = save_source("llama", tmp_path / "in")
    run(source, tmp_path / "whole", config)
    killed_run(source, tmp_path / "out", 1, monkeypatch, config)
    run(source, tmp_path / "out", config, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("rank", [0, 4])
def test_kill_while_merging(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, rank=rank)
    source = save_source("llama", tmp_path / "in")
    run(source, tmp_path / "whole", config)
    write_json = files.write_json

    def stop(path: Path, value: Any) -> None:
        if path.name == "config.json":
            raise Killed
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", stop)
        with pytest.raises(Killed):
            run(source, tmp_path / "out", config)
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="no config.json"):
        lbc.load(tmp_path / "out")
    monkeypatch.delattr(streaming._StreamingRun, "_load_block")  # no forward has anything to say
    run(source, tmp_path / "out", config, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_kill_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To resume is then to clean up, whatever of the scratch is there still."""
    source = save_source("llama", tmp_path / "in")

    class Killed(Exception):
        pass

    def stop(path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(streaming.shutil, "rmtree", stop)
        with pytest.raises(Killed):
            run(source, tmp_path / "out")
    finished = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds a finished model already"):
        run(source, tmp_path / "out")
    with pytest.raises(ValueError, match="the config differs"):
        run(source, tmp_path / "out", replace(CONFIG, bits=8), resume=True)
    report = run(source, tmp_path / "out", resume=True)
    assert len(report.linears) == LINEARS["llama"]
    assert not (tmp_path / "out" / ".partial").exists()
    (tmp_path / "out" / ".partial").mkdir()  # or as much as that
    run(source, tmp_path / "out", resume=True)
    kept = {name: data for name, data in finished.items() if not name.startswith(".partial")}
    assert contents(tmp_path / "out") == kept


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), ValueError()])
def test_a_run_that_failed_keeps_no_lock(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its exception is still at hand, as it is in a notebook."""
    source = save_source("llama", tmp_path / "in")
    killed_run(source, tmp_path / "out", 1, monkeypatch)

    def fail(*arguments: Any) -> None:
        raise error

    name = "_take_up" if isinstance(error, ValueError) else "_write_block"
    with monkeypatch.context() as patch:
        patch.setattr(streaming._StreamingRun, name, fail)
        with pytest.raises(type(error)) as caught:
            run(source, tmp_path / "out", resume=True)
    run(source, tmp_path / "out", resume=True)
    assert caught.value is error


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source("llama", tmp_path / "in")

    def full(path: Path, entries: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_safetensors", full)
        with pytest.raises(OSError, match="No space left"):
            run(source, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    with pytest.raises(ValueError, match="no config.json"):
        lbc.load(tmp_path / "out")


def test_resume_refuses_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source("llama", tmp_path / "in")
    killed_run(source, tmp_path / "out", 1, monkeypatch)
    with pytest.raises(
        ValueError, match=r"unfinished quantization: resume it \(--resume\), or delete"
    ):
        run(source, tmp_path / "out")
    with pytest.raises(ValueError, match="the config differs .* run: bits is 3, was 4"):
        run(source, tmp_path / "out", lbc.QuantConfig(bits=3, group_size=32), resume=True)
    with pytest.raises(ValueError, match="the calibration differs"):
        run(source, tmp_path / "out", calibration=windows(seed=5), resume=True)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match="the architecture differs"):
        run(source, tmp_path / "out", resume=True)
    (source / "config.json").write_text(json.dumps(settings))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the source differs"):
        run(source, tmp_path / "out", resume=True)


def test_resume_with_a_damaged_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source("llama", tmp_path / "in")
    killed_run(source, tmp_path / "out", 1, monkeypatch)
    block = tmp_path / "out" / ".partial" / "block-00000.safetensors"
    block.write_bytes(block.read_bytes()[:-100])
    monkeypatch.delattr(streaming._StreamingRun, "quantize")  # said before anything is computed
    with pytest.raises(ValueError, match=r"block-00000\.safetensors: cannot resume: .* begin anew"):
        run(source, tmp_path / "out", resume=True)


def test_refused_settings_leave_nothing_behind(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "in")
    with pytest.raises(ValueError, match="rank: expected at most"):
        run(source, tmp_path / "out", lbc.QuantConfig(bits=4, group_size=32, rank=10_000))
    assert not (tmp_path / "out").exists()


def test_out_has_to_be_free(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "in")
    run(source, tmp_path / "out")
    assert not (tmp_path / "out" / ".partial").exists()
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds a finished model already"):
            run(source, tmp_path / "out", resume=resume)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a directory, got a file"):
        run(source, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("x")
    with pytest.raises(ValueError, match="got 'notes' in it"):
        run(source, tmp_path / "other")


# --- Bad input -------------------------------------------------------------------------------


def test_quantized_source(tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path / "in")
    with pytest.raises(ValueError, match="is quantized already"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", torch.nan, r"layers\.1\.mlp\.up_proj\.weight: holds"),
        ("model.embed_tokens.weight", torch.inf, r"model\.layers\.0: .* NaN or Inf"),
    ],
)
def test_nan_in_the_source(name: str, value: float, message: str, tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    tensors[name][:] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as caught:
        run(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_missing_tensor(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight' .* is missing"):
        run(source, tmp_path / "out")


def test_linears_that_no_token_reaches() -> None:
    """As in a mixture of experts whose router never picks one of them."""
    model = make_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))
    lbc.quantize_model(model, None, windows(), CONFIG, progress=False)
    assert model.quantization_report.skipped == {
        "model.layers.1.mlp.up_proj": "not reached by the first calibration window"
    }
    linears = quantized_linears(model)
    assert len(linears) == LINEARS["llama"] - 1
    rules = model.config.quantization_config["dynamic"]
    assert_excluded(rules, model.quantization_report.skipped, linears)  # not block 0's up_proj


# --- Memory ----------------------------------------------------------------------------------

_MEASURE = """
import re, sys, torch
import lowbitcore as lbc
from lowbitcore import model, quantize
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
small, source, out = sys.argv[1:]
config = lbc.QuantConfig(bits=4, group_size=64, target="layer", act_order="none", mse=False)
windows = torch.randint(0, 32, (2, 64), generator=torch.Generator().manual_seed(0))
lbc.quantize_checkpoint(small, out + "-small", windows, config, progress=False)
before = peak()
lbc.quantize_checkpoint(source, out, windows, config, progress=False)
print(peak() - before)
"""


def test_peak_memory_is_about_a_block(tmp_path: Path) -> None:
    """Many blocks take hardly more than few: the rest of the model is never in memory."""

    def make(blocks: int, directory: Path) -> int:
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=768,
            intermediate_size=768,
            num_hidden_layers=blocks,
            num_attention_heads=8,
            max_position_embeddings=64,
            dtype="bfloat16",
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        return (directory / "model.safetensors").stat().st_size

    # Enough blocks for the allocator and the thread pools to have taken what they keep.
    block = make(6, tmp_path / "small") // 6
    size = make(20, tmp_path / "big")
    assert size > 160e6 and block < size / 18
    script = [sys.executable, "-c", _MEASURE]
    paths = [str(tmp_path / name) for name in ("small", "big", "out")]
    result = subprocess.run(
        [*script, *paths],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    increase = int(result.stdout.split()[-1])
    assert increase < size / 4, f"{increase / 1e6:.0f} MB more for {size / 1e6:.0f} MB of blocks"
    loaded = lbc.load(tmp_path / "out")
    assert len(quantized_linears(loaded)) == 20 * 7


@pytest.mark.parametrize("target", ["model", "layer"])
def test_one_block_is_in_memory(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident: list[list[int]] = []
    quantize = engine.Engine.quantize

    def watched(self: engine.Engine, index: int) -> Any:
        result = quantize(self, index)
        blocks = enumerate(self._layout.modules)
        resident.append([i for i, x in blocks if any(not p.is_meta for p in x.parameters())])
        return result

    monkeypatch.setattr(engine.Engine, "quantize", watched)
    config = lbc.QuantConfig(bits=4, group_size=32, target=target)
    run(save_source("llama", tmp_path / "in"), tmp_path / "out", config)
    assert resident == [[index] for index in range(len(resident))] and len(resident) > 1

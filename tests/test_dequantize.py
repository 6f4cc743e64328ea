"""Packed models written as ordinary ones: what transformers and PEFT make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowbitcore as lbc
from lowbitcore.blocks import quantized_linears
from lowbitcore.formats import checkpoint
from lowbitcore.nn import LoraLinear
from test_adapters import excite, stretched
from test_cli import fail, succeed
from test_data import make_tokenizer
from test_models import CONFIGS, logits, make_model, quantized


def theirs(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_it(name: str, tmp_path: Path) -> None:
    model = stretched(quantized(name, bits=3, act_order="dynamic"))
    before = logits(model)
    lbc.save_dequantized(model, tmp_path, max_shard_bytes=60_000)
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 1
    loaded = theirs(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(lbc.load(tmp_path)), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before)  # it stays as it was
    assert quantized_linears(model)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt2"])
def test_adapters_are_merged_and_peft_puts_them_on(name: str, tmp_path: Path) -> None:
    """On packed linears and, as in any 16-bit model, on others."""
    peft = pytest.importorskip("peft")
    model = quantized(name)
    lbc.save_dequantized(model, tmp_path / "dense")
    excite(lbc.prepare_lora(model, rank=4, alpha=6, targets=None))
    lbc.save_adapter(model, tmp_path / "adapter")
    on_top = peft.PeftModel.from_pretrained(theirs(tmp_path / "dense"), tmp_path / "adapter")
    torch.testing.assert_close(logits(on_top), logits(model), rtol=1e-4, atol=1e-4)
    excite(lbc.prepare_lora(model, rank=2, targets=None), seed=1)
    lbc.save_dequantized(model, tmp_path / "merged")
    assert not torch.allclose(logits(model), logits(on_top), atol=1e-2)
    torch.testing.assert_close(
        logits(theirs(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-4
    )
    plain = excite(lbc.prepare_lora(make_model(name), rank=4, targets=None))
    lbc.save_dequantized(plain, tmp_path / "plain")
    torch.testing.assert_close(
        logits(theirs(tmp_path / "plain")), logits(plain), rtol=1e-4, atol=1e-4
    )


def test_its_type_and_tokenizer(tmp_path: Path) -> None:
    model = quantized("llama").to(torch.bfloat16)
    lbc.save_dequantized(model, tmp_path, make_tokenizer())
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    path, linear = next(iter(quantized_linears(model).items()))
    wanted = linear.dequantize(torch.float32).bfloat16()
    assert torch.equal(theirs(tmp_path).get_submodule(path).weight, wanted)
    assert (tmp_path / "tokenizer.json").is_file()
    assert not (tmp_path / "quantize_config.json").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a quantized one, got a plain one"):
        lbc.save_dequantized(make_model("llama"), tmp_path / "plain")
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(ValueError, match=r"expected an empty or new directory, got 'mine\.txt'"):
        lbc.save_dequantized(quantized("llama"), tmp_path)
    (tmp_path / "mine.txt").unlink()
    (tmp_path / ".mine.tmp").write_text("text")
    with pytest.raises(ValueError, match=r"expected an empty or new directory, got '\.mine\.tmp'"):
        lbc.save_dequantized(quantized("llama"), tmp_path)
    assert (tmp_path / ".mine.tmp").exists()
    model = quantized("llama").to(torch.float16)
    with torch.no_grad():
        next(iter(quantized_linears(model).values())).scales.fill_(60000)
    with pytest.raises(ValueError, match=r"q_proj: expected weights that fit torch\.float16"):
        lbc.save_dequantized(model, tmp_path / "large")
    assert not list((tmp_path / "large").glob("*.safetensors"))


def test_what_an_interrupted_call_left_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, write = quantized("llama"), checkpoint.write_safetensors

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        if "00002" in path.name:
            raise OSError(28, "No space left on device")
        write(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        lbc.save_dequantized(model, tmp_path, max_shard_bytes=40_000)
    monkeypatch.undo()
    assert list(tmp_path.glob("model-00001-of-*.safetensors"))
    (tmp_path / ".model-00002-of-00010.safetensors.12345678.tmp").write_text("of a kill")
    lbc.save_dequantized(model, tmp_path)
    torch.testing.assert_close(logits(theirs(tmp_path)), logits(model), rtol=1e-4, atol=1e-4)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_the_command(tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path / "q", make_tokenizer())
    model = excite(lbc.prepare_lora(lbc.load(tmp_path / "q"), rank=4))
    lbc.save_adapter(model, tmp_path / "lora")
    adapter = ("--adapter", tmp_path / "lora")
    _, result = succeed("dequantize", tmp_path / "q", tmp_path / "out", *adapter)
    assert result["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    torch.testing.assert_close(
        logits(theirs(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4
    )
    again = fail("dequantize", tmp_path / "q", tmp_path / "out")
    assert "out: expected an empty or new directory" in again
    assert "expected a quantized one" in fail("dequantize", tmp_path / "out", tmp_path / "new")


def test_a_model_that_save_pretrained_wrote_with_its_adapters(tmp_path: Path) -> None:
    """Neither here nor elsewhere does it load: that is said, and not that it does."""
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    assert any(isinstance(module, LoraLinear) for module in model.modules())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds adapters among its weights"):
        lbc.load(tmp_path)
    assert "holds adapters among its weights" in fail("info", tmp_path)

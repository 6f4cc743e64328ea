"""Adapters and scales: what they compute, their files, PEFT on the other side, and stacking."""

from __future__ import annotations

import itertools
import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import lowbitcore as lbc
from lowbitcore.adapters import load_adapters, round_adapter, round_scales
from lowbitcore.blocks import adapted_linears, block_linears, quantized_linears, without_adapters
from lowbitcore.formats.peft import LowRankTensors, product, rounded, settled
from lowbitcore.lora import newest_adapters
from lowbitcore.nn import LoraLinear, LowRank, QuantLinear
from test_models import CONFIGS, LINEARS, dense_copy, logits, make_model, quantized


def excite(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Gives the newest adapters values, as training would: fresh ones compute nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in newest_adapters(model).values():
            adapter.b.copy_(0.2 * torch.randn(adapter.b.shape, generator=generator))
    return model


def trained(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# --- Layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", ["static", "dynamic"])
def test_lora_linear_against_float64(bits: int, act_order: str) -> None:
    """Output and all gradients of two stacked adapters on a packed linear."""
    model = quantized("llama", bits=bits, act_order=act_order)
    lbc.prepare_lora(model, rank=4, alpha=8, targets=["up_proj"])
    excite(model)
    lbc.prepare_lora(model, rank=2, alpha=1, targets=["up_proj"])
    excite(model, seed=1)
    layer = adapted_linears(model)["model.layers.1.mlp.up_proj"]
    x = torch.randn(3, 5, 64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    assert isinstance(layer.base, QuantLinear)
    weight = layer.base.dequantize(torch.float32).double()
    first, second = layer.adapters
    low, top = (x.scaling * x.b.double() @ x.a.double() for x in (first, second))
    whole = weight + low + top
    torch.testing.assert_close(y.double(), x.double() @ whole.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), dy.double() @ whole, rtol=1e-5, atol=1e-5)
    flat_x, flat_dy = x.detach().double().view(-1, 64), dy.double().view(-1, 96)
    hidden = flat_x @ second.a.double().T
    wanted = second.scaling * flat_dy.T @ hidden
    torch.testing.assert_close(second.b.grad.double(), wanted, rtol=1e-4, atol=1e-5)
    wanted = second.scaling * (flat_dy @ second.b.double()).T @ flat_x
    torch.testing.assert_close(second.a.grad.double(), wanted, rtol=1e-4, atol=1e-5)
    assert first.a.grad is None and first.b.grad is None  # frozen under the second


@pytest.mark.parametrize("width", [13, 96])  # torch's and ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout(dtype: torch.dtype, width: int) -> None:
    """Keeps a share 1 - p, anywhere, and divides by it; its gradient goes where its values went."""
    torch.manual_seed(0)
    dropout = LowRank(4, 4, rank=1, scaling=1.0, dropout=0.3).dropout
    x = torch.full((3, 777, width), 0.7, dtype=dtype, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    assert torch.equal(x.grad != 0, kept)
    for axes in ((), (0, 1), (1, 2)):
        share = kept.float().mean(axes)
        assert ((share - 0.7).abs() < 5 * (0.3 * 0.7 * share.numel() / kept.numel()) ** 0.5).all()
    assert torch.equal(dropout.eval()(x), x)
    assert LowRank(4, 4, rank=1, scaling=1.0, dropout=0.0).dropout(x) is x


def test_masters_stay_float32() -> None:
    model = lbc.prepare_lora(quantized("llama"), rank=4)
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = {name: p.detach().clone() for name, p in before.items()}
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter is before[name] and torch.equal(parameter, values[name])
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_one_vector() -> None:
    layer = LoraLinear(torch.nn.Linear(64, 32))
    layer.adapters.append(LowRank(64, 32, rank=4, scaling=0.5, dropout=0.0))
    torch.nn.init.normal_(layer.adapters[0].b)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x[1]), layer(x)[1])


def test_dropout_is_of_training_alone() -> None:
    model = quantized("llama")
    lbc.prepare_lora(model, rank=4, targets=None, dropout=0.5)
    excite(model)
    assert torch.equal(logits(model.eval()), logits(model.eval()))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    for name, parameter in model.named_parameters():  # as of one that others are put upon
        parameter.requires_grad_("adapters" not in name)
    assert torch.equal(logits(model), logits(model.eval()))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    model = quantized(name)
    before = logits(model)
    lbc.prepare_lora(model, rank=4, targets=None)
    assert len(adapted_linears(model)) == LINEARS[name]
    assert torch.equal(logits(model), before)
    names = trained(model)
    assert len(names) == 2 * LINEARS[name] and all(".adapters.0." in n for n in names)
    with without_adapters(model):
        assert len(quantized_linears(model)) == LINEARS[name]
        assert not adapted_linears(model)
    assert len(adapted_linears(model)) == LINEARS[name]


def test_prepare_peqa() -> None:
    model = quantized("llama")
    lbc.prepare_peqa(model)
    assert len(trained(model)) == 14 and all(n.endswith(".scales") for n in trained(model))
    with pytest.raises(ValueError, match="got no packed linear"):
        lbc.prepare_peqa(make_model("llama"))


# --- The papers' arithmetic ------------------------------------------------------------------

LLAMA = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "30B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}


def llama(size: str, group_size: int) -> PreTrainedModel:
    """The shape of LLaMA on the meta device, packed in 4 bits."""
    hidden, intermediate, layers, heads = LLAMA[size]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        for path, linear in block_linears(model).items():
            parent, _, name = path.rpartition(".")
            packed = QuantLinear(
                linear.in_features, linear.out_features, bits=4, group_size=group_size
            )
            setattr(model.get_submodule(parent), name, packed)
    return model


def parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("size", "millions"), [("7B", 1.36), ("13B", 2.13), ("30B", 4.15), ("65B", 6.80)]
)
def test_peqa_learnable_parameters(size: str, millions: float) -> None:
    """PEQA's table 4: one scale for each output channel."""
    model = lbc.prepare_peqa(llama(size, -1))
    assert abs(parameters(model) / 1e6 - millions) < 0.0051


def test_lora_learnable_parameters() -> None:
    """PEQA's LoRA QV4 on 7B has 2.10 M, 1.54 times as many as PEQA; EMEF's rank 8 has 4,194,304."""
    model = lbc.prepare_lora(llama("7B", -1), rank=4, targets=["q_proj", "v_proj"])
    count = parameters(model)
    assert count == 2_097_152
    assert abs(count / parameters(lbc.prepare_peqa(llama("7B", -1))) - 1.54) < 0.005
    model = lbc.prepare_lora(llama("7B", 128), rank=8, targets=["q_proj", "v_proj"])
    assert parameters(model) == 4_194_304


# --- PEFT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt-neox", "gpt2"])
def test_peft_loads_our_adapters(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = excite(lbc.prepare_lora(quantized(name), rank=4, alpha=6, targets=None))
    round_adapter(model, dtype)
    lbc.save_adapter(model, tmp_path, dtype=dtype)
    with without_adapters(model):
        dense = dense_copy(name, model)
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(quantized(name)), atol=1e-2)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_adapters_load_here(rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = quantized("llama")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 3},
        use_rslora=rslora,
    )
    theirs = peft.get_peft_model(dense_copy("llama", model), config)
    for parameter_name, parameter in theirs.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    lbc.load_adapter(model, tmp_path)
    assert len(adapted_linears(model)) == 4
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)


# --- Files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0.04, 0.002), (1e-9, 3.0), (500.0, 1e-3), (0.02, 0.0), (0, 0)])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.3])
def test_eight_bits(sizes: tuple[float, float], scaling: float) -> None:
    """E4M3 keeps each element to 1/16, or to 2^-17 of the largest, whatever the matrices' sizes,
    and is exact ever after."""
    generator = torch.Generator().manual_seed(0)
    a = sizes[0] * torch.randn(8, 96, generator=generator)
    b = sizes[1] * torch.randn(64, 8, generator=generator)
    stored = rounded(LowRankTensors(a, b, scaling), torch.float8_e4m3fn)
    assert stored.a.dtype == stored.b.dtype == torch.float8_e4m3fn
    for x, y in ((a, stored.a), (b, stored.b)):
        largest, stored_largest = x.abs().max().item(), y.float().abs().max().item()
        if largest == 0:
            assert stored_largest == 0
            continue
        assert 224 <= stored_largest <= 448  # the last octave
        back = y.float() * 2.0 ** -round(math.log2(stored_largest / largest))
        assert ((back - x).abs() <= x.abs() / 16 + 2.0**-17 * largest).all()
    once = product(stored)
    error = once - scaling * b @ a
    assert error.norm() <= 0.05 * (scaling * b @ a).norm()
    held = settled(stored)
    assert held.a.dtype == torch.float32 and torch.equal(product(held), once)
    if sizes[1]:  # of sizes that learn: neither is an octave longer than it would be in balance
        assert 1 <= held.scaling < 2 and 0.49 < held.a.norm() / held.b.norm() < 2.05
    for item in (stored, held):
        assert torch.equal(product(rounded(item, torch.float8_e4m3fn)), once)


def test_saving_eight_bits_again_changes_nothing(tmp_path: Path) -> None:
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4))
    round_adapter(model, torch.float8_e4m3fn)
    expected = logits(model)
    for name in ("first", "second"):
        lbc.save_adapter(model, tmp_path / name, dtype=torch.float8_e4m3fn)
        model = lbc.load_adapter(quantized("llama"), tmp_path / name, trainable=True)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    first, second = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second")
    )
    assert all(torch.equal(first[name].float(), x.float()) for name, x in second.items())
    assert sum(x.nbytes for x in first.values()) == sum(
        p.numel() for p in map(model.get_parameter, trained(model))
    )


def test_adapter_round_trip(tmp_path: Path) -> None:
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4, dropout=0.25))
    lbc.save_adapter(model, tmp_path)
    loaded = lbc.load_adapter(quantized("llama"), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(".adapters." in name for name in trained(loaded))
    again = lbc.load_adapter(quantized("llama"), tmp_path, trainable=True)
    assert len(trained(again)) == 8
    layer = adapted_linears(again)["model.layers.0.self_attn.q_proj"]
    assert layer.adapters[0].dropout.p == 0.25  # type: ignore[union-attr]


def test_a_model_is_saved_without_its_adapters(tmp_path: Path) -> None:
    model = quantized("llama")
    lbc.save(model, tmp_path / "plain")
    excite(lbc.prepare_lora(model, rank=4, targets=None))
    lbc.save(model, tmp_path / "adapted")
    files = (tmp_path / name / "model.safetensors" for name in ("plain", "adapted"))
    assert len({file.read_bytes() for file in files}) == 1


def test_stacked_adapters(tmp_path: Path) -> None:
    """Side by side, or folded into one of rank r1 + r2: the same logits."""
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4, alpha=4, targets=None))
    lbc.save_adapter(model, tmp_path / "lrec")
    lbc.prepare_lora(model, rank=2, alpha=6)
    assert len(trained(model)) == 8
    excite(model, seed=1)
    lbc.save_adapter(model, tmp_path / "emef")
    assert len(load_file(tmp_path / "emef" / "adapter_model.safetensors")) == 8
    expected = logits(model)
    both = quantized("llama")
    for name in ("lrec", "emef"):
        lbc.load_adapter(both, tmp_path / name)
    assert torch.equal(logits(both), expected)
    lbc.save_adapter(both, tmp_path / "newest")  # frozen both: still the one that came last
    tensors = [load_file(tmp_path / x / "adapter_model.safetensors") for x in ("emef", "newest")]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    lbc.fold_adapters(both)
    ranks = {path: item.rank for path, item in newest_adapters(both).items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 6
    assert ranks["model.layers.0.mlp.up_proj"] == 4
    torch.testing.assert_close(logits(both), expected, rtol=1e-4, atol=1e-4)
    lbc.save_adapter(both, tmp_path / "folded")
    folded = lbc.load_adapter(quantized("llama"), tmp_path / "folded")
    assert torch.equal(logits(folded), logits(both))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_an_adapter_knows_those_under_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """It is refused without them and on others; those that were saved in fewer bits, as here while
    their masters stayed in memory, are the same."""
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4, alpha=12, targets=None))
    lbc.save_adapter(model, tmp_path / "below", dtype=dtype)
    lbc.prepare_lora(excite(model, seed=2), rank=2)
    lbc.save_adapter(model, tmp_path / "on-another")
    lbc.load_adapter(stack := quantized("llama"), tmp_path / "below")
    with pytest.raises(ValueError, match="adapters that it was trained upon, got others"):
        lbc.load_adapter(stack, tmp_path / "on-another")
    assert all(len(linear.adapters) == 1 for linear in adapted_linears(stack).values())

    model = excite(lbc.prepare_lora(quantized("llama"), rank=4, alpha=12, targets=None))
    lbc.prepare_lora(model, rank=2)
    lbc.save_adapter(excite(model, seed=1), tmp_path / "above")
    lbc.load_adapter(stack, tmp_path / "above", trainable=True)
    lbc.save_adapter(stack, tmp_path / "went-on")
    lbc.load_adapter(lbc.load_adapter(quantized("llama"), tmp_path / "below"), tmp_path / "went-on")
    with pytest.raises(ValueError, match="adapters that it was trained upon, got none"):
        lbc.load_adapter(bare := quantized("llama"), tmp_path / "above")
    assert not adapted_linears(bare)
    # What does not say is taken, and so is what all of them were folded into.
    lbc.load_adapter(bare, strip_metadata(tmp_path / "above"))
    lbc.save_adapter(lbc.fold_adapters(stack), tmp_path / "folded")
    folded = lbc.load_adapter(quantized("llama"), tmp_path / "folded")
    assert torch.equal(logits(folded), logits(stack))
    with pytest.raises(ValueError, match="what it was folded of, once, got it twice"):
        lbc.load_adapter(folded, tmp_path / "below")
    assert all(len(linear.adapters) == 1 for linear in adapted_linears(folded).values())


def test_a_directory_holds_what_is_loaded_from_it(tmp_path: Path) -> None:
    """Scales and an adapter that were not trained together do not share one."""
    scales, lora = tmp_path / "scales", tmp_path / "lora"
    for _ in range(2):  # of the same kind it is written over
        lbc.save_adapter(quantized("llama"), scales)
        lbc.save_adapter(lbc.prepare_lora(quantized("llama")), lora)
    before = {file: file.read_bytes() for file in [*scales.iterdir(), *lora.iterdir()]}
    with pytest.raises(ValueError, match=r"expected no adapter_config\.json, whose adapter would"):
        lbc.save_adapter(quantized("llama"), lora)
    with pytest.raises(ValueError, match=r"expected no scales\.safetensors, which would not be"):
        lbc.save_adapter(lbc.prepare_lora(quantized("llama")), scales)
    after = {file: file.read_bytes() for file in [*scales.iterdir(), *lora.iterdir()]}
    assert after == before
    with pytest.raises(ValueError, match="expected the quantized model that it was trained upon"):
        lbc.load_adapter(make_model("llama"), lora)
    for directory in (scales, lora):
        together = lbc.thaw_scales(excite(lbc.prepare_lora(quantized("llama"))))
        lbc.save_adapter(together, directory)
        loaded = lbc.load_adapter(quantized("llama"), directory)
        assert torch.equal(logits(loaded), logits(together))
        with pytest.raises(ValueError, match=r"expected no adapter_config\.json"):
            lbc.save_adapter(stretched(quantized("llama")), directory)


def test_swapping_scales(tmp_path: Path) -> None:
    model = quantized("llama")
    original = logits(model)
    lbc.save_adapter(model, tmp_path / "original")
    with torch.no_grad():
        for linear in quantized_linears(model).values():
            linear.scales.mul_(1.1)
    tuned = logits(model)
    lbc.save_adapter(model, tmp_path / "tuned")
    parameters = [linear.scales for linear in quantized_linears(model).values()]
    lbc.swap_scales(model, tmp_path / "original")
    assert torch.equal(logits(model), original)
    lbc.load_adapter(model, tmp_path / "tuned")
    assert torch.equal(logits(model), tuned) and not torch.equal(tuned, original)
    after = [linear.scales for linear in quantized_linears(model).values()]
    assert all(a is b for a, b in zip(parameters, after, strict=True))


def test_scales_under_a_frozen_adapter(tmp_path: Path) -> None:
    """PEQA on a repaired model leaves scales, not the adapter that it was trained under."""
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4, targets=None))
    lbc.save_adapter(model, tmp_path / "lrec")
    lbc.prepare_peqa(model)
    with torch.no_grad():
        for linear in quantized_linears(model).values():
            linear.scales.mul_(1.1)
    lbc.save_adapter(model, tmp_path / "peqa")
    assert {path.name for path in (tmp_path / "peqa").iterdir()} == {"scales.safetensors"}
    both = quantized("llama")
    for name in ("lrec", "peqa"):
        lbc.load_adapter(both, tmp_path / name)
    assert torch.equal(logits(both), logits(model))


def test_scales_beside_an_adapter(tmp_path: Path) -> None:
    """Trained together, they are saved, loaded, folded and saved again together."""
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4, targets=None))
    lbc.thaw_scales(model)
    with torch.no_grad():
        for linear in quantized_linears(model).values():
            linear.scales.mul_(1.1)
    expected = logits(model)
    both = {"adapter_config.json", "adapter_model.safetensors", "scales.safetensors"}
    for name in ("first", "second", "third"):
        lbc.save_adapter(model, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == both
        model = lbc.load_adapter(quantized("llama"), tmp_path / name, trainable=name == "first")
        assert torch.equal(logits(model), expected)
        trained = {key.rpartition(".")[2] for key, p in model.named_parameters() if p.requires_grad}
        expected_to = {"a", "b", "scales"} if name == "first" else set()
        assert trained & {"a", "b", "scales"} == expected_to
        if name == "second":
            model = lbc.fold_adapters(model)
            expected = logits(model)
    # Also where some linears have no adapter, whose scales train all the same.
    some = stretched(lbc.thaw_scales(excite(lbc.prepare_lora(quantized("llama"), rank=4))))
    lbc.save_adapter(lbc.fold_adapters(some), tmp_path / "some")
    loaded = lbc.load_adapter(quantized("llama"), tmp_path / "some")
    assert torch.equal(logits(loaded), logits(some))
    # Frozen, or folded, they belong together all the same.
    for name in ("frozen", "folded"):
        model = lbc.load_adapter(quantized("llama"), tmp_path / "first", trainable=True)
        if name == "folded":
            lbc.fold_adapters(model)
        else:
            model.requires_grad_(False)
        lbc.save_adapter(model, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == both
    model = lbc.thaw_scales(lbc.prepare_lora(quantized("llama"), rank=2, targets=None))
    model.requires_grad_(False)
    lbc.save_adapter(model, tmp_path / "at-once")
    assert {path.name for path in (tmp_path / "at-once").iterdir()} == both
    # What cannot be written leaves nothing behind, and half of it is refused.
    next(iter(newest_adapters(model).values())).b.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="values that fit"):
        lbc.save_adapter(model, tmp_path / "large", dtype=torch.float16)
    assert not (tmp_path / "large").exists()
    (tmp_path / "at-once" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="expected the adapter that it was trained with"):
        lbc.load_adapter(quantized("llama"), tmp_path / "at-once")
    other = quantized("llama")
    before = logits(other)
    (tmp_path / "first" / "scales.safetensors").unlink()
    with pytest.raises(ValueError, match=r"scales\.safetensors"):
        lbc.load_adapter(other, tmp_path / "first", trainable=True)
    assert torch.equal(logits(other), before)
    assert not any(p.requires_grad for key, p in other.named_parameters() if "scales" in key)
    with pytest.raises(ValueError, match="thaw_scales: model: expected a quantized one"):
        lbc.thaw_scales(make_model("llama"))


def stretched(model: PreTrainedModel) -> PreTrainedModel:
    """With other scales, as from training."""
    with torch.no_grad():
        for linear in quantized_linears(model).values():
            linear.scales.mul_(1.1)
    return model


def test_what_was_trained_upon_scales_wants_them(tmp_path: Path) -> None:
    model = stretched(quantized("llama"))
    lbc.save_adapter(model, tmp_path / "scales")
    lbc.save(model, tmp_path / "model")  # rounds them to fp16
    excite(lbc.prepare_lora(model, rank=4))
    expected = logits(model)
    lbc.save_adapter(model, tmp_path / "above")
    other = quantized("llama")
    with pytest.raises(ValueError, match="expected the scales that it was trained upon, got oth"):
        lbc.load_adapter(other, tmp_path / "above")
    assert not adapted_linears(other)
    lbc.load_adapter(lbc.load_adapter(other, tmp_path / "scales"), tmp_path / "above")
    assert torch.equal(logits(other), expected)
    written = lbc.load_adapter(lbc.load(tmp_path / "model"), tmp_path / "above")
    for linear in quantized_linears(model).values():
        linear.scales.data = linear.scales.data.half().float()
    assert torch.equal(logits(written), logits(model))


NOT_UNDER_IT = "expected under it the adapters that it was trained upon, got none"


def test_scales_that_were_trained_upon_adapters_want_them(tmp_path: Path) -> None:
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4))
    lbc.save_adapter(model, tmp_path / "below", dtype=torch.bfloat16)
    stretched(lbc.prepare_peqa(model))
    lbc.save_adapter(model, tmp_path / "scales")
    other = quantized("llama")
    before = logits(other)
    with pytest.raises(ValueError, match=NOT_UNDER_IT):
        lbc.load_adapter(other, tmp_path / "scales")
    with pytest.raises(ValueError, match=NOT_UNDER_IT):
        lbc.swap_scales(other, tmp_path / "scales")
    assert torch.equal(logits(other), before)
    excite(lbc.prepare_lora(other, rank=4), seed=5)
    with pytest.raises(ValueError, match="that it was trained upon, got others"):
        lbc.load_adapter(other, tmp_path / "scales")
    stack = [str(tmp_path / "below"), str(tmp_path / "scales")]
    other = quantized("llama")
    load_adapters(other, stack)
    round_adapter(model, torch.bfloat16)  # as its file has it
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match=NOT_UNDER_IT):
        load_adapters(quantized("llama"), stack[::-1])


OTHER_SCALES = "expected the scales that the adapters on the model were put upon"


def test_an_adapter_keeps_its_scales(tmp_path: Path) -> None:
    """No others are put under it, and what is saved of it names its own, also after they were
    trained further upon it."""
    lbc.save_adapter(quantized("llama"), tmp_path / "own")
    lbc.save_adapter(stretched(quantized("llama")), tmp_path / "others")
    both = lbc.thaw_scales(lbc.prepare_lora(quantized("llama"), rank=4, targets=None))
    lbc.save_adapter(stretched(stretched(excite(both, seed=3))), tmp_path / "both")
    lbc.save_adapter(excite(lbc.prepare_lora(quantized("llama"), rank=4)), tmp_path / "lora")
    prepared = excite(lbc.prepare_lora(quantized("llama"), rank=4))
    loaded = lbc.load_adapter(quantized("llama"), tmp_path / "lora")
    beside = lbc.load_adapter(quantized("llama"), tmp_path / "both")
    for model in (prepared, loaded, both, beside):
        before = logits(model)
        for change, name in ((lbc.swap_scales, "others"), (lbc.load_adapter, "others")):
            with pytest.raises(ValueError, match=OTHER_SCALES):
                change(model, tmp_path / name)
        assert torch.equal(logits(model), before)
    for model in (prepared, loaded):
        with pytest.raises(ValueError, match=OTHER_SCALES):
            lbc.load_adapter(model, tmp_path / "both")
        assert all(len(linear.adapters) == 1 for linear in adapted_linears(model).values())
        lbc.swap_scales(model, tmp_path / "own")  # the same

    stretched(lbc.prepare_peqa(loaded))
    lbc.save_adapter(loaded, tmp_path / "upon")
    lbc.prepare_lora(loaded, rank=2, targets=["up_proj"])
    lbc.save_adapter(excite(loaded, seed=2), tmp_path / "top")
    for name in ("own", "others"):  # of the one below, and of neither
        with pytest.raises(ValueError, match=OTHER_SCALES):
            lbc.swap_scales(loaded, tmp_path / name)
    again = quantized("llama")
    for name in ("lora", "upon", "top"):
        lbc.load_adapter(again, tmp_path / name)
    assert torch.equal(logits(again), logits(loaded))

    again = lbc.load_adapter(quantized("llama"), tmp_path / "lora")
    expected = logits(again)
    lbc.load_adapter(again, tmp_path / "upon")
    # A model that was saved with the scales takes the adapter that was saved beside it.
    lbc.save(again, tmp_path / "model")
    lbc.save_adapter(again.requires_grad_(False), tmp_path / "beside")
    written = lbc.load_adapter(lbc.load(tmp_path / "model"), tmp_path / "beside")
    round_scales(again)
    assert torch.equal(logits(written), logits(again))
    lbc.save_adapter(written, tmp_path / "resaved")  # and is what it was
    lbc.load_adapter(quantized("llama"), tmp_path / "resaved")
    lbc.save_adapter(again.requires_grad_(False), tmp_path / "lora-again")
    lbc.load_adapter(quantized("llama"), tmp_path / "lora-again")
    lbc.swap_scales(again, tmp_path / "own")
    assert torch.equal(logits(again), expected)


def test_adapters_that_are_in_each_others_way(tmp_path: Path) -> None:
    lbc.save_adapter(excite(lbc.prepare_lora(quantized("llama"), rank=4)), tmp_path / "lora")
    model = lbc.thaw_scales(lbc.prepare_lora(quantized("llama"), rank=4, targets=None))
    lbc.save_adapter(stretched(model), tmp_path / "both")
    lbc.save_adapter(stretched(quantized("llama")), tmp_path / "scales")
    lora, both, alone = (str(tmp_path / name) for name in ("lora", "both", "scales"))
    with pytest.raises(ValueError, match="lora: expected it, and what it was folded of, once, got"):
        load_adapters(quantized("llama"), [lora, lora])
    with pytest.raises(ValueError, match="both: expected one with scales, got .*whose scales it"):
        load_adapters(quantized("llama"), [alone, both])
    with pytest.raises(ValueError, match="scales: expected its scales before .*lora, got them aft"):
        load_adapters(quantized("llama"), [lora, alone])
    with pytest.raises(ValueError, match="expected the adapter that it was trained with"):
        lbc.swap_scales(quantized("llama"), both)


def test_an_adapter_is_put_on_once(tmp_path: Path) -> None:
    """It is known by its values: as it trained here, in fewer bits, and in what it was folded
    into."""
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4, alpha=12))
    lbc.save_adapter(model, tmp_path / "lora")
    lbc.save_adapter(model, tmp_path / "short", dtype=torch.bfloat16)
    lbc.load_adapter(short := quantized("llama"), tmp_path / "short")
    lbc.load_adapter(long := quantized("llama"), tmp_path / "lora")
    lbc.load_adapter(folded := quantized("llama"), tmp_path / "lora")
    excite(lbc.prepare_lora(folded, rank=2), seed=1)
    lbc.save_adapter(lbc.fold_adapters(folded), tmp_path / "folded")
    lbc.load_adapter(again := quantized("llama"), tmp_path / "folded")
    for there in (model, short, long, folded, again):
        before = logits(there)
        for name in ("lora", "short"):
            with pytest.raises(ValueError, match=f"{name}: expected it, and what .* got it twice"):
                lbc.load_adapter(there, tmp_path / name)
        assert torch.equal(logits(there), before)
    for there in (short, long):
        with pytest.raises(ValueError, match="folded: expected it, and what .* got it twice"):
            lbc.load_adapter(there, tmp_path / "folded")


def test_an_adapter_stands_for_all_that_it_started_from(tmp_path: Path) -> None:
    lbc.save_adapter(excite(lbc.prepare_lora(quantized("llama"), rank=4)), tmp_path / "1")
    for number in (1, 2):
        model = lbc.load_adapter(quantized("llama"), tmp_path / str(number), trainable=True)
        lbc.save_adapter(excite(model, seed=number + 5), tmp_path / str(number + 1))
    for first, second in itertools.permutations("123", 2):
        model = lbc.load_adapter(quantized("llama"), tmp_path / first)
        with pytest.raises(ValueError, match="either an adapter or what training made of it"):
            lbc.load_adapter(model, tmp_path / second)


def test_scales_go_back_under_what_was_trained_with_them(tmp_path: Path) -> None:
    """Also where another adapter lies below it."""
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4))
    lbc.save_adapter(model, tmp_path / "below")
    lbc.thaw_scales(excite(lbc.prepare_lora(model, rank=2), seed=1))
    lbc.save_adapter(stretched(model), tmp_path / "both")
    model = quantized("llama")
    for name in ("below", "both"):
        lbc.load_adapter(model, tmp_path / name)
    expected = logits(model)
    lbc.swap_scales(model, tmp_path / "both")
    stretched(lbc.prepare_peqa(model))
    assert not torch.equal(logits(model), expected)
    lbc.swap_scales(model, tmp_path / "both")
    assert torch.equal(logits(model), expected)


def test_scales_of_another_base_are_refused(tmp_path: Path) -> None:
    lbc.save_adapter(quantized("llama"), tmp_path)
    other = quantized("llama", bits=3)
    before = logits(other)
    with pytest.raises(ValueError, match="belongs to another base"):
        lbc.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), before)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    lbc.save_adapter(excite(lbc.prepare_lora(quantized("llama"), rank=4)), tmp_path)
    other = quantized("llama", bits=3)
    with pytest.raises(ValueError, match="belongs to another base"):
        lbc.load_adapter(other, tmp_path)
    assert not adapted_linears(other)
    with pytest.raises(ValueError, match="no such linear"):
        lbc.load_adapter(quantized("opt"), strip_metadata(tmp_path))


def strip_metadata(directory: Path) -> Path:
    file = directory / "adapter_model.safetensors"
    save_file(load_file(file), file)
    return directory


def test_an_interrupted_swap_leaves_the_old_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized("llama")
    before = logits(model)
    changed = deepcopy(model)
    with torch.no_grad():
        for linear in quantized_linears(changed).values():
            linear.scales.mul_(2)
    lbc.save_adapter(changed, tmp_path)
    last = list(quantized_linears(model))[-1]
    real = lbc.adapters._set_scales  # type: ignore[attr-defined]
    calls = []

    def interrupted(linears: dict[str, QuantLinear], values: dict[str, torch.Tensor]) -> None:
        calls.append(1)
        if len(calls) == 1:
            real({path: x for path, x in linears.items() if path != last}, values)
            raise KeyboardInterrupt
        real(linears, values)

    monkeypatch.setattr(lbc.adapters, "_set_scales", interrupted)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        lbc.swap_scales(model, tmp_path)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: expected a positive integer, got 0"),
        ({"rank": True}, "rank: expected a positive integer, got True"),
        ({"alpha": 0}, "alpha: expected a positive number"),
        ({"alpha": float("nan")}, "alpha: expected a positive number"),
        ({"alpha": "16"}, "alpha: expected a positive number, got '16'"),
        ({"dropout": None}, "dropout: expected 0 or more and below 1, got None"),
        ({"dropout": 1.0}, "dropout: expected 0 or more and below 1"),
        ({"targets": ["q_proj", "qproj"]}, r"names of linears \(down_proj, .*\), got 'qproj'"),
        ({"targets": []}, "targets: expected a list of names"),
        ({"targets": "q_proj"}, "targets: expected a list of names, got 'q_proj'"),
    ],
)
def test_bad_lora_settings(settings: dict[str, object], message: str) -> None:
    model = quantized("llama")
    with pytest.raises(ValueError, match=message):
        lbc.prepare_lora(model, **settings)  # type: ignore[arg-type]
    assert not adapted_linears(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora: expected False, got True"),
        ({"bias": "all"}, "bias: expected 'none', got 'all'"),
        ({"lora_alpha": "x"}, "lora_alpha: expected a number, got 'x'"),
        ({"r": 3}, "expected rank 3, as .* says, got 4"),
        ({"r": None}, "r: expected a number, got None"),
        ({"alpha_pattern": [1]}, "lora_alpha: expected patterns by name"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: expected True, got 'pissa_n"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: expected None, got"),
    ],
)
def test_unsupported_adapters(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    lbc.save_adapter(lbc.prepare_lora(quantized("llama"), rank=4), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    model = quantized("llama")
    with pytest.raises(ValueError, match=message):
        lbc.load_adapter(model, tmp_path)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_files(value: float, tmp_path: Path) -> None:
    model = excite(lbc.prepare_lora(quantized("llama"), rank=4))
    next(iter(newest_adapters(model).values())).b.data[0, 0] = value
    lbc.save_adapter(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        lbc.load_adapter(quantized("llama"), tmp_path / "lora")
    packed = quantized("llama")
    next(iter(quantized_linears(packed).values())).scales.data[0, 0] = value
    lbc.save_adapter(packed, tmp_path / "scales")
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        lbc.load_adapter(quantized("llama"), tmp_path / "scales")


def test_arguments_of_other_kinds(tmp_path: Path) -> None:
    model = quantized("llama")
    for call, message in (
        (lambda: lbc.swap_scales(None, tmp_path), "swap_scales: model: expected a PreTrainedMod"),
        (lambda: lbc.swap_scales(model, None), "swap_scales: path: expected a path, got NoneType"),
        (lambda: lbc.load_adapter(model, None), "load_adapter: path: expected a path, got None"),
        (lambda: lbc.save_adapter(model, None), "save_adapter: out: expected a path, got None"),
        (lambda: lbc.prepare_lora(model, targets=3), "targets: expected a list of names, got 3"),
        (lambda: lbc.prepare_lora(model, targets=[["a"]]), r"a list of names, got \[\['a'\]\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_adapter: out: expected a directory, got the file"):
        lbc.save_adapter(model, tmp_path / "file")


def test_scales_that_no_checkpoint_holds(tmp_path: Path) -> None:
    """Training may leave any sign; float16 ends at 65504, or just above, which rounds to it."""
    model = quantized("llama")
    first = next(iter(quantized_linears(model).values())).scales.data
    first[0, :4] = torch.tensor([0.0, -0.01, 65504.0, -65519.0])
    lbc.save_adapter(model, tmp_path / "scales")
    lbc.swap_scales(quantized("llama"), tmp_path / "scales")
    lbc.save(model, tmp_path / "exported")
    first[0, 3] = -1e30
    lbc.save_adapter(model, tmp_path / "scales")
    other = quantized("llama")
    before = logits(other)
    message = r"scales\.safetensors: .*q_proj\.scales: expected values within fp16 .*, got -?1e\+30"
    with pytest.raises(ValueError, match=message):
        lbc.swap_scales(other, tmp_path / "scales")
    assert torch.equal(logits(other), before)


def test_no_adapter_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"expected a directory with adapter_config.json or scales.safetensors, got one with",
    ):
        lbc.load_adapter(quantized("llama"), tmp_path)
    with pytest.raises(ValueError, match="got neither"):
        lbc.save_adapter(make_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_dropout", None, "lora_dropout: expected 0 or more and below 1, got None"),
        ("lora_dropout", 1.5, "lora_dropout: expected 0 or more and below 1, got 1.5"),
        ("rank_pattern", {"(": 2}, r"rank_pattern: '\(': "),
    ],
)
def test_bad_adapter_configs(name: str, value: object, message: str, tmp_path: Path) -> None:
    lbc.save_adapter(lbc.prepare_lora(quantized("llama"), rank=4), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
        lbc.load_adapter(quantized("llama"), tmp_path)

"""Mixtures of experts: apart they compute the same, and are quantized and saved one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    JambaConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

import lowbitcore as lbc
from lowbitcore.blocks import quantized_linears
from lowbitcore.blockwise import BlockwiseModel
from lowbitcore.modeling import use_own_operations
from lowbitcore.modeling.experts import Experts
from test_cli import succeed
from test_models import LLAMA_LIKE, logits, make_model, quantized, windows
from test_streaming import run, save_source

MIXTURES = ["mixtral", "qwen3-moe"]
EXPERT = "model.layers.0.mlp.experts.{}.gate_proj"


def first_experts(model: PreTrainedModel) -> torch.nn.Module:
    return model.get_submodule("model.layers.0.mlp.experts")


@pytest.mark.parametrize("name", MIXTURES)
def test_apart_they_compute_the_same(name: str) -> None:
    """Values and gradients, also of the router's weights and of no tokens for some expert."""
    stacked = first_experts(make_model(name))
    model = make_model(name)
    use_own_operations(model)
    apart = first_experts(model)
    assert isinstance(apart, Experts)
    count, generator = len(apart), torch.Generator().manual_seed(0)
    index = torch.randint(count - 1, (37, 2), generator=generator)  # none for the last
    found = []
    for experts in (stacked, apart):
        x = torch.randn(37, 64, generator=generator.manual_seed(1), requires_grad=True)
        weights = torch.rand(37, 2, generator=generator, requires_grad=True)
        y = experts(x, index, weights)
        y.backward(torch.randn(y.shape, generator=generator))
        found.append((y.detach(), x.grad, weights.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    gates = torch.stack([expert.gate_proj.weight.grad for expert in list(apart)[:-1]])
    torch.testing.assert_close(gates, stacked.gate_up_proj.grad[:-1, : gates.shape[1]])
    assert apart[count - 1].gate_proj.weight.grad is None
    assert torch.equal(logits(model), logits(model))
    torch.testing.assert_close(logits(model), logits(make_model(name)), rtol=1e-4, atol=1e-4)


def test_files_have_the_names_that_others_look_for(tmp_path: Path) -> None:
    run(save_source("mixtral", tmp_path / "in"), tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    experts = "model.layers.1.block_sparse_moe.experts.3"
    assert {f"{experts}.{part}.qweight" for part in ("w1", "w2", "w3")} <= names
    assert "model.layers.1.block_sparse_moe.gate.weight" in names
    assert not any(".mlp." in name for name in names)
    lbc.save_dequantized(lbc.load(tmp_path / "out"), tmp_path / "dense")
    assert f"{experts}.w2.weight" in load_file(tmp_path / "dense" / "model.safetensors")


@pytest.mark.parametrize("name", MIXTURES)
def test_save_pretrained_writes_what_transformers_reads(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    expected = logits(model)
    use_own_operations(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)
    torch.testing.assert_close(logits(lbc.load(tmp_path)), expected, rtol=1e-4, atol=1e-4)


def glm(tmp_path: Path) -> Path:
    """A checkpoint in 16 bits whose router is in float32, as transformers keeps it."""
    config = Glm4MoeConfig(
        **{**LLAMA_LIKE, "dtype": torch.bfloat16},
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    gate = model.model.layers[1].mlp.gate
    gate.weight.data = torch.randn(gate.weight.shape)
    # So near to one another that 16 bits would make many of them equal.
    gate.e_score_correction_bias = 1 + 1e-3 * torch.randn(8)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_what_chooses_experts_keeps_its_type(tmp_path: Path) -> None:
    path = glm(tmp_path / "in")
    expected = AutoModelForCausalLM.from_pretrained(path).model.layers[1].mlp.gate.state_dict()
    settings = lbc.QuantConfig(bits=8, group_size=32, method="rtn")
    lbc.quantize_checkpoint(path, tmp_path / "out", None, settings, progress=False)
    for model in (lbc.load(path), lbc.load(tmp_path / "out")):
        assert model.dtype == torch.bfloat16
        found = model.model.layers[1].mlp.gate.state_dict()
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype == torch.float32
            assert torch.equal(found[name], tensor), name
    blockwise = dict(BlockwiseModel.open(path).tensors())
    assert blockwise["model.layers.1.mlp.gate.weight"].dtype == torch.float32


def test_a_layer_that_predicts_further_tokens_is_left_out(tmp_path: Path) -> None:
    """As transformers does by the number that it has in released models."""
    path = glm(tmp_path)
    tensors = load_file(path / "model.safetensors")
    extra = {n.replace("layers.1.", "layers.46."): t.clone() for n, t in tensors.items()}
    save_file(tensors | extra, path / "model.safetensors", metadata={"format": "pt"})
    assert len(lbc.load(path).model.layers) == 2


def test_who_can_load_experts(tmp_path: Path) -> None:
    found = {}
    for name in MIXTURES:
        lbc.save(quantized(name, method="rtn"), tmp_path / name)
        _, result = succeed("info", tmp_path / name)
        assert result["loaders"]["lowbitcore"] == "loads"
        assert "it stacks them" in result["loaders"]["transformers (optimum + gptqmodel)"]
        found[name] = result["loaders"]["GPTQModel"]
    assert found["qwen3-moe"] == "loads"
    assert found["mixtral"] == "experts' linears called w1, w2, w3 (only gate_proj and so on)"


@pytest.mark.parametrize("settings", [{}, {"rank": 4}, {"tune_epochs": 1}, {"method": "rtn"}])
def test_experts_without_tokens_are_rounded(settings: dict[str, object], tmp_path: Path) -> None:
    """They are as much of the model as others, whatever the calibration says."""
    model = make_model("qwen3-moe")
    router = model.get_parameter("model.layers.0.mlp.gate.weight").data
    # Two logits are always above 0, which those of experts 2 and 5 are.
    router[1], router[2], router[3], router[4], router[5] = -router[0], 0, 2 * router[0], 0, 0
    router[4] = -router[3]
    original = {
        name: first_experts(model).state_dict()[name].clone()
        for name in ("gate_up_proj", "down_proj")
    }
    config = lbc.QuantConfig(bits=4, group_size=32, **settings)  # type: ignore[arg-type]
    model = lbc.quantize_model(model, None, windows(), config, progress=False)
    report = model.quantization_report
    assert not report.skipped and len(report.linears) == 29
    linears = quantized_linears(model)
    silent = [item.path for item in report.linears if item.loss is None]
    if "method" not in settings:
        assert {EXPERT.format(2), EXPERT.format(5)} <= set(silent) and len(silent) == 6
    gate = linears[EXPERT.format(2)].dequantize(torch.float32)
    wanted = original["gate_up_proj"][2, : len(gate)]
    codes, scales, zeros = lbc.ops.quantize_rtn(wanted, bits=4, group_size=32, mse=True)
    again = lbc.QuantLinear.from_canonical(
        lbc.ops.pack_qweight(codes, bits=4),
        lbc.ops.pack_qzeros(zeros, bits=4),
        scales,
        bits=4,
        group_size=32,
    )
    torch.testing.assert_close(gate, again.dequantize(torch.float32), rtol=2e-3, atol=1e-5)
    lbc.save(model, tmp_path)
    loaded = lbc.load(tmp_path)
    if "rank" not in settings:
        assert torch.equal(logits(loaded), logits(model))


def test_an_expert_of_all_tokens_chooses_none() -> None:
    sizes = {"num_experts": 32, "shared_expert_intermediate_size": 32, "moe_intermediate_size": 32}
    config = Qwen2MoeConfig(**{**LLAMA_LIKE, "num_hidden_layers": 1}, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    settings = lbc.QuantConfig(bits=8, group_size=32, method="rtn")
    model = lbc.quantize_model(model, None, None, settings, progress=False)
    assert len(quantized_linears(model)) == 4 + 3 * 32 + 3
    assert list(model.quantization_report.skipped) == ["model.layers.0.mlp.shared_expert_gate"]


def test_experts_are_no_blocks(tmp_path: Path) -> None:
    """Of a model whose blocks are of several kinds: it is refused, as it is without experts."""
    config = JambaConfig(**LLAMA_LIKE, num_experts=4, attn_layer_period=2, attn_layer_offset=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = lbc.QuantConfig(bits=8, group_size=32, method="rtn")
    with pytest.raises(ValueError, match="has no list of blocks"):
        lbc.quantize_checkpoint(tmp_path, tmp_path / "out", None, settings)


def test_files_that_hold_them_stacked_load(tmp_path: Path) -> None:
    """Though those of the family do not; the experts stay in 16 bits."""
    model = make_model("qwen3-moe")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    loaded = lbc.load(tmp_path)
    assert not any(isinstance(module, Experts) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    report = run(tmp_path, tmp_path / "out")
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.skipped
    quantized_model = lbc.load(tmp_path / "out")
    assert len(quantized_linears(quantized_model)) == 4 + 7
    lbc.save(quantized_model, tmp_path / "again")
    assert torch.equal(logits(lbc.load(tmp_path / "again")), logits(quantized_model))
    lbc.save_dequantized(quantized_model, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(dense), logits(quantized_model), rtol=1e-4, atol=1e-4)


def test_nothing_changes_where_experts_are_poisoned() -> None:
    model = make_model("qwen3-moe")
    before = list(model.state_dict())
    first_experts(model).down_proj.data[3, 5, 7] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj: holds NaN or Inf"):
        lbc.quantize_model(model, None, windows(), lbc.QuantConfig(bits=4, group_size=32))
    assert list(model.state_dict()) == before


def test_a_part_of_the_experts() -> None:
    use_own_operations(model := make_model("mixtral"))
    part = first_experts(model)[1:3]
    assert isinstance(part, Experts) and len(part) == 2 and part[0] is first_experts(model)[1]


def test_what_chooses_experts_stays_as_it_is() -> None:
    """Also where it is a linear whose size would do."""
    config = PhimoeConfig(**{**LLAMA_LIKE, "num_hidden_layers": 1}, num_local_experts=32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    settings = lbc.QuantConfig(bits=8, group_size=32, method="rtn")
    model = lbc.quantize_model(model, None, None, settings, progress=False)
    assert model.quantization_report.skipped == {"model.layers.0.mlp.router": "chooses experts"}
    assert len(quantized_linears(model)) == 4 + 3 * 32


def test_a_mixture_learns(tmp_path: Path) -> None:
    model = lbc.prepare_lora(quantized("qwen3-moe"), rank=4, targets=None)
    ids = windows(4, seed=3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    lbc.save_adapter(model, tmp_path)
    loaded = lbc.load_adapter(quantized("qwen3-moe"), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        GraniteMoeConfig(**LLAMA_LIKE, num_local_experts=4),
        GptOssConfig(**LLAMA_LIKE, num_local_experts=4, layer_types=["full_attention"] * 2),
    ],
    ids=["granite", "gpt-oss"],
)
def test_those_that_files_hold_stacked_stay(config: PretrainedConfig, tmp_path: Path) -> None:
    """In 16 bits, and that is said."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = logits(model)
    settings = lbc.QuantConfig(bits=8, group_size=32)
    model = lbc.quantize_model(model, None, windows(), settings, progress=False)
    assert any("experts" in path for path in model.quantization_report.skipped)
    assert not any("experts" in path for path in quantized_linears(model))
    torch.testing.assert_close(logits(model), expected, rtol=0.1, atol=0.1)
    assert (logits(model) - expected).norm() < 0.03 * expected.norm()

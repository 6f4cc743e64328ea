"""The plan of a training: counted on fake tensors, held against what trainings take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import lowbitcore as lbc
from lowbitcore.plan import parse_memory, plan
from test_cli import fail, succeed
from test_models import LLAMA_LIKE, quantized

LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "dtype": "bfloat16",
}


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    return tmp_path


def test_a_config_is_enough(config_only: Path) -> None:
    common = ("plan", config_only, "--bits", 4, "--group-size", 128, "--length", 256)
    out, result = succeed(*common, "--method", "emef", "--memory", "8GB", "--checkpointing", "full")
    assert result["trainable_parameters"] == 4_194_304
    # 6,476 M weights of 4 bits, a byte and 4 for zero and scale of 128; two tables of 16 bits.
    linears, tables = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096
    expected = linears * (0.5 + 5 / 128) + tables * 2
    assert result["weights_bytes"] == pytest.approx(expected, rel=1e-3)
    needed = result["peak_bytes"] - result["runtime_bytes"]
    assert result["weights_bytes"] < needed < result["weights_bytes"] + 0.5e9
    assert result["fits"] and result["largest_micro_batch"] > 8 and result["cache_bytes"] == 0
    assert "the largest micro-batch that does" in out
    _, result = succeed(*common, "--method", "lrec", "--memory", "4GB", "--tokens", 1000)
    assert not result["fits"] and result["largest_micro_batch"] == 0
    assert result["cache_bytes"] == 1000 * 4096 * 2
    _, result = succeed(*common, "--method", "lrec", "--targets", "q_proj", "--no-cache")
    assert result["trainable_parameters"] == 8 * 32 * 2 * 4096 and result["cache_bytes"] == 0
    rows = ("plan", config_only, "--bits", 3, "--group-size", -1)
    _, result = succeed(*rows, "--method", "peqa")
    assert result["trainable_parameters"] == 32 * (5 * 4096 + 2 * 11008) == 1_359_872
    _, result = succeed(*rows, "--method", "lrec", "--scales")
    assert result["trainable_parameters"] == 1_359_872 + 8 * 32 * (11 * 4096 + 3 * 11008)


def test_the_largest_micro_batch_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    # This process may grow between two plans, and what is left for training with it.
    monkeypatch.setattr(sys.modules["lowbitcore.plan"], "_resident", lambda: 10**9)
    config = LlamaConfig(**{**LLAMA_7B, "num_hidden_layers": 6})
    settings = {"method": "emef", "bits": 4, "group_size": 128, "length": 256}
    for checkpointing in ("full", "selective", "none"):
        more = {**settings, "memory": 4 * 10**9, "checkpointing": checkpointing}
        largest = plan(config, **more).largest_micro_batch  # type: ignore[arg-type]
        assert largest > 0
        assert plan(config, **more, micro_batch=largest).fits  # type: ignore[arg-type]
        assert not plan(config, **more, micro_batch=largest + 1).fits  # type: ignore[arg-type]


def test_a_teacher_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """While its states are cached, or all along."""
    monkeypatch.setattr(sys.modules["lowbitcore.plan"], "_resident", lambda: 10**9)
    config = LlamaConfig(**{**LLAMA_7B, "dtype": torch.bfloat16})
    settings = {"method": "lrec", "bits": 4, "group_size": 128, "length": 256, "tokens": 100_000}
    more = {**settings, "memory": 22 * 10**9, "checkpointing": "full"}
    cached, beside = (plan(config, **more, cache=cache) for cache in (True, False))  # type: ignore[arg-type]
    assert beside.teacher_bytes == pytest.approx(2 * 6.74e9, rel=1e-2)
    block, embeddings = 2 * 202.4e6, 2 * 32_000 * 4096
    states = 2 * 32_768 * 4096 * 2
    assert cached.teacher_bytes == pytest.approx(block + embeddings + states, rel=1e-2)
    # Steps are small here, and filling the cache is the peak: no gradients and moments yet.
    adapters = cached.optimizer_bytes - 12 * cached.trainable_parameters
    held = (32 << 20) + int(0.1 * cached.loss_bytes)
    filling = cached.runtime_bytes + cached.weights_bytes + adapters + cached.teacher_bytes + held
    assert filling == cached.peak_bytes < beside.peak_bytes
    assert cached.peak_bytes < beside.peak_bytes - 12e9
    assert cached.largest_micro_batch > beside.largest_micro_batch > 0 == beside.cache_bytes
    less = {**more, "memory": cached.peak_bytes - 1}
    assert not plan(config, **less).fits  # type: ignore[arg-type]
    assert plan(config, **{**less, "memory": cached.peak_bytes}).fits  # type: ignore[arg-type]


def test_a_tokenizer_grows_with_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lowbitcore.plan"], "_resident", lambda: 10**9)
    settings = {"method": "emef", "bits": 4, "group_size": 32, "length": 64, "memory": 10**9}
    for words in (4096, 50_000):
        config = LlamaConfig(**{**LLAMA_LIKE, "vocab_size": words})
        planned = plan(config, **settings)  # type: ignore[arg-type]
        assert planned.runtime_bytes == 10**9 + 640 * words
        assert planned.peak_bytes > planned.runtime_bytes + planned.weights_bytes


def test_weights_are_of_the_configs_type() -> None:
    config = LlamaConfig(**{**LLAMA_LIKE, "vocab_size": 4096})
    settings = {"method": "emef", "bits": 4, "group_size": 32, "length": 64, "memory": 10**9}
    weights = {}
    for dtype in (None, torch.bfloat16, torch.float32):
        config.dtype = dtype
        weights[dtype] = plan(config, **settings).weights_bytes  # type: ignore[arg-type]
    assert weights[torch.float32] - weights[torch.bfloat16] > 2 * 2 * 4096 * 64
    assert weights[None] == weights[torch.float32]


def test_scales_beside_an_adapter() -> None:
    """As many as train on a real model, each a gradient and two moments more in float32; their
    masters are among the weights, and the adapter keeps their inputs anyway."""
    model = quantized("llama")
    settings = {
        "method": "lrec",
        "bits": 4,
        "group_size": 32,
        "length": 64,
        "rank": 4,
        "memory": 10**9,
    }
    planned = []
    for scales in (False, True):
        lbc.prepare_lora(model, rank=4, targets=None)
        if scales:
            lbc.thaw_scales(model)
        planned.append(plan(model.config, **settings, scales=scales))  # type: ignore[arg-type]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert planned[-1].trainable_parameters == trained
    alone, both = planned
    scales_bytes = 12 * (both.trainable_parameters - alone.trainable_parameters)
    assert both.optimizer_bytes - alone.optimizer_bytes == scales_bytes > 0
    needed = [item.peak_bytes - item.runtime_bytes for item in planned]
    assert needed[1] - needed[0] == scales_bytes


def test_a_mixture_of_experts() -> None:
    model = lbc.prepare_lora(quantized("qwen3-moe"), rank=4, targets=None)
    settings = {"method": "lrec", "bits": 4, "group_size": 32, "length": 32, "memory": 10**9}
    planned = plan(model.config, **settings, rank=4)  # type: ignore[arg-type]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.trainable_parameters == trained
    more = plan(model.config, **settings, rank=4, micro_batch=3)  # type: ignore[arg-type]
    assert more.activation_bytes == pytest.approx(3 * planned.activation_bytes, rel=0.05)


MEASURED = """
import resource, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig
import lowbitcore as lbc
from lowbitcore.heap import keep_heap_small
from lowbitcore.lrec import _DistilledModel
from lowbitcore.modeling import use_own_operations
from lowbitcore.plan import plan
from lowbitcore.training import TrainedModel, set_checkpointing

def file_pages():
    # Of libraries: how many are mapped is the system's business.
    for line in open("/proc/self/status"):
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024

method, kind, family = sys.argv[1:]
method, _, beside = method.partition("-")
sizes = dict(
    vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=12,
    num_attention_heads=8, max_position_embeddings=512, dtype=torch.bfloat16,
)
if family == "llama":
    config = LlamaConfig(**sizes)
else:
    config = Qwen3MoeConfig(
        **sizes, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256, head_dim=64
    )
planned = plan(
    config, method=method, bits=4, group_size=64, length=512, micro_batch=4, memory=1 << 40,
    checkpointing=kind, cache=not beside,
)
planned = planned.peak_bytes - file_pages()
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model = lbc.quantize_model(
    model, None, None, lbc.QuantConfig(group_size=64, method="rtn", mse=False), progress=False
)
if method == "peqa":
    lbc.prepare_peqa(model)
else:
    lbc.prepare_lora(model, rank=8, targets=None if method == "lrec" else ["q_proj", "v_proj"])
set_checkpointing(model, kind)
if kind == "full":
    keep_heap_small()
if method == "lrec":
    teacher = None
    if beside:
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        use_own_operations(teacher)
    trained = _DistilledModel(model, teacher, 1.0, 0.1, "forward").train()
else:
    trained = TrainedModel(model).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
for step in range(3):
    ids = torch.randint(8192, (4, 512))
    batch = {"input_ids": ids, "labels": ids}
    if method == "lrec" and not beside:  # as from a cache
        batch["teacher_hidden"] = torch.randn(4, 512, 512, dtype=torch.bfloat16)
    trained(**batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - file_pages()
print(planned / 1e6, peak / 1e6)
"""


@pytest.mark.full  # what an allocator keeps differs from environment to environment
@pytest.mark.parametrize("kind", ["full", "selective", "none"])
@pytest.mark.parametrize("method", ["emef", "peqa", "lrec", "lrec-beside"])
@pytest.mark.parametrize("family", ["llama", "mixture"])
def test_plans_are_within_ten_percent(
    family: str, method: str, kind: str, request: pytest.FixtureRequest
) -> None:
    if (family, method, kind) == ("mixture", "lrec", "selective"):
        request.applymarker(pytest.mark.xfail(reason="plans 11% more than it takes"))
    command = [sys.executable, "-c", MEASURED, method, kind, family]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    planned, peak = map(float, done.stdout.splitlines()[-1].split())
    assert abs(planned / peak - 1) < 0.1, (planned, peak)


def test_sizes() -> None:
    assert parse_memory("8GB") == 8 * 10**9
    assert parse_memory(" 1.5 g") == 15 * 10**8
    assert parse_memory("512MB") == 512 * 10**6
    assert parse_memory("8GiB") == 8 * 2**30
    assert parse_memory(None) > 10**8


def test_bad_plans(config_only: Path) -> None:
    common = ("plan", config_only, "--method", "emef", "--bits", 4)
    assert "--memory: expected a size such as 8GB" in fail(*common, "--memory", "lots")
    assert "--micro-batch: expected at least 1" in fail(*common, "--micro-batch", 0)
    assert "--length: expected at most 2048 for this model" in fail(*common, "--length", 4096)
    assert "--targets: expected names of linears" in fail(*common, "--targets", "x")
    assert "scales: expected lrec, which has --scales-lr, got emef" in fail(*common, "--scales")
    assert "--tokens: expected at least 0, got -5" in fail(*common, "--tokens", -5)
    peqa = ("plan", config_only, "--method", "peqa", "--bits", 4, "--targets", "q_proj")
    assert "--targets: expected none for peqa" in fail(*peqa)
    assert "--bits: expected 2, 3, 4 or 8" in fail(*common[:-1], 5)
    assert "config.json" in fail("plan", config_only.parent, *common[2:])

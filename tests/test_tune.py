"""Training blocks while they are quantized: where it starts, what it may change, what it gains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowbitcore as lbc
from lowbitcore import ops, quantize, tune
from lowbitcore.blocks import quantized_linears
from lowbitcore.formats import peft
from lowbitcore.formats.peft import LowRankTensors
from test_models import CONFIGS, logits, make_model, quantized, windows
from test_streaming import contents, killed_run, run, save_source


def make_linear(
    bits: int, n: int, k: int, group_size: int, seed: int, permuted: bool
) -> lbc.QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    groups = ops.group_count(k, group_size)
    g_idx = ops.trivial_g_idx(k, group_size)
    if permuted:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    codes = torch.randint(2**bits, (n, k), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(2**bits, (groups, n), generator=generator, dtype=torch.uint8)
    scales = (0.1 * torch.rand(groups, n, generator=generator)).half().float()
    scales[0, 0] = 0.0  # a group that says nothing
    return lbc.QuantLinear.from_canonical(
        ops.pack_qweight(codes, bits=bits),
        ops.pack_qzeros(zeros, bits=bits),
        scales,
        bits=bits,
        group_size=group_size,
        g_idx=g_idx,
    )


shapes = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "n": st.integers(1, 3).map(lambda x: 32 * x),
    "k": st.integers(1, 6).map(lambda x: 32 * x),
    "group_size": st.sampled_from([-1, 32, 64, 96]),
    "seed": st.integers(0, 1000),
    "permuted": st.booleans(),
    "rank": st.sampled_from([0, 3]),
}


@given(**shapes)
def test_it_starts_and_ends_at_the_linear(
    bits: int, n: int, k: int, group_size: int, seed: int, permuted: bool, rank: int
) -> None:
    torch.manual_seed(seed)
    linear = make_linear(bits, n, k, group_size, seed, permuted)
    expected = linear.dequantize().double()
    correction = None
    if rank:
        correction = LowRankTensors(torch.randn(rank, k), torch.randn(n, rank), 0.5)
        expected += peft.product(correction).double()
    item = tune.FakeQuantized(linear, correction, torch.randn(n, k))
    torch.testing.assert_close(item().detach().double(), expected, rtol=1e-5, atol=1e-5)
    result = item.trained()
    stored = linear.canonical()
    assert torch.equal(ops.pack_qweight(result.codes, bits=bits), stored["qweight"])
    assert torch.equal(result.scales, stored["scales"])
    assert (result.correction is None) == (correction is None)


@given(**shapes)
def test_gradients_are_those_of_the_dense_weight(
    bits: int, n: int, k: int, group_size: int, seed: int, permuted: bool, rank: int
) -> None:
    """As if integers were any number: dW s for the latent values, and for a scale's logarithm the
    sum of dW W over its group."""
    del rank
    torch.manual_seed(seed)
    linear = make_linear(bits, n, k, group_size, seed, permuted)
    item = tune.FakeQuantized(linear, None, torch.randn(n, k))
    d_weight = torch.randn(n, k)
    item().backward(d_weight)
    g_idx = linear.canonical()["g_idx"].long()
    scales = linear.scales.detach()[g_idx].T.double()
    latent = item._flat(item.latent.grad)
    torch.testing.assert_close(latent.double(), d_weight.double() * scales, rtol=1e-5, atol=1e-6)
    products = d_weight.double() * linear.dequantize().double()
    wanted = torch.zeros(len(linear.scales), n, dtype=torch.float64).index_add_(
        0, g_idx, products.T
    )
    torch.testing.assert_close(
        item.scale_logs.grad[:, :, 0].T.double(), wanted, rtol=1e-4, atol=1e-4
    )


def test_corrections_in_sixteen_bits() -> None:
    torch.manual_seed(0)
    linear = make_linear(3, 64, 96, 32, 7, permuted=True)
    correction = LowRankTensors(torch.randn(4, 96), torch.randn(64, 4), 0.5)
    item = tune.FakeQuantized(linear, correction, torch.randn(64, 96).bfloat16())
    weight = item()
    assert weight.dtype == torch.bfloat16
    expected = linear.dequantize() + peft.product(correction)
    torch.testing.assert_close(weight.float(), expected, rtol=1e-2, atol=3e-2)
    d_weight = torch.randn(64, 96).bfloat16()
    weight.backward(d_weight)
    d_a = 0.5 * correction.b.T @ d_weight.float()
    d_b = 0.5 * d_weight.float() @ correction.a.T
    torch.testing.assert_close(item.a.grad, d_a, rtol=1e-2, atol=0.1)
    torch.testing.assert_close(item.b.grad, d_b, rtol=1e-2, atol=0.1)


def test_integers_move_to_where_they_are_wanted() -> None:
    """Some weights are wanted a whole step away, either way, so that no scale can help."""
    torch.manual_seed(0)
    linear = make_linear(4, 32, 64, 32, 5, permuted=False)
    scales = torch.full_like(linear.scales, 0.5)
    zeros = ops.pack_qzeros(torch.full(scales.shape, 8, dtype=torch.uint8), bits=4)
    start = torch.randint(4, 12, (32, 64), dtype=torch.uint8)
    wanted = start + torch.randint(-1, 2, (32, 64))
    linear.set_canonical(ops.pack_qweight(start, bits=4), zeros, scales)
    item = tune.FakeQuantized(linear, None, (start - 8.0) * 0.5)
    x = [torch.randn(8, 128, 64)]
    y = [x[0] @ ((wanted - 8.0) * 0.5).T]
    tune.train_block({"": item}, lambda x, w: x @ w[""].T, x, y, epochs=60, seed=0)
    assert (start != wanted).float().mean() > 0.5
    assert (item.trained().codes == wanted).float().mean() > 0.95


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_tuned_models_are_nearer_to_the_original(name: str, rank: int) -> None:
    """On the calibration data: such small models on tokens by chance have nothing to generalise."""
    settings = {"bits": 2, "rank": rank, "count": 24}
    tuned = quantized(name, tune_epochs=16, **settings)
    blocks = tuned.quantization_report.blocks
    assert len(blocks) == tuned.config.num_hidden_layers
    assert all(0 < block.after < 0.96 * block.before for block in blocks)
    original, plain = make_model(name), quantized(name, **settings)
    with torch.no_grad():
        wanted, after, before = (
            model(input_ids=windows(24), use_cache=False).logits
            for model in (original, tuned, plain)
        )
    assert (after - wanted).norm() < 0.97 * (before - wanted).norm()
    assert plain.quantization_report.blocks == []
    assert tuned.quantization_report.bytes == plain.quantization_report.bytes


@pytest.mark.parametrize("act_order", ["static", "dynamic", "none"])
@pytest.mark.parametrize("sym", [False, True])
def test_zeros_and_groups_stay(act_order: str, sym: bool) -> None:
    settings = {"bits": 3, "act_order": act_order, "sym": sym, "group_size": 32}
    tuned = quantized_linears(quantized("llama", tune_epochs=40, **settings))
    plain = quantized_linears(quantized("llama", **settings))
    changed = 0
    for path in list(plain)[:3]:  # q, k and v of the first block, which start from the same
        ours, theirs = tuned[path].canonical(), plain[path].canonical()
        assert torch.equal(ours["qzeros"], theirs["qzeros"])
        assert torch.equal(ours["g_idx"], theirs["g_idx"])
        assert (ours["scales"] > 0).all() and torch.equal(
            ours["scales"], ours["scales"].half().float()
        )
        changed += int((ours["qweight"] != theirs["qweight"]).sum())
    assert changed
    trivial = ops.trivial_g_idx(64, 32)
    assert torch.equal(ours["g_idx"], trivial) == (act_order != "dynamic")


def test_a_block_that_training_makes_worse_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_LATENT_RATE", 30.0)
    tuned, plain = quantized("llama", tune_epochs=1), quantized("llama")
    for block in tuned.quantization_report.blocks:
        assert block.stayed and block.after >= block.before == block.error
    assert torch.equal(logits(tuned), logits(plain))


@pytest.mark.parametrize("step", [0, 3])
def test_a_training_that_diverges_leaves_the_block(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only its last step does, whose loss was still finite."""
    grad, done = torch.autograd.grad, []

    def diverging(loss: torch.Tensor, *args: object, **settings: object) -> object:
        done.append(loss)
        found = grad(loss, *args, **settings)
        return [x + float("nan") for x in found] if len(done) % 4 == (step + 1) % 4 else found

    monkeypatch.setattr(torch.autograd, "grad", diverging)
    tuned = quantized("llama", count=4, tune_epochs=1)
    monkeypatch.undo()
    assert [item.after for item in tuned.quantization_report.blocks] == [None, None]
    assert all(item.stayed for item in tuned.quantization_report.blocks)
    assert torch.equal(logits(tuned), logits(quantized("llama", count=4)))


def test_latent_values_start_where_the_weight_lies() -> None:
    """Less the correction, in steps of the grid, and inside the cell of the integer."""
    linear = make_linear(3, 32, 96, 32, 7, permuted=True)
    generator = torch.Generator().manual_seed(8)
    correction = LowRankTensors(
        torch.randn(2, 96, generator=generator), torch.randn(32, 2, generator=generator), 0.05
    )
    exact = linear.dequantize() + peft.product(correction)
    noise = 0.1 * torch.randn(32, 96, generator=generator)
    item = tune.FakeQuantized(linear, correction, exact + noise)
    stored = linear.canonical()
    g_idx = stored["g_idx"].long()
    scales = linear.scales.detach()[g_idx].T
    codes = ops.unpack_qweight(stored["qweight"], bits=3).float()
    inside = (noise / scales).clamp(-0.45, 0.45)
    wanted = codes + torch.where(scales > 0, inside, 0.0)
    torch.testing.assert_close(item._flat(item.latent.detach()), wanted, rtol=1e-4, atol=1e-3)
    assert (inside.abs() < 0.45).any() and (inside.abs() == 0.45).any()


def test_latent_values_stay_on_the_grid() -> None:
    item = tune.FakeQuantized(
        make_linear(2, 32, 64, 32, 3, permuted=False), None, torch.zeros(32, 64)
    )
    with torch.no_grad():
        item.latent.add_(torch.linspace(-9, 9, item.latent.numel()).view_as(item.latent))
    item.keep_in_range()
    assert item.latent.min() == -0.5 and item.latent.max() == 3.5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_streaming_and_resuming_tune_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lbc.QuantConfig(bits=2, group_size=32, rank=4, tune_epochs=16)
    source = save_source(name, tmp_path / "in")
    report = run(source, tmp_path / "whole", config)
    killed_run(source, tmp_path / "out", 1, monkeypatch, config)
    resumed = run(source, tmp_path / "out", config, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert resumed.blocks == report.blocks and not any(item.stayed for item in report.blocks)
    in_memory = lbc.quantize_model(make_model(name), None, windows(), config, progress=False)
    loaded = lbc.load_adapter(lbc.load(tmp_path / "out"), tmp_path / "out" / "correction")
    assert torch.equal(logits(loaded), logits(in_memory))
    untuned = quantized_linears(quantized(name, bits=2, rank=4))
    path, linear = next(iter(untuned.items()))
    tuned = quantized_linears(loaded)[path]
    assert not torch.equal(linear.canonical()["qweight"], tuned.canonical()["qweight"])


def test_only_what_is_quantized_trains() -> None:
    """Norms keep their values and go on wanting gradients; unreached linears stay as they are."""
    model, original = make_model("llama"), make_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))
    wanting = model.model.norm.weight.requires_grad
    config = lbc.QuantConfig(bits=2, group_size=32, tune_epochs=8, true_sequential=False)
    lbc.quantize_model(model, None, windows(), config, progress=False)
    assert not any(item.stayed for item in model.quantization_report.blocks)
    kept = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]) and parameter.grad is None, name
            assert parameter.requires_grad == wanting, name
    assert isinstance(mlp.up_proj, torch.nn.Linear)


def test_blocks_without_anything_to_tune() -> None:
    model = make_model("llama")
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    config = lbc.QuantConfig(bits=2, group_size=32, tune_epochs=8)
    lbc.quantize_model(model, None, windows(), config, progress=False)
    assert [item.path for item in model.quantization_report.blocks] == ["model.layers.0"]


def test_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "compute_dtype", lambda *_: torch.bfloat16)
    model = make_model("llama", dtype=torch.bfloat16)
    config = lbc.QuantConfig(bits=2, group_size=32, tune_epochs=8)
    lbc.quantize_model(model, None, windows(24), config, progress=False)
    assert model.dtype == torch.bfloat16
    assert all(item.error < 0.97 * item.before for item in model.quantization_report.blocks)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tune_epochs": -1}, "tune_epochs: expected 0 or a positive integer, got -1"),
        ({"tune_epochs": 1.5}, "tune_epochs: expected 0 or a positive integer, got 1.5"),
        ({"tune_epochs": 1, "method": "rtn"}, "tune_epochs: expected 0 where the method is rtn"),
        ({"tune_epochs": 1, "target": "layer"}, "tune_epochs: expected 0 unless the target is"),
    ],
)
def test_bad_settings(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        lbc.QuantConfig(**settings)


def test_neither_one_large_token_nor_all_small_ones_may_be_lost() -> None:
    wanted = torch.ones(1, 100, 8)
    wanted[0, 0] *= 1000
    for lost in (slice(0, 1), slice(1, 100)):
        output = wanted.clone()
        output[0, lost] = 0
        assert 0.45 < float(tune.block_error(output, wanted)) < 0.55
    assert float(tune.block_error(wanted, wanted)) == 0

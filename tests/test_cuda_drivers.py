"""Whole drivers on the CUDA backend: quantizing, loading, measuring, training, moving.

In the interpreter (default) or on a GPU (`--device cuda`), beside the same on the CPU. What only a
machine without a GPU can show is here too: what it says when asked for one.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainingArguments

import lowbitcore as lbc
import reference as ref
from cuda_device import CudaDevice
from elsewhere import Elsewhere, Elsewheres, moved
from lowbitcore import adapters, dispatch, lrec, nn, ops, quantize, recipes, runtime, training
from lowbitcore.blocks import quantized_linears
from lowbitcore.data import Example, TrainingSet
from lowbitcore.ops import operators
from test_adapters import excite
from test_cli import fail, succeed
from test_data import make_tokenizer, text_of
from test_models import make_model, quantized, windows

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model` and what the CPU made of it, `quantized`; with a text."""
    directory = tmp_path_factory.mktemp("drivers")
    tokenizer = make_tokenizer()
    make_model("llama").save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    lbc.save(quantized("llama", bits=3), directory / "quantized", tokenizer)
    (directory / "text.txt").write_text(text_of(400))
    return directory


def on_both(
    device: CudaDevice, load: Callable[[str], PreTrainedModel], work: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """What `work` makes of a model of the backend, and of one of the CPU."""
    here = work(load(str(device.torch)))
    with device.set_aside():
        return here, work(load("cpu"))


# ---- models ----


def mean_loss(model: PreTrainedModel) -> float:
    losses = [item.loss for item in model.quantization_report.linears]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("rank", [0, 4])
def test_quantize_in_memory(device: CudaDevice, rank: int) -> None:
    """As on the CPU, but for what another order of sums does to a few integers."""
    config = lbc.QuantConfig(bits=3, group_size=32, rank=rank, act_order="dynamic")

    def work(model: PreTrainedModel) -> tuple[list[torch.Tensor], float]:
        lbc.quantize_model(model, None, windows(3), config, progress=False)
        linears = quantized_linears(model).values()
        codes = [ops.unpack_qweight(x.canonical()["qweight"].cpu(), bits=3) for x in linears]
        return codes, mean_loss(model)

    here, there = on_both(device, lambda where: make_model("llama").to(where), work)
    assert here[1] == pytest.approx(there[1], rel=0.1 if rank else 0.02)
    if device.emulated or not rank:  # a GPU draws other random projections for the correction
        for a, b in zip(here[0], there[0], strict=True):
            assert (a != b).float().mean() < 0.01


def test_quantize_a_checkpoint(device: CudaDevice, checkpoints: Path, tmp_path: Path) -> None:
    """What this backend writes the CPU reads: files know no layout."""
    config = lbc.QuantConfig(bits=4, group_size=32, rank=2)
    where = device.torch
    lbc.quantize_checkpoint(
        checkpoints / "model", tmp_path / "out", windows(3), config, device=where, progress=False
    )

    def load(where: str) -> PreTrainedModel:
        model = lbc.load(tmp_path / "out", device=where)
        return lbc.load_adapter(model, tmp_path / "out/correction").eval()

    here, there = on_both(device, load, logits)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = windows(2, seed=9).to(model.device)
    return model(input_ids=ids, use_cache=False).logits.float().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perplexity(device: CudaDevice, checkpoints: Path, dtype: torch.dtype) -> None:
    def measure(model: PreTrainedModel) -> float:
        return lbc.perplexity(
            model, make_tokenizer(), text_of(400), context=48, windows=2, progress=False
        ).ppl

    here, there = on_both(
        device,
        lambda where: lbc.load(checkpoints / "quantized", dtype=dtype, device=where),
        measure,
    )
    assert here == pytest.approx(there, rel=TOLERANCE[dtype])


def test_the_command_line(device: CudaDevice, checkpoints: Path, tmp_path: Path) -> None:
    """quantize, eval, generate and training as a user calls them."""
    where = ("--device", device.torch.type)
    model, text, out = checkpoints / "model", checkpoints / "text.txt", tmp_path / "quantized"
    calibration = ("--calib", "self", "--samples", 2, "--length", 16)
    succeed("quantize", model, out, "--bits", 4, "--group-size", 32, *calibration, *where)
    evaluation = ("eval", out, "--text", text, "--context", 32, "--windows", 1)
    _, result = succeed(*evaluation, *where)
    with device.set_aside():
        _, expected = succeed(*evaluation)
    assert result["ppl"] == pytest.approx(expected["ppl"], rel=1e-4)
    _, answer = succeed(
        "generate", out, "--prompt", text_of(5), "--max-new-tokens", 2, "--dtype", "bf16", *where
    )
    assert answer["tokens"] > 0
    teacher = ("--teacher", model, "--cache", tmp_path / "cache", "--data", text)
    size = ("--steps", 2, "--batch", 1, "--length", 16, "--checkpointing", "none")
    _, result = succeed("lrec", out, tmp_path / "adapter", *teacher, *size, *where)
    assert result["loss"] > 0


# ---- training ----


def arguments(out: Path, *, use_cpu: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=use_cpu,
    )


def instructions() -> TrainingSet:
    """Of unequal lengths, so that there is a mask."""
    examples = [Example(text_of(3 + i) + " ", text_of(4, seed=i)) for i in range(4)]
    return TrainingSet(examples, make_tokenizer(), length=16)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("peqa", torch.float32),
        ("peqa", torch.bfloat16),
        ("emef", torch.float32),
        ("emef", torch.bfloat16),
        ("lrec", torch.float32),
        ("lrec-cache", torch.bfloat16),
    ],
)
def test_training(
    device: CudaDevice, checkpoints: Path, tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    """Steps of the real Trainers: losses and what is learnt agree with the CPU's; and what is
    saved is read on either."""
    out = tmp_path / "learnt"
    data = instructions()

    def work(model: PreTrainedModel) -> list[float]:
        settings = arguments(tmp_path / "run", use_cpu=model.device.type == "cpu")
        torch.manual_seed(0)
        if method == "peqa":
            trainer: Any = lbc.PeqaTrainer(lbc.prepare_peqa(model), settings, data)
        elif method == "emef":
            model = excite(lbc.prepare_lora(model, rank=4))
            trainer = lbc.EmefTrainer(model, settings, data)
        else:
            model = excite(lbc.prepare_lora(model, rank=4, targets=None))
            teacher: Any = lbc.load(checkpoints / "model", dtype=dtype)  # the Trainer moves it
            if method == "lrec-cache":
                # The second time it is there: what binds it to teacher and data knows no device.
                teacher = teacher.to(model.device)
                teacher = lbc.TeacherCache.fill(tmp_path / "cache", teacher, data, progress=False)
            trainer = lbc.LrecTrainer(model, settings, data, teacher=teacher)
        trainer.train()
        lbc.save_adapter(model, out)
        return [item["loss"] for item in trainer.state.log_history if "loss" in item]

    def load(where: str) -> PreTrainedModel:
        return lbc.load(checkpoints / "quantized", dtype=dtype, device=where)

    here, there = on_both(device, load, work)
    assert len(here) == 2
    assert here == pytest.approx(there, rel=TOLERANCE[dtype])
    here, there = on_both(device, lambda where: lbc.load_adapter(load(where), out), logits)
    assert (here - there).norm() < 2 * TOLERANCE[dtype] * there.norm()


def test_arguments_of_a_gpu(tmp_path: Path) -> None:
    schedule = recipes.Schedule("text.txt", steps=1)
    for name in ("cpu", "cuda"):
        found = recipes._arguments(schedule, 1, tmp_path, 1, torch.device(name), evaluate=False)
        assert found.use_cpu == (name == "cpu")
        assert found.ddp_backend is None


def test_a_process_trains_on_one_gpu(tmp_path: Path) -> None:
    """transformers would spread the batch over all that there are, and leave the teacher behind."""
    settings = arguments(tmp_path, use_cpu=True)
    settings._n_gpu = 2
    trainer = lbc.EmefTrainer(lbc.prepare_lora(quantized("llama")), settings, instructions())
    assert trainer.args.n_gpu == 1


def test_the_gpu_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is transformers' choice: another one is refused, and not left idle."""
    monkeypatch.setattr(recipes, "resolve_device", torch.device)
    assert recipes.training_device("cpu") == torch.device("cpu")
    assert recipes.training_device("cuda") == torch.device("cuda")
    assert recipes.training_device("cuda:0") == torch.device("cuda:0")
    wanted = "device: expected cuda, got cuda:1: a process trains on cuda:0: .*CUDA_VISIBLE_DEVICES"
    with pytest.raises(ValueError, match=wanted):
        recipes.training_device("cuda:1")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("LOCAL_RANK", "1")
        assert recipes.training_device("cuda") == torch.device("cuda:1")
        with pytest.raises(ValueError, match="got cuda:0: a process trains on cuda:1"):
            recipes.training_device("cuda:0")

    model, settings = lbc.prepare_lora(quantized("llama")), arguments(tmp_path, use_cpu=True)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda:1")))
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: torch.device("cuda:0")))
    with pytest.raises(ValueError, match="model: expected one on cuda:0, .* got one on cuda:1"):
        lbc.EmefTrainer(model, settings, instructions())


# ---- every tensor where its operands are ----


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quantize, "resolve_device", torch.device)
    with Elsewheres():
        yield


def assert_elsewhere(model: PreTrainedModel) -> None:
    assert {type(item.detach()) for item in (*model.parameters(), *model.buffers())} == {Elsewhere}


def test_elsewhere_refuses_what_a_gpu_refuses(elsewhere: None) -> None:
    there = Elsewhere(torch.ones(3))
    assert (2 * there + torch.tensor(1.0)).tolist() == [3, 3, 3]
    assert isinstance(torch.zeros(3, device=there.device) + there, Elsewhere)
    assert not isinstance(there.cpu(), Elsewhere)
    with pytest.raises(RuntimeError, match="add.Tensor: expected tensors of one device"):
        there + torch.ones(3)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4},
        {"act_order": "dynamic", "true_sequential": False},
        {"method": "rtn"},
        {"target": "layer", "mse": False},
    ],
    ids=str,
)
def test_quantize_elsewhere(elsewhere: None, settings: dict[str, Any]) -> None:
    model = moved(make_model("llama"))
    config = lbc.QuantConfig(bits=3, group_size=32, **settings)
    lbc.quantize_model(model, None, windows(3), config, progress=False)
    assert_elsewhere(model)
    here = lbc.quantize_model(make_model("llama"), None, windows(3), config, progress=False)
    if config.method == "rtn":
        torch.testing.assert_close(logits(model), logits(here), rtol=1e-4, atol=1e-4)
    else:  # attention takes another kernel, and integers are sensitive
        assert mean_loss(model) == pytest.approx(mean_loss(here), rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("method", ["peqa", "emef", "lrec"])
def test_train_elsewhere(elsewhere: None, method: str, checkpointing: Any) -> None:
    model = moved(quantized("llama"))
    if method == "peqa":
        lbc.prepare_peqa(model)
    else:
        lbc.prepare_lora(model, rank=4, targets=None, dropout=0.1)
    training.set_checkpointing(model.train(), checkpointing)
    trained = training.TrainedModel(model)
    if method == "lrec":
        trained = lrec._DistilledModel(model, moved(make_model("llama")), 1.0, 0.1, "forward")
    batch = training.collate([instructions()[i] for i in range(2)])
    loss = trained(**{name: Elsewhere(item) for name, item in batch.items()})["loss"]
    loss.backward()
    found = {type(p.grad) for p in model.parameters() if p.requires_grad}
    assert isinstance(loss.detach(), Elsewhere) and found == {Elsewhere}


def test_save_elsewhere(elsewhere: None, tmp_path: Path) -> None:
    """Files and hashes are those of the CPU, and what is read lands where the model is."""
    model = moved(quantized("llama"))
    lbc.prepare_lora(model, rank=2)
    lbc.save(model, tmp_path / "model")
    lbc.save_adapter(model, tmp_path / "adapter")
    adapters.save_scales(model, tmp_path / "scales")
    lbc.swap_scales(model, tmp_path / "scales")
    model = moved(quantized("llama"))
    lbc.load_adapter(model, tmp_path / "adapter")
    lbc.prepare_lora(model, rank=2)
    adapters.round_adapter(model, torch.float16)
    lbc.fold_adapters(model)
    assert_elsewhere(model)
    here = quantized("llama")
    there = moved(quantized("llama"))
    assert lrec.fingerprint(there.state_dict().items()) == lrec.fingerprint(
        here.state_dict().items()
    )
    lbc.save(here, tmp_path / "here")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


# ---- layers that move ----


def problem(g_idx: str = "permuted") -> ref.Problem:
    return ref.random_problem(
        5, bits=3, group_size=64, out_features=64, in_features=160, g_idx=g_idx
    )


def a_layer(where: torch.device | None = None, g_idx: str = "permuted") -> nn.QuantLinear:
    drawn = problem(g_idx)
    tensors = (drawn.qweight(), drawn.qzeros(), drawn.scales_tensor(), drawn.g_idx_tensor())
    qweight, qzeros, scales, order = (None if x is None else x.to(where) for x in tensors)
    return nn.QuantLinear.from_canonical(
        qweight, qzeros, scales, bits=3, group_size=64, g_idx=order, bias=torch.ones(64).to(where)
    )


def assert_works(layer: nn.QuantLinear, device: CudaDevice | None = None) -> None:
    x = ref.random_activations(1, 6, 160, torch.float32)
    expected = x.double() @ torch.from_numpy(problem().w_hat).T + 1
    with torch.no_grad():
        y = layer(x if device is None else device.put(x))
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_moves(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the backend and back: each time into the layout of where it goes."""
    with device.set_aside():
        layer = a_layer()
    before = layer.packed.clone()
    if device.emulated is None:
        layer.to(device.torch)
    else:
        # Here all tensors are the CPU's: what would move them does nothing, and says otherwise.
        unpack = ops.unpack

        def unpack_there(*args: Any, **kwargs: Any) -> Any:
            with device.set_aside():
                return unpack(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(nn, "_device_after", lambda fn, tensor: torch.device("cuda"))
            patch.setattr(ops, "unpack", unpack_there)
            layer.to(device.torch)
    assert not torch.equal(layer.packed.cpu(), before)
    assert torch.equal(layer.packed, a_layer(device.torch).packed)
    assert_works(layer, device)
    assert_works(copy.deepcopy(layer), device)
    if device.emulated is None:
        assert_works(layer.cpu())
        assert torch.equal(layer.packed, before)


def test_a_pickle_is_read_elsewhere(device: CudaDevice) -> None:
    with device.set_aside():
        stream = io.BytesIO()
        torch.save(a_layer(), stream)
        stream.seek(0)
    layer = torch.load(stream, weights_only=False, map_location=device.torch)
    assert_works(layer, device)
    stored = pickle.dumps(layer.to(device.torch))
    with device.set_aside():
        assert_works(pickle.loads(stored).cpu())


def test_a_layer_through_meta() -> None:
    layer = a_layer()
    state = layer.state_dict()
    layer.to("meta")
    assert layer(torch.empty(2, 160, device="meta")).shape == (2, 64)
    empty = layer.to_empty(device="cpu")
    empty.load_state_dict(state)
    assert_works(empty)


def test_a_buffer_that_was_moved_alone_is_refused() -> None:
    """As tools do that place tensors one by one: the bytes would mean another weight."""
    layer = a_layer()
    layer._layout = "cuda"
    for use in (
        lambda: layer(torch.ones(1, 160)),
        layer.canonical,
        layer.dequantize,
        layer.state_dict,
        lambda: copy.deepcopy(layer),
    ):
        with pytest.raises(lbc.Error, match="the layout of cpu, got that of cuda: move the layer"):
            use()


# ---- many rows ----


def as_a_gpu(device: CudaDevice, patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    if device.emulated is not None:
        patch.setattr(dispatch, "capability", lambda device: capability)


def no_kernel(*args: Any) -> None:
    raise AssertionError("the fused kernel was called")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("g_idx", ["none", "permuted"])
@pytest.mark.parametrize("columns", [None, 32])
def test_dequantized_products(
    device: CudaDevice,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    g_idx: str,
    columns: int | None,
) -> None:
    """The same as the fused kernels', up to roundings of the weight; in one panel and in many."""
    as_a_gpu(device, monkeypatch, (9, 0))
    layer = a_layer(device.torch, g_idx)
    x = device.put(ref.random_activations(1, 10, 160, dtype).view(2, 5, 160)).requires_grad_()
    dy = device.put(ref.random_activations(2, 10, 64, dtype).view(2, 5, 64))
    fused = layer(x)
    fused.backward(dy)
    expected, x.grad = x.grad, None
    monkeypatch.setattr(device.core, "qgemm_nt", no_kernel, raising=False)
    with dispatch.override(0):
        if columns is None:
            monkeypatch.setattr(device.core, "qgemm_nn", no_kernel, raising=False)
        else:
            monkeypatch.setattr(dispatch, "PANEL_BYTES", columns * 160 * dtype.itemsize)
            assert len(dispatch.panels(64, 160, dtype)) == 64 // columns
        y = layer(x)
        y.backward(dy)
        assert y.dtype == x.grad.dtype == dtype and y.is_contiguous()
        for got, wanted in ((y, fused), (x.grad, expected)):
            unit = 4 * ref.UNIT_ROUNDOFF[dtype]
            torch.testing.assert_close(
                got, wanted, rtol=unit, atol=unit * float(wanted.detach().abs().max())
            )
        layout = {"bits": 3, "group_size": 64, "g_idx": layer.g_idx}
        with pytest.raises(ValueError, match=r"x: expected shape \[..., 160\], got \[2, 128\]"):
            ops.qgemm_nt(x[0, :2, :128], layer.packed, layer.scales, **layout)
        bias = device.put(torch.ones(1))
        with pytest.raises(ValueError, match=r"bias: expected shape \[64\], got \[1\]"):
            ops.qgemm_nt(x, layer.packed, layer.scales, bias=bias, **layout)


def test_exact_products_stay_fused(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    as_a_gpu(device, monkeypatch, (9, 0))
    with dispatch.override(0):
        monkeypatch.setattr(device.core, "dequantize", no_kernel, raising=False)
        assert_works(a_layer(device.torch), device)


@pytest.mark.parametrize(
    ("capability", "permuted", "wgmma", "rows"),
    [
        ((8, 0), False, True, None),
        ((8, 9), False, True, None),
        ((9, 0), False, True, 1920),
        ((9, 0), False, False, 640),
        ((10, 0), False, True, 640),
        ((12, 0), False, True, None),
        ((8, 6), True, True, 64),
        ((9, 0), True, False, 64),
        ((12, 1), True, True, 64),
        ((7, 5), False, True, None),
    ],
)
def test_the_table(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    permuted: bool,
    wgmma: bool,
    rows: int | None,
) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: capability)
    monkeypatch.setattr(dispatch._C, "cuda_has_wgmma", lambda: wgmma)

    def path(count: int, **settings: Any) -> str:
        found = {
            dispatch.path(op, count, torch.device("cuda"), permuted=permuted, **settings)
            for op in ("qgemm_nt", "qgemm_nn")
        }
        (one,) = found
        return one

    assert path(1) == path(rows or 10**9) == "fused"
    if rows is not None:
        assert path(rows + 1) == "dequantize"
        assert path(rows + 1, dtype=torch.float32) == path(rows + 1, dtype=torch.float64) == "fused"
        with dispatch.override(rows + 1):
            assert path(rows + 1) == "fused"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "3")
    dispatch._from_environment.cache_clear()
    try:
        assert (path(3), path(4)) == ("fused", "dequantize")
        with dispatch.override(4):
            assert path(4) == "fused"
        monkeypatch.setenv(dispatch.ENVIRONMENT, "few")
        dispatch._from_environment.cache_clear()
        with pytest.raises(ValueError, match="FUSED_ROWS: expected an integer of 0 .*'few'"):
            path(1)
    finally:
        dispatch._from_environment.cache_clear()


def test_the_cpu_never_dequantizes() -> None:
    with dispatch.override(0):
        assert dispatch.path("qgemm_nt", 10**6, torch.device("cpu")) == "fused"
    with pytest.raises(ValueError, match="override: rows: expected an integer of 0 or more"):
        dispatch.override(-1).__enter__()


# ---- where there is no GPU ----


class FakeGpu:
    def __init__(self, major: int, minor: int, missing: str = "") -> None:
        self.missing = missing
        self.name, self.major, self.minor = f"GPU {major}{minor}", major, minor
        self.total_memory = 8 * 10**9


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A build with CUDA and a torch that sees these GPUs."""

    def install(*devices: FakeGpu) -> None:
        monkeypatch.setattr(runtime, "cuda_status", lambda: "built; devices: some")
        monkeypatch.setattr(runtime._C, "cuda_why_not", lambda index: devices[index].missing)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: devices[i])

    return install


def test_why_there_is_no_cuda(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(FakeGpu(8, 6), FakeGpu(7, 5), FakeGpu(8, 7, "no kernel image is available"))
    assert runtime.why_no_cuda() is None
    assert runtime.resolve_device("cuda") == torch.device("cuda")
    for name, reason in (
        ("cuda:1", "got cuda:1: GPU 75: kernels need sm_80 or newer, this is sm_75"),
        ("cuda:2", "GPU 87: this build's kernels do not run on sm_87: no kernel image"),
        ("cuda:3", "got cuda:3: torch sees 3 GPUs"),
        ("mps", "expected cpu or cuda, got mps"),
        ("gpu", "expected cpu or cuda, got gpu"),
    ):
        with pytest.raises(ValueError, match=reason):
            runtime.resolve_device(name)
    gpus()
    with pytest.raises(ValueError, match="torch sees no GPU"):
        runtime.resolve_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"this torch, .*, has no CUDA"):
        runtime.resolve_device("cuda")
    monkeypatch.setattr(runtime, "cuda_status", lambda: "not built (configure)")
    with pytest.raises(ValueError, match=r"expected cpu, got cuda: CUDA is not built \(configure"):
        runtime.resolve_device("cuda")


def test_info_on_devices(gpus: Callable[..., None]) -> None:
    gpus(FakeGpu(9, 0), FakeGpu(7, 5))
    out, result = succeed("info", "--device")
    assert "cuda:0: GPU 90, sm_90, 8.0 GB, has kernels" in out
    assert "cuda:1: GPU 75, sm_75, 8.0 GB, kernels need sm_80 or newer" in out
    assert "--device cuda: yes" in out and result["why_no_cuda"] is None
    first = {"name": "GPU 90", "architecture": "sm_90", "memory": 8 * 10**9, "why_not": None}
    assert result["cuda_devices"][0] == first


@pytest.mark.parametrize("command", ["eval", "generate", "quantize", "peqa", "emef", "lrec"])
def test_a_device_that_is_not_there(
    gpus: Callable[..., None], checkpoints: Path, tmp_path: Path, command: str
) -> None:
    """Said before anything is loaded or written: there is no such model."""
    gpus()
    text, out = checkpoints / "text.txt", tmp_path / "out"
    more = {
        "eval": ["--text", text],
        "generate": ["--prompt", "a"],
        "quantize": [out, "--bits", 4],
        "lrec": [out, "--data", text, "--steps", 1, "--teacher", "none"],
    }.get(command, [out, "--data", text, "--steps", 1])
    line = fail(command, tmp_path / "none", *more, "--device", "cuda")
    assert line.startswith("error: --device: expected cpu, got cuda: torch sees no GPU")
    assert not out.exists()


def test_scratch_comes_after_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch keeps of freed memory is given back before an operation fails for lack of it."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "capture" in events)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty"))

    def kernel(tensor: torch.Tensor, message: str) -> torch.Tensor:
        events.append("kernel")
        if "empty" not in events:
            raise lbc.Error(message)
        return tensor

    run = operators._on_its_device(kernel)
    x = torch.ones(1)
    assert run(x, "workspace: CUDA: out of memory") is x
    assert events == ["kernel", "empty", "kernel"]
    for before, message in (([], "x: wrong"), (["capture"], "workspace: CUDA: out of memory")):
        events[:] = before
        with pytest.raises(lbc.Error, match=message):
            run(x, message)
        assert events == [*before, "kernel"]


def test_out_of_device_memory(monkeypatch: pytest.MonkeyPatch, checkpoints: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr("lowbitcore.model.load", full)
    line = fail("eval", checkpoints / "quantized", "--text", checkpoints / "text.txt")
    assert line == "error: CUDA out of memory. Tried to allocate 1 GiB"


def test_a_state_dict_from_elsewhere_does_not_move_a_layer() -> None:
    """As torch's own modules: values are copied to where the layer is."""
    problem = ref.random_problem(11, bits=4, group_size=32, out_features=64, in_features=96)
    layer = nn.QuantLinear(96, 64, bits=4, group_size=32)
    state = {
        "qweight": problem.qweight(),
        "qzeros": problem.qzeros(),
        "scales": problem.scales_tensor(),
        "g_idx": torch.from_numpy(problem.group).int(),
    }
    with Elsewheres():
        layer.load_state_dict({name: Elsewhere(tensor) for name, tensor in state.items()})
    assert layer.packed.device.type == "cpu"
    weight = torch.from_numpy(problem.w_hat).float()
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-6, atol=0)

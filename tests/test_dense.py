"""Dense products of 16 bits where the processor has none, held against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbitcore import dense, ops
from lowbitcore.modeling import attention, linears
from lowbitcore.nn import LoraLinear, LowRank
from test_models import make_model

HALVES = (torch.bfloat16, torch.float16)


def pretend(patch: pytest.MonkeyPatch, *, slow: bool) -> None:
    """That this processor multiplies nothing of 16 bits, or all."""
    patch.setattr(dense, "multiplies", lambda dtype: not slow or dtype not in HALVES)


def cut_small(patch: pytest.MonkeyPatch) -> None:
    """So that the matrices of tests come in many pieces."""
    patch.setattr(dense, "_PANEL_ELEMENTS", 100)
    patch.setattr(dense, "_ROWS", (5, 7))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, slow=True)


def check(found: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Sums of `terms` products in float32, rounded once to the type of `found`."""
    bound = 2 * terms * 2.0**-24 * magnitude + torch.finfo(found.dtype).eps * exact.abs()
    tiny = torch.finfo(found.dtype).smallest_normal
    assert ((found.double() - exact).abs() <= bound + tiny).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from(((16,), (40,), (3, 9), (1, 2, 8))),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    dtype=st.sampled_from(HALVES),
    biased=st.booleans(),
    across=st.booleans(),
)
def test_products_and_gradients(
    seed: int,
    batch: tuple[int, ...],
    n: int,
    k: int,
    dtype: torch.dtype,
    biased: bool,
    across: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, dy = random(*batch, k), random(*batch, n)
    weight = random(k, n).mT if across else random(n, k)
    bias = random(n) if biased else None
    inputs = [item for item in (x, weight, bias) if item is not None]
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, slow=True)
        cut_small(patch)
        for item in inputs:
            item.requires_grad_()
        y = dense.linear(x, weight, bias)
        gradients = torch.autograd.grad(y, inputs, dy)
    assert y.grad_fn is not None
    assert type(y.grad_fn).__name__ == "_InFloat32Backward"
    x64, w64, dy64 = (item.detach().double() for item in (x, weight, dy))
    plus = torch.zeros(1).double() if bias is None else bias.detach().double()
    check(y.detach(), plus + x64 @ w64.mT, plus.abs() + x64.abs() @ w64.abs().mT, k + 2)
    rows, dy_rows = x64.flatten(0, -2), dy64.flatten(0, -2)
    wanted = [
        (dy64 @ w64, dy64.abs() @ w64.abs(), n + 1),
        (dy_rows.mT @ rows, dy_rows.abs().mT @ rows.abs(), len(rows) + 1),
    ]
    if bias is not None:
        wanted.append((dy_rows.sum(0), dy_rows.abs().sum(0), len(rows)))
    for gradient, (exact, size, terms) in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        check(gradient, exact, size.abs(), terms)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 33])
def test_same_values_either_way(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows, and float32, are torch's."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 64), (48, 64))
    )
    found = []
    for slow in (False, True):
        pretend(monkeypatch, slow=slow)
        weight.requires_grad_()
        found.append(dense.linear(x, weight))
    ours = type(found[1].grad_fn).__name__ == "_InFloat32Backward"
    assert ours == (rows >= 16 and dtype in HALVES)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0], found[1], rtol=4 * eps, atol=8 * eps)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("trains", ["x", "weight", "both"])
def test_what_is_kept(trains: str) -> None:
    """What gradients are made of, as it came: no float32 copies, no inputs of frozen weights."""
    saved: list[Tensor] = []
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    x.requires_grad_(trains != "weight")
    weight.requires_grad_(trains != "x")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = dense.linear(x, weight, torch.zeros(48).bfloat16())
    wanted = {"x": [weight], "weight": [x], "both": [x, weight]}[trains]
    assert [item.data_ptr() for item in saved] == [item.data_ptr() for item in wanted]
    y.float().square().sum().backward()
    assert (x.grad is None) == (trains == "weight")
    assert (weight.grad is None) == (trains == "x")


@pytest.mark.usefixtures("slow")
def test_another_default_type() -> None:
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    weight = torch.randn(48, 32).bfloat16()
    wanted = torch.ones(64, 48).bfloat16() @ weight
    torch.set_default_dtype(torch.bfloat16)
    try:
        dense.linear(x, weight).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted, rtol=0.02, atol=0.05)


@pytest.mark.usefixtures("slow")
def test_an_adapter_of_16_bits() -> None:
    """As one is that was made under another default type."""
    adapter = LowRank(64, 96, rank=4, scaling=2.0, dropout=0.0)
    nn.init.normal_(adapter.b)
    for item in (adapter.a, adapter.b):
        item.data = item.data.bfloat16()
    x, y = torch.randn(20, 64).bfloat16(), torch.randn(20, 96).bfloat16()
    wanted = y.double() + 2 * (x.double() @ adapter.a.double().mT) @ adapter.b.double().mT
    torch.testing.assert_close(adapter.add_to(y, x).double(), wanted, rtol=0.005, atol=1e-4)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("outputs", [96, 40], ids=["the core's", "torch's"])
def test_an_adapter(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of widths that are multiples of 32 it is the core's."""
    calls = []
    original = ops.add_low_rank
    monkeypatch.setattr(
        ops, "add_low_rank", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(64, outputs).bfloat16()
    linears.use_own_linears(nn.ModuleList([base]))
    linear = LoraLinear(base)
    adapter = LowRank(64, outputs, rank=8, scaling=2.0, dropout=0.0)
    nn.init.normal_(adapter.b, generator=generator)
    linear.adapters.append(adapter)
    x = torch.randn(2, 20, 64, generator=generator).bfloat16()
    y = linear(x)
    y.float().sum().backward()
    a, b = adapter.a.detach().double(), adapter.b.detach().double()
    exact = base(x).double() + 2 * (x.double() @ a.mT) @ b.mT
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.05)
    assert adapter.a.grad is not None
    assert adapter.b.grad is not None
    db = 2 * (x.double() @ a.mT).flatten(0, 1).sum(0).expand(outputs, 8)
    torch.testing.assert_close(adapter.b.grad.double(), db, rtol=0.02, atol=0.1)
    assert len(calls) == (outputs % 32 == 0)


@pytest.mark.parametrize("family", ["llama", "qwen3-sliding", "opt"])
def test_a_model_trains_to_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linears, its attention and its head, forward and backward: no further from float32 than
    twice as far as torch is."""
    cut_small(monkeypatch)
    # As on levels without attention of their own.
    monkeypatch.setattr(attention, "_is_ours", lambda *tensors: False)
    ids = torch.randint(0, 32, (2, 24), generator=torch.Generator().manual_seed(1))

    def gradients(dtype: torch.dtype, *, slow: bool) -> dict[str, Tensor]:
        pretend(monkeypatch, slow=slow)
        model = make_model(family, dtype=torch.bfloat16).to(dtype)
        if slow:
            attention.use_own_attention(model)
            linears.use_own_linears(model)
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {name: item.grad for name, item in model.named_parameters()}
        return {name: grad.double() for name, grad in grads.items() if grad is not None}

    exact = gradients(torch.float32, slow=False)
    plain, ours = (gradients(torch.bfloat16, slow=slow) for slow in (False, True))
    assert exact.keys() == plain.keys() == ours.keys()
    largest = max(grad.norm() for grad in exact.values())
    for name, grad in exact.items():
        error, of_torch = ((found[name] - grad).norm() for found in (ours, plain))
        assert error <= 2 * of_torch + 1e-3 * largest, name


@pytest.mark.usefixtures("slow")
def test_torch_has_it_where_it_is_watched() -> None:
    layer = linears.Linear(32, 48).bfloat16()
    x = torch.randn(20, 32).bfloat16()

    def is_ours(y: Tensor) -> bool:
        return type(y.grad_fn).__name__ == "_InFloat32Backward"

    assert is_ours(layer(input=x))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_ours(layer(x))
    assert torch.func.vmap(layer)(x[None]).shape == (1, 20, 48)
    assert torch.func.jacrev(layer)(x[:16]).shape == (16, 48, 16, 32)
    assert dense.linear(x, torch.empty(0, 32).bfloat16()).shape == (20, 0)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0.02, atol=0.02)
    with pytest.warns(DeprecationWarning, match="jit.trace"):
        traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x), rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("slow")
def test_a_second_derivative_is_an_error() -> None:
    x = torch.randn(20, 32).bfloat16().requires_grad_()
    y = dense.linear(x, torch.randn(48, 32).bfloat16())
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()

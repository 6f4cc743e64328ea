"""Dense products of 16 bits where the processor has none, held against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.library import opcheck

import reference as ref
from lowbitcore import dense, ops
from lowbitcore.modeling import attention, linears
from lowbitcore.nn import LoraLinear, LowRank
from test_models import make_model

HALVES = (torch.bfloat16, torch.float16)


def pretend(patch: pytest.MonkeyPatch, *, slow: bool) -> None:
    """That this processor multiplies nothing of 16 bits, or all."""
    patch.setattr(dense, "multiplies", lambda dtype: not slow or dtype not in HALVES)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, slow=True)


def check(found: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Sums of `terms` products in float32, rounded once to the type of `found`."""
    assert found.shape == exact.shape
    bound = 2 * terms * 2.0**-24 * magnitude + torch.finfo(found.dtype).eps * exact.abs()
    tiny = torch.finfo(found.dtype).smallest_normal
    assert ((found.double() - exact).abs() <= bound + tiny).all()


# Outputs: panels and slices of a reduction, whole ones and not.
outputs = st.sampled_from([1, 3, 31, 32, 33, 64, 95, 500, 512, 513, 1100])
inputs = st.sampled_from([32, 64, 96, 160, 320])
batches = st.sampled_from([(0,), (1,), (2,), (3,), (8,), (9,), (3, 9), (1, 2, 17), (40,), (481,)])


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@given(seed=ref.seeds, batch=batches, n=outputs, k=inputs, biased=st.booleans())
# Blocks of rows, slices, and rests of both; a panel's rest; the most rows that take no panels.
@example(seed=1, batch=(481,), n=1100, k=160, biased=True)
@example(seed=2, batch=(9,), n=513, k=32, biased=False)
@example(seed=3, batch=(8,), n=33, k=64, biased=True)
def test_products_and_gradients(
    isa: str,
    dtype: torch.dtype,
    seed: int,
    batch: tuple[int, ...],
    n: int,
    k: int,
    biased: bool,
) -> None:
    """Forward, backward, and derivatives of the backward."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x, weight, dy, ddx = random(*batch, k), random(n, k), random(*batch, n), random(*batch, k)
    bias = random(n) if biased else None
    wanted = [x, weight, *([] if bias is None else [bias])]
    y = ops.gemm_nt(x, weight, bias)
    dx, *others = torch.autograd.grad(y, wanted, dy, create_graph=True)
    added = random(k)
    ddy, dw_again = torch.autograd.grad(dx, (dy, weight), ddx)

    x64, w64, dy64, ddx64 = (item.detach().double() for item in (x, weight, dy, ddx))
    b64 = torch.zeros(n).double() if bias is None else bias.detach().double()

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return left.reshape(-1, n).mT @ right.reshape(-1, k)

    rows = max(1, x64[..., 0].numel())
    check(y.detach(), x64 @ w64.mT + b64, x64.abs() @ w64.mT.abs() + b64.abs(), k + 2)
    check(dx.detach(), dy64 @ w64, dy64.abs() @ w64.abs(), n + 1)
    check(others[0].detach(), outer(dy64, x64), outer(dy64.abs(), x64.abs()), rows)
    check(ddy, ddx64 @ w64.mT, ddx64.abs() @ w64.mT.abs(), k + 1)
    check(dw_again, outer(dy64, ddx64), outer(dy64.abs(), ddx64.abs()), rows)
    plus = added.detach().double()
    found = ops.gemm_nn(dy, weight, added)
    check(found.detach(), dy64 @ w64 + plus, dy64.abs() @ w64.abs() + plus.abs(), n + 2)
    (d_added,) = torch.autograd.grad(found, added, ddx)
    check(d_added, ddx64.reshape(-1, k).sum(0), ddx64.reshape(-1, k).abs().sum(0), rows)
    if bias is not None:
        summed = dy64.reshape(-1, n)
        check(others[1].detach(), summed.sum(0), summed.abs().sum(0), rows)


@pytest.mark.parametrize("count", [1, 7, 200])
def test_results_do_not_depend_on_threads(isa: str, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    x, weight, dy = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((count, 128), (1611, 128), (count, 1611))
    )
    found = []
    for threads in (1, 2, 5):
        with ref.threads(threads):
            found.append((ops.gemm_nt(x, weight), ops.gemm_nn(dy, weight)))
    for again in found[1:]:
        assert all(map(torch.equal, again, found[0]))


def test_any_layout(isa: str) -> None:
    """Rows apart, weights that lie across, gradients that are one number everywhere."""
    apart = torch.full((40, 80), torch.nan).bfloat16()
    apart[:, :64] = torch.randn(40, 64)
    weight = torch.randn(64, 33).bfloat16().mT
    found = ops.gemm_nt(apart[:, :64], weight)
    assert torch.equal(found, ops.gemm_nt(apart[:, :64].contiguous(), weight.contiguous()))
    same = torch.ones(1, 1).bfloat16().expand(40, 33)
    assert torch.equal(ops.gemm_nn(same, weight), ops.gemm_nn(same.contiguous(), weight))


def test_nan_and_inf_stay_where_they_are(isa: str) -> None:
    for rows in (2, 40):
        x, weight = torch.ones(rows, 64).bfloat16(), torch.ones(70, 64).bfloat16()
        x[1, 63], weight[69, 0] = torch.nan, torch.inf
        y, dx = ops.gemm_nt(x, weight), ops.gemm_nn(torch.ones(rows, 70).bfloat16(), weight)
        assert y[1].isnan().all() and not y[0].isnan().any() and dx[:, 0].isinf().all()
        assert y[0, 69].isinf() and y[0, :69].isfinite().all() and dx[:, 1:].isfinite().all()


def test_opcheck(isa: str) -> None:
    lib = torch.ops.lowbitcore
    x, weight, bias, dy = (
        torch.randn(*shape).bfloat16().requires_grad_()
        for shape in ((6, 64), (33, 64), (33,), (6, 33))
    )
    opcheck(lib.gemm_nt.default, (x, weight, bias))
    opcheck(lib.gemm_nt.default, (x, weight, None))
    opcheck(lib.gemm_nn.default, (dy, weight, None))


def test_caller_errors(isa: str) -> None:
    x, weight, dy = torch.ones(6, 64), torch.ones(33, 64), torch.ones(6, 33)
    wrong = {
        "x: expected a positive multiple of 32 columns, .* got 48": (x[:, :48], weight[:, :48]),
        r"x: expected shape \[..., 64\], got \[6, 32\]": (x[:, :32], weight),
        r"weight: expected the type of x \(float32\), got bfloat16": (x, weight.bfloat16()),
        r"weight: expected 2 dimensions, got \(64,\)": (x, weight[0]),
        r"bias: expected shape \[33\], got \[32\]": (x, weight, torch.ones(32)),
        "weight: expected at least 1 row, got 0": (x, weight[:0]),
        r"x: expected at least 1 dimension, got \(\)": (x[0, 0], weight),
        "x: expected float32, bfloat16 or float16": (x.double(), weight.double()),
        "weight: expected a tensor on cpu, as the other": (x, weight.to("meta")),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=f"gemm_nt: {message}"):
            ops.gemm_nt(*arguments)
    with pytest.raises(ValueError, match=r"gemm_nn: x: expected shape \[..., 33\], got \[6, 32\]"):
        ops.gemm_nn(dy[:, :32], weight)
    with pytest.raises(ValueError, match=r"gemm_nn: bias: expected shape \[64\], got \[33\]"):
        ops.gemm_nn(dy, weight, torch.ones(33))


def is_ours(y: Tensor) -> bool:
    return "gemm_n" in type(y.grad_fn).__name__


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("k", [64, 48])
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("across", [False, True], ids=["along", "across"])
def test_same_values_either_way(
    across: bool, rows: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 is torch's, and so, in float32, are widths that the core does not take."""
    generator = torch.Generator().manual_seed(rows)
    width = 48 if across else k
    x, weight, bias, dy = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, width), (48, k), (48 + k - width,), (rows, 48 + k - width))
    )
    layer = linears._Conv1D(48 + k - width, width) if across else linears.Linear(width, 48)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    found = []
    for slow in (False, True):
        pretend(monkeypatch, slow=slow)
        y = layer(x.requires_grad_())
        found.append([y, *torch.autograd.grad(y, (x, layer.weight), dy, retain_graph=True)])
    assert is_ours(found[1][0]) == (k == 64 and dtype in HALVES)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0], found[1], rtol=8 * eps, atol=32 * eps)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("shape", [(0, 5), (64, 0), (64, 5)], ids=str)
def test_what_is_empty(shape: tuple[int, int]) -> None:
    layer = linears.Linear(*shape).bfloat16()
    for rows in (0, 3):
        x = torch.ones(rows, shape[0]).bfloat16().requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.shape == (rows, shape[1])
        assert x.grad is not None
        assert layer.weight.grad is not None
        assert layer.weight.grad.shape == layer.weight.shape


class _Noted(Tensor):
    """A subclass with a linear of its own, as other quantizers have it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return "its own"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.usefixtures("slow")
def test_other_tensors_are_torchs() -> None:
    x, weight = torch.ones(20, 64).bfloat16(), torch.ones(32, 64).bfloat16()
    assert dense.linear(x, weight.as_subclass(_Noted)) == "its own"
    sparse = dense.linear(x, weight.to_sparse())
    assert torch.equal(sparse, dense.linear(x, weight))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(dense.linear(forward_ad.make_dual(x, x), weight)).tangent
        assert tangent is not None
        assert torch.equal(tangent, dense.linear(x, weight))
        with pytest.raises(ValueError, match="gemm_nt: x: expected no tangent"):
            ops.gemm_nt(forward_ad.make_dual(x, x), weight)


@pytest.mark.usefixtures("slow")
def test_linears_of_a_model_are_ours() -> None:
    for family in ("llama", "gpt2"):
        model = make_model(family, dtype=torch.bfloat16)
        linears.use_own_linears(model)
        linears.use_own_head(model)
        blocks = model.get_decoder()
        found = [m for m in blocks.modules() if type(m) in (linears.Linear, linears._Conv1D)]
        assert len(found) == {"llama": 14, "gpt2": 8}[family]
        for module in [*found, model.get_output_embeddings()]:
            columns = module.weight.shape[isinstance(module, linears.Linear)]
            for rows in (1, 20):
                assert is_ours(module(torch.ones(rows, columns).bfloat16()))


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


@pytest.mark.parametrize("family", ["llama", "qwen3-sliding", "opt", "gpt2"])
def test_a_model_trains_to_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linears, its attention and its head, forward and backward: no further from float32 than
    twice as far as torch is."""
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

    assert is_ours(layer(input=x))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_ours(layer(x))
    graph = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(graph(x), layer(x), rtol=0.008, atol=0.004)
    assert torch.func.vmap(layer)(x[None]).shape == (1, 20, 48)
    assert torch.func.jacrev(layer)(x[:16]).shape == (16, 48, 16, 32)
    assert dense.linear(x, torch.empty(0, 32).bfloat16()).shape == (20, 0)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0.008, atol=0.004)
    with pytest.warns(DeprecationWarning, match="jit.trace"):
        traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x), rtol=0.008, atol=0.004)

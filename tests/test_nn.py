"""QuantLinear as a well-behaved nn.Module."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import reference as ref
from lowbitcore.nn import QuantLinear

KEYS = {"qweight", "qzeros", "scales", "g_idx"}


def a_problem(*, bits: int = 4, g_idx: str = "none", seed: int = 0) -> ref.Problem:
    return ref.random_problem(
        seed, bits=bits, group_size=64, out_features=96, in_features=160, g_idx=g_idx
    )


def a_bias(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ref.random_activations(99, 1, 96, dtype)[0]


def layer_of(problem: ref.Problem, bias: torch.Tensor | None = None) -> QuantLinear:
    return QuantLinear.from_canonical(
        problem.qweight(),
        problem.qzeros(),
        problem.scales_tensor(),
        bits=problem.bits,
        group_size=problem.group_size,
        g_idx=problem.g_idx_tensor(),
        bias=bias,
    )


def an_input(rows: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ref.random_activations(1, rows, 160, dtype)


def assert_same_layer(one: QuantLinear, two: QuantLinear) -> None:
    left, right = one.state_dict(), two.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert torch.equal(one(an_input()), two(an_input()))


# ----------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
@pytest.mark.parametrize("g_idx", ref.G_IDX_KINDS)
@pytest.mark.parametrize("bits", ref.BITS)
def test_forward(bits: int, g_idx: str, dtype: torch.dtype) -> None:
    problem = a_problem(bits=bits, g_idx=g_idx)
    for bias in (None, a_bias(dtype)):
        layer = layer_of(problem, bias)
        for rows in (0, 1, 9):
            x = an_input(rows, dtype)
            with torch.no_grad():
                y = layer(x)
            assert y.dtype == dtype
            assert not y.requires_grad
            ref.assert_close(y, *ref.expect_nt(x, problem.w_hat, bias))
    assert layer(an_input(12, dtype).view(3, 4, 160)).shape == (3, 4, 96)


def test_attributes() -> None:
    problem = a_problem(g_idx="permuted")
    layer = layer_of(problem, a_bias())
    assert (layer.in_features, layer.out_features, layer.bits, layer.group_size) == (160, 96, 4, 64)
    assert dict(layer.named_parameters()).keys() == {"scales", "bias"}
    assert dict(layer.named_buffers()).keys() == {"packed", "g_idx", "order", "inverse"}
    assert isinstance(layer.scales, nn.Parameter)
    assert layer.scales.dtype == torch.float32
    assert not layer.scales.requires_grad
    assert layer.g_idx.dtype == torch.int32
    for part in ("160", "96", "bits=4", "group_size=64"):
        assert part in repr(layer)


@pytest.mark.parametrize("name", ["scales", "bias"])
def test_a_parameter_may_be_replaced(name: str) -> None:
    """As parametrizations, pruning and FSDP do it."""
    layer = layer_of(a_problem(), a_bias())
    expected = layer(an_input())
    torch.nn.utils.parametrize.register_parametrization(layer, name, nn.Identity())
    assert torch.equal(layer(an_input()), expected)


def test_groups_of_whole_size_are_packed_one_after_another() -> None:
    """What act-order leaves: kernels see a trivial weight, and nobody else does."""
    problem = a_problem(g_idx="permuted")
    layer = layer_of(problem)
    assert layer.order is not None and layer_of(a_problem(g_idx="ragged")).order is None
    x = torch.randn(2, 3, 160).requires_grad_()
    dy = torch.randn(2, 3, 96)
    layer.scales.requires_grad_()
    layer(x).backward(dy)
    weight = torch.from_numpy(problem.w_hat).float()
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, dy @ weight, rtol=1e-4, atol=1e-4)
    expected, bound = ref.expect_grad_scales(dy.view(-1, 96), x.detach().view(-1, 160), problem)
    ref.assert_close(layer.scales.grad, expected, bound)
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-6, atol=0)
    with torch.no_grad():
        plain = layer(x)
    assert torch.equal(plain, layer(x))


def test_a_trivial_g_idx_is_dropped() -> None:
    assert layer_of(a_problem(g_idx="trivial")).g_idx is None
    assert layer_of(a_problem(g_idx="permuted")).g_idx is not None


@pytest.mark.parametrize("g_idx", ref.G_IDX_KINDS)
@pytest.mark.parametrize("bits", ref.BITS)
def test_canonical_is_bit_exact(bits: int, g_idx: str) -> None:
    problem = a_problem(bits=bits, g_idx=g_idx)
    found = layer_of(problem, a_bias()).canonical()
    assert found.keys() == KEYS | {"bias"}
    assert torch.equal(found["qweight"], problem.qweight())
    assert torch.equal(found["qzeros"], problem.qzeros())
    assert torch.equal(found["scales"], problem.scales_tensor())
    assert torch.equal(found["g_idx"], torch.from_numpy(problem.group).int())
    assert found["g_idx"].dtype == torch.int32
    assert torch.equal(found["bias"], a_bias())
    assert layer_of(problem).canonical().keys() == KEYS


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_dequantize(dtype: torch.dtype) -> None:
    problem = a_problem(g_idx="ragged")
    got = layer_of(problem).dequantize(dtype)
    assert torch.equal(got, torch.from_numpy(problem.w_hat).float().to(dtype))


def test_a_new_layer_is_zero() -> None:
    layer = QuantLinear(160, 96, bits=3, group_size=64, bias=True)
    assert not layer(an_input()).any()
    assert not QuantLinear(160, 96, bits=3, group_size=-1)(an_input()).any()


# --------------------------------------------------------------------------------------- state_dict


@pytest.mark.parametrize("g_idx", ref.G_IDX_KINDS)
@pytest.mark.parametrize("bits", ref.BITS)
def test_state_dict_round_trip(bits: int, g_idx: str) -> None:
    layer = layer_of(a_problem(bits=bits, g_idx=g_idx), a_bias())
    state = layer.state_dict()
    assert state.keys() == KEYS | {"bias"}
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    fresh = QuantLinear(160, 96, bits=bits, group_size=64, bias=True)
    result = fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_layer(fresh, layer)
    assert (fresh.g_idx is None) == (g_idx in ("none", "trivial"))


def test_state_dict_inside_a_model() -> None:
    """Prefixes, and layers beside it."""
    model = nn.ModuleDict(
        {"a": nn.Sequential(layer_of(a_problem()), nn.LayerNorm(96)), "b": nn.Linear(4, 4)}
    )
    state = model.state_dict()
    assert {key for key in state if key.startswith("a.0.")} == {f"a.0.{key}" for key in KEYS}
    other = nn.ModuleDict(
        {
            "a": nn.Sequential(QuantLinear(160, 96, bits=4, group_size=64), nn.LayerNorm(96)),
            "b": nn.Linear(4, 4),
        }
    )
    other.load_state_dict(state)
    assert torch.equal(other["a"](an_input()), model["a"](an_input()))


def test_loading_replaces_what_was_there() -> None:
    """A permuted g_idx arrives in a layer without one, and leaves it again."""
    layer = layer_of(a_problem())
    permuted, plain = layer_of(a_problem(g_idx="permuted", seed=3)), layer_of(a_problem(seed=4))
    layer.load_state_dict(permuted.state_dict())
    assert_same_layer(layer, permuted)
    layer.load_state_dict(plain.state_dict())
    assert layer.g_idx is None
    assert_same_layer(layer, plain)


def test_fp16_scales_of_a_file_become_fp32() -> None:
    problem = a_problem()
    state = layer_of(problem).state_dict()
    state["scales"] = state["scales"].half()
    layer = QuantLinear(160, 96, bits=4, group_size=64)
    layer.load_state_dict(state)
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.scales, problem.scales_tensor().half().float())


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_missing_key_is_reported(key: str) -> None:
    state = layer_of(a_problem()).state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{key}"):
        QuantLinear(160, 96, bits=4, group_size=64).load_state_dict(state)


def test_keys_and_shapes_that_do_not_fit_are_reported() -> None:
    state = layer_of(a_problem(), a_bias()).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        QuantLinear(160, 96, bits=4, group_size=64).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"qweight"):
        QuantLinear(160, 96, bits=3, group_size=64, bias=True).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"scales|qzeros"):
        QuantLinear(160, 96, bits=4, group_size=32, bias=True).load_state_dict(state)
    state["g_idx"] = state["g_idx"] + 1
    with pytest.raises((RuntimeError, ValueError), match=r"g_idx"):
        QuantLinear(160, 96, bits=4, group_size=64, bias=True).load_state_dict(state)


def test_meta_layer_is_filled_from_a_state_dict() -> None:
    layer = QuantLinear(160, 96, bits=4, group_size=64, device="meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    filled = layer_of(a_problem(g_idx="permuted"))
    layer.load_state_dict(filled.state_dict(), assign=True)
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    assert_same_layer(layer, filled)


def test_copies() -> None:
    layer = layer_of(a_problem(g_idx="permuted"), a_bias())
    layer.scales.requires_grad_(True)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_layer(twin, layer)
        assert twin.scales.requires_grad
        assert twin.bits == 4
        assert twin.packed.data_ptr() != layer.packed.data_ptr()
        before = layer(an_input())
        with torch.no_grad():
            twin.scales.mul_(2)
        assert torch.equal(layer(an_input()), before)


# -------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["to", "method", "inside a model"])
def test_narrowing_a_model_keeps_scales_fp32(dtype: torch.dtype, how: str) -> None:
    """1/3 is not a 16-bit number: rounding the scales would change the weights."""
    problem = a_problem()
    layer = layer_of(problem, a_bias(dtype).float())
    with torch.no_grad():
        layer.scales.mul_(1 / 3)
    scales = layer.scales.detach().clone()
    if how == "to":
        layer = layer.to(dtype)
    elif how == "method":
        layer = layer.half() if dtype == torch.float16 else layer.bfloat16()
    else:
        model = nn.Sequential(nn.Linear(160, 160), layer).to(dtype)
        assert model[0].weight.dtype == dtype
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.scales, scales)
    assert isinstance(layer.scales, nn.Parameter)
    assert layer.packed.dtype == torch.uint8
    assert layer.bias.dtype == dtype
    x = an_input(5, dtype)
    scaled = ref.Problem(
        problem.bits, problem.group_size, problem.codes, scales.numpy(), problem.zeros, None
    )
    ref.assert_close(layer(x), *ref.expect_nt(x, scaled.w_hat, layer.bias))
    assert layer.float().scales.dtype == torch.float32


def test_bias_and_input_may_differ_in_dtype() -> None:
    """A bf16 bias on fp32 activations, or the other way: the result follows x."""
    problem = a_problem()
    layer = layer_of(problem, a_bias(torch.bfloat16))
    for dtype in ref.DTYPES:
        x = an_input(3, dtype)
        ref.assert_close(layer(x), *ref.expect_nt(x, problem.w_hat, layer.bias))


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_to_bf16(bias: bool) -> None:
    """As nn.Linear behaves: fp32 in, bf16 arithmetic, bf16 out; gradients return in fp32."""
    problem = a_problem()
    layer = layer_of(problem, a_bias() if bias else None)
    layer.scales.requires_grad_(True)
    x = an_input().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        plain = nn.functional.linear(x, torch.from_numpy(problem.w_hat).float())
    assert y.dtype == plain.dtype == torch.bfloat16
    rounded_bias = layer.bias.detach().bfloat16() if bias else None
    ref.assert_close(
        y, *loosened(ref.expect_nt(x.detach().bfloat16(), problem.w_hat, rounded_bias), layer.bias)
    )
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert x.grad.isfinite().all()
    assert layer.scales.grad.dtype == torch.float32
    assert layer.scales.grad.isfinite().all()


def loosened(pair: tuple[ref.F64, ref.F64], bias: torch.Tensor | None) -> tuple[ref.F64, ref.F64]:
    """Whether autocast narrows the bias too is left open: one bf16 rounding of it."""
    expected, tolerance = pair
    return expected, tolerance + (0 if bias is None else 2.0**-8 * abs(ref.as_float64(bias)))


# ----------------------------------------------------------------------------------------- autograd


def gradients(layer: QuantLinear, run, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, and the gradients of x and of every parameter of a weighted sum of it."""
    x = x.clone().requires_grad_(True)
    layer.zero_grad()
    y = run(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y * weights).sum().backward()
    return y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())


def trainable_layer(bias: bool = True) -> QuantLinear:
    problem = a_problem(g_idx="permuted")
    return layer_of(problem, a_bias() if bias else None).requires_grad_(True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    layer = trainable_layer()
    plain = gradients(layer, layer, an_input())
    again = gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant), an_input())
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_frozen_layer_still_passes_gradients_to_its_input() -> None:
    problem = a_problem()
    layer = layer_of(problem)
    x = an_input().requires_grad_(True)
    layer(x).sum().backward()
    ref.assert_close(x.grad, *ref.expect_nn(torch.ones(6, 96), problem.w_hat))
    assert layer.scales.grad is None


def test_nothing_is_recorded_without_need() -> None:
    layer = layer_of(a_problem())
    assert layer(an_input()).grad_fn is None
    with torch.no_grad():
        assert trainable_layer()(an_input()).grad_fn is None
    with torch.inference_mode():
        assert layer(an_input()).shape == (6, 96)


def test_scales_train() -> None:
    """A few steps towards another layer's output bring the loss down."""
    layer, teacher = layer_of(a_problem()), layer_of(a_problem())
    with torch.no_grad():
        teacher.scales.mul_(
            1 + 0.2 * torch.randn(teacher.scales.shape, generator=torch.Generator().manual_seed(0))
        )
    layer.scales.requires_grad_(True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4)
    x = an_input(64)
    losses = []
    for _ in range(30):
        loss = (layer(x) - teacher(x)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


# ------------------------------------------------------------------------------------------ compile


@pytest.mark.parametrize(
    ("backend", "bias"),
    [
        ("aot_eager", True),
        ("inductor", False),
        pytest.param("inductor", True, marks=pytest.mark.full),  # waits for a C++ compiler
    ],
)
def test_compile_fullgraph(backend: str, bias: bool) -> None:
    """One graph forward and backward, with the same bits as the eager layer."""
    torch.compiler.reset()
    layer = trainable_layer(bias=bias)
    eager = gradients(layer, layer, an_input())
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found = gradients(layer, compiled, an_input())
    for one, two in zip(eager, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(an_input()), layer(an_input()))


def test_compile_with_changing_rows() -> None:
    torch.compiler.reset()
    layer = layer_of(a_problem(), a_bias())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 7, 1, 0):
        assert torch.equal(compiled(an_input(rows)), layer(an_input(rows)))


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"bits": 5}, ("bits", "5")),
        ({"group_size": 48}, ("group_size", "48")),
        ({"group_size": 0}, ("group_size", "0")),
        ({"in_features": 100}, ("in_features", "32", "100")),
        ({"out_features": 33}, ("out_features", "32", "33")),
        ({"in_features": 0}, ("in_features", "0")),
    ],
)
def test_a_layer_that_cannot_be(change: dict[str, int], parts: tuple[str, ...]) -> None:
    wanted = {"in_features": 160, "out_features": 96, "bits": 4, "group_size": 64} | change
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - looked at below
        QuantLinear(wanted.pop("in_features"), wanted.pop("out_features"), **wanted)
    message = str(raised.value)
    assert "\n" not in message
    for part in ("QuantLinear", *parts):
        assert part in message


def test_tensors_that_do_not_fit_are_named() -> None:
    problem = a_problem()
    good = {
        "qweight": problem.qweight(),
        "qzeros": problem.qzeros(),
        "scales": problem.scales_tensor(),
    }
    for name, bad in (
        ("qzeros", good["qzeros"][:2]),
        ("scales", good["scales"][:, :64]),
        ("scales", good["scales"].long()),
        ("qweight", good["qweight"].long()),
    ):
        with pytest.raises(ValueError, match=name):
            QuantLinear.from_canonical(**(good | {name: bad}), bits=4, group_size=64)
    with pytest.raises(ValueError, match=r"g_idx.*7"):
        QuantLinear.from_canonical(
            **good, bits=4, group_size=64, g_idx=torch.full((160,), 7, dtype=torch.int32)
        )
    with pytest.raises(ValueError, match=r"bias.*96.*95"):
        QuantLinear.from_canonical(**good, bits=4, group_size=64, bias=torch.zeros(95))


@pytest.mark.parametrize("columns", [159, 128, 192])
def test_an_input_that_does_not_fit_is_named(columns: int) -> None:
    """The commonest mistake of all: the message has to speak of x, not of packed bytes."""
    layer = layer_of(a_problem())
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=rf"x.*160.*{columns}"):
            layer(torch.zeros(2, columns))


@pytest.mark.parametrize("grad", [True, False])
def test_a_bias_that_is_elsewhere_is_named(grad: bool) -> None:
    layer = layer_of(a_problem())
    layer.bias = torch.nn.Parameter(torch.zeros(96, device="meta"), requires_grad=False)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="bias: expected a tensor"):
        layer(torch.zeros(2, 160))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([0.0] * 160, "x: expected a tensor, got list"),
        (torch.zeros(160).to_sparse(), "x: expected a dense tensor"),
        (torch.tensor(1.0), "x: expected at least 1 dimension"),
        (torch.zeros(2, 160, dtype=torch.int64), "x: expected float32, bfloat16 or float16"),
        (torch.zeros(2, 160, dtype=torch.float64), "x: expected float32, bfloat16 or float16"),
    ],
)
def test_what_is_no_input_is_named(x: Any, message: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        layer_of(a_problem())(x)


def test_refused_tensors_leave_the_layer_as_it_was() -> None:
    layer = layer_of(a_problem())
    x = an_input()
    before, state = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    transposed = state["qweight"].T.contiguous()
    with pytest.raises(ValueError, match="qweight: expected shape"):
        layer.set_canonical(transposed, state["qzeros"], state["scales"])
    with pytest.raises(ValueError, match="scales: expected finite values"):
        layer.set_canonical(state["qweight"], state["qzeros"], state["scales"] * float("nan"))
    with pytest.raises(RuntimeError, match="scales: expected shape"):
        layer.load_state_dict({**state, "scales": state["scales"][:1]})
    assert torch.equal(layer(x), before)


def test_parts_of_a_state_dict_load() -> None:
    layer = layer_of(a_problem())
    y = layer(an_input())
    doubled = {"scales": layer.scales.detach() * 2}
    result = layer.load_state_dict(doubled, strict=False)
    assert set(result.missing_keys) == {"qweight", "qzeros", "g_idx"}
    assert torch.equal(layer(an_input()), 2 * y)
    with pytest.raises(RuntimeError, match="expected qweight and qzeros together"):
        layer.load_state_dict({"qweight": layer.canonical()["qweight"]}, strict=False)


def test_loading_keeps_the_parameters() -> None:
    """An optimizer that was made before goes on training after."""
    layer = trainable_layer()
    scales, bias = layer.scales, layer.bias
    layer.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()})
    assert layer.scales is scales and layer.bias is bias
    assert scales.requires_grad and bias is not None and bias.requires_grad


def test_g_idx_wants_integers_in_range() -> None:
    layer = layer_of(a_problem())
    tensors = layer.canonical()
    g_idx = tensors["g_idx"]
    with pytest.raises(ValueError, match="g_idx: expected integers"):
        layer.set_canonical(**{**tensors, "g_idx": g_idx + 0.5})
    with pytest.raises(ValueError, match="g_idx: expected entries from 0"):
        layer.set_canonical(**{**tensors, "g_idx": g_idx.long() + 2**32})


def test_forward_on_the_meta_device() -> None:
    layer = QuantLinear(64, 32, bits=3, group_size=32, device="meta")
    assert layer(torch.empty(2, 64, device="meta")).shape == (2, 32)

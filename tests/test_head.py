"""The head of a model that is loaded here: one row takes another way than several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from lowbitcore import dense
from lowbitcore.modeling import use_own_operations
from test_models import make_model


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what torch.mv was called with."""
    seen: list[torch.Size] = []
    own = torch.mv

    def mv(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(weight.shape)
        return own(weight, x)

    monkeypatch.setattr(torch, "mv", mv)
    return seen


def head_of(dtype: torch.dtype) -> Any:
    model = make_model("llama", dtype=dtype)
    use_own_operations(model)
    return model.lm_head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (2, 3), (0,), (1, 0)])
def test_logits(dtype: torch.dtype, shape: tuple[int, ...], products: list[torch.Size]) -> None:
    head = head_of(dtype)
    x = torch.randn(*shape, head.in_features, dtype=dtype)
    with torch.no_grad():
        logits = head(x)
    exact = linear(x.double(), head.weight.detach().double())
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    one_row = x.numel() == head.in_features and dtype != torch.float16
    # Where it is slow, the core's product takes one row like any.
    assert products == [head.weight.shape] * (one_row and dense.multiplies(dtype))


@pytest.mark.parametrize("slow", [False, True])
def test_one_row_of_bfloat16(
    slow: bool, products: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "multiplies", lambda dtype: not slow)
    head = head_of(torch.bfloat16)
    with torch.no_grad():
        head(torch.ones(1, 1, head.in_features, dtype=torch.bfloat16))
    assert len(products) == (not slow)


def test_torch_has_it_where_it_is_watched(products: list[torch.Size]) -> None:
    """Gradients, autocast and torch.func ask for torch's own."""
    head = head_of(torch.float32)
    x = torch.randn(1, head.in_features, requires_grad=True)
    head(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], head.weight.detach().sum(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.func.vmap(head)(x).shape == (1, head.out_features)
    assert not products

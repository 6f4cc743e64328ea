"""Layers that compute with packed weights, and low-rank adapters on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbitcore import dense, ops
from lowbitcore._C import Error
from lowbitcore.ops.arguments import in_memory
from lowbitcore.ops.operators import is_plain
from lowbitcore.ops.products import fused_qgemm_nt

__all__ = ["LoraLinear", "LowRank", "QuantLinear"]


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with ``W[n, k] = scales[g, n] * (q[n, k] - z[g, n])`` kept packed.

    Holds one copy of the integers, in the layout the kernels read. ``state_dict`` is canonical all
    the same: ``qweight`` int32 [K*bits/32, N], ``qzeros`` int32 [G, N*bits/32] (holding z itself),
    ``scales`` float32 [G, N], ``g_idx`` int32 [K], ``bias`` [N]. Scales stay float32 whatever
    ``.to()`` or ``.half()`` is asked for: they are the masters that PEQA trains (arXiv 2305.14152).
    They are a parameter, frozen until somebody thaws it.

    The layouts of the CPU and of CUDA differ: ``.to()``, ``.cuda()`` and ``.cpu()`` repack the
    integers, and so does a pickle where it is read. ``packed`` alone must not be moved. A CUDA
    graph may capture calls once the layer has run outside of one: the first loads its kernels.

    The result has the type of the input; under autocast, autocast's type.

    Raises:
        ValueError: bits, group_size or a dimension that the format does not have.
        lowbitcore.Error: something moved ``packed`` to another kind of device as it was.
    """

    integers: object  # another one whenever they are replaced: what was known of them holds no more
    packed: Tensor
    g_idx: Tensor | None
    order: Tensor | None
    inverse: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        layout = {
            "bits": bits,
            "group_size": group_size,
            "in_features": in_features,
            "out_features": out_features,
        }
        ops.check_format("QuantLinear", **layout)
        size = ops.packed_size(**layout)
        groups = ops.group_count(in_features, group_size)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        # Zeros mean the same in every layout.
        self.register_buffer("packed", torch.zeros(size, dtype=torch.uint8, device=device))
        self._layout = self.packed.device.type
        self.integers = object()
        self.register_buffer("g_idx", None)
        self.register_buffer("order", None)
        self.register_buffer("inverse", None)
        self.scales = nn.Parameter(
            torch.zeros(groups, out_features, dtype=torch.float32, device=device),
            requires_grad=False,
        )
        self.register_parameter(
            "bias",
            nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False)
            if bias
            else None,
        )

    @classmethod
    def from_canonical(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        *,
        bits: int,
        group_size: int,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> QuantLinear:
        """A layer from GPTQ's tensors, with "gptq_v2" zeros; see the class for shapes."""
        shape = tuple(getattr(qweight, "shape", ()))
        if bits not in (2, 3, 4, 8) or len(shape) != 2 or shape[0] % bits != 0:
            raise ValueError(
                "QuantLinear.from_canonical: qweight: expected [in_features*bits/32, out_features] "
                f"with bits 2, 3, 4 or 8, got {shape} with bits {bits}"
            )
        layer = cls(
            qweight.shape[0] * 32 // bits,
            qweight.shape[1],
            bits=bits,
            group_size=group_size,
            bias=bias is not None,
            device="meta",
        )
        layer.set_canonical(qweight, qzeros, scales, g_idx, bias)
        return layer

    def set_canonical(
        self,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Replace everything the layer holds, or on bad input nothing. A trivial ``g_idx`` is
        dropped."""
        self._check(qweight=qweight, qzeros=qzeros, scales=scales, bias=bias)
        if g_idx is not None:
            g_idx = self._nontrivial(g_idx)
        self._hold(qweight, qzeros, g_idx)
        self.integers = object()
        trains = self.scales.requires_grad
        self.scales = nn.Parameter(scales.detach().float().clone(), requires_grad=trains)
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        )

    def _check(self, **tensors: Tensor | None) -> None:
        """ValueError unless each tensor has the shape and kind that this layer's format wants."""
        groups = ops.group_count(self.in_features, self.group_size)
        shapes = {
            "qweight": (self.in_features * self.bits // 32, self.out_features),
            "qzeros": (groups, self.out_features * self.bits // 32),
            "scales": (groups, self.out_features),
            "bias": (self.out_features,),
        }
        for name, tensor in tensors.items():
            if tensor is None and name == "bias":
                continue
            where = f"QuantLinear: {name}: expected"
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{where} a tensor, got {type(tensor).__name__}")
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{where} shape {shapes[name]}, got {tuple(tensor.shape)}")
            if name in ("scales", "bias"):
                if not tensor.is_floating_point():
                    raise ValueError(f"{where} floating point, got {tensor.dtype}")
                if not tensor.is_meta and not torch.isfinite(tensor).all():
                    raise ValueError(f"{where} finite values, got NaN or Inf")
            elif tensor.dtype != torch.int32:
                raise ValueError(f"{where} torch.int32, got {tensor.dtype}")

    def _nontrivial(self, g_idx: Tensor) -> Tensor | None:
        groups = ops.group_count(self.in_features, self.group_size)
        if tuple(g_idx.shape) != (self.in_features,):
            raise ValueError(
                f"QuantLinear: g_idx: expected shape {(self.in_features,)}, "
                f"got {tuple(g_idx.shape)}"
            )
        if g_idx.is_floating_point() or g_idx.is_complex():
            raise ValueError(f"QuantLinear: g_idx: expected integers, got {g_idx.dtype}")
        if g_idx.is_meta:
            return g_idx.to(torch.int32)
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= groups:
            raise ValueError(
                f"QuantLinear: g_idx: expected entries from 0 to {groups - 1}, got {low} to {high}"
            )
        g_idx = g_idx.to(torch.int32).contiguous()
        return None if torch.equal(g_idx, self._trivial_g_idx(g_idx.device)) else g_idx.clone()

    def _trivial_g_idx(self, device: torch.device) -> Tensor:
        return ops.trivial_g_idx(self.in_features, self.group_size, device)

    def _hold(self, qweight: Tensor, qzeros: Tensor, g_idx: Tensor | None) -> None:
        """Pack the integers. Columns of permuted groups are packed in the ``order`` of their groups
        where these then lie as trivial ones do: kernels read a trivial weight, and the activations
        are permuted instead, which costs little."""
        order = self._group_order(g_idx)
        if order is not None:
            qweight = _select_columns(qweight, order, self.bits)
        self.packed = ops.prepack(qweight, qzeros, bits=self.bits, group_size=self.group_size)
        self._layout = self.packed.device.type
        self.g_idx, self.order = g_idx, order
        self.inverse = None if order is None else _inverse(order)

    def _group_order(self, g_idx: Tensor | None) -> Tensor | None:
        if g_idx is None or g_idx.is_meta:
            return None
        groups, order = g_idx.sort(stable=True)
        trivial = torch.equal(groups, self._trivial_g_idx(g_idx.device))
        return order.to(torch.int32) if trivial else None

    def _unpack(self) -> tuple[Tensor, Tensor]:
        qweight, qzeros = ops.unpack(
            self._readable(),
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            out_features=self.out_features,
        )
        if self.inverse is not None:
            qweight = _select_columns(qweight, self.inverse, self.bits)
        return qweight, qzeros

    def _readable(self) -> Tensor:
        """``packed``, unless its layout is another device's: kernels could not tell."""
        packed = self._buffers["packed"]
        assert packed is not None
        device = packed.device.type
        if device not in (self._layout, "meta"):
            raise Error(
                f"QuantLinear: packed: expected the layout of {device}, got that of "
                f"{self._layout}: move the layer, not its buffer"
            )
        return packed

    def canonical(self) -> dict[str, Tensor]:
        """``qweight``, ``qzeros``, ``scales``, ``g_idx`` (even if trivial) and any ``bias``."""
        qweight, qzeros = self._unpack()
        tensors = {
            "qweight": qweight,
            "qzeros": qzeros,
            "scales": self.scales.detach(),
            "g_idx": self._trivial_g_idx(self.packed.device) if self.g_idx is None else self.g_idx,
        }
        if self.bias is not None:
            tensors["bias"] = self.bias.detach()
        return tensors

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]."""
        weight = ops.dequantize(
            self._readable(),
            self.scales,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            g_idx=self.g_idx if self.order is None else None,
            dtype=dtype,
        )
        return weight if self.inverse is None else weight.index_select(1, self.inverse)

    def forward(self, x: Tensor) -> Tensor:
        # Module.__getattr__ would find them as well, and takes long beside a small product.
        buffers: dict[str, Any] = self._buffers
        parameters: dict[str, Any] = self._parameters
        order = buffers["order"]
        g_idx = buffers["g_idx"] if order is None else None
        if (
            g_idx is None
            and self._layout == "cpu"
            and "scales" in parameters  # else it is computed from something (parametrizations)
            and "bias" in parameters
            and is_plain(x, buffers["packed"], parameters["scales"])
            and ((bias := parameters["bias"]) is None or is_plain(bias))
            and not torch.is_autocast_enabled("cpu")
        ):
            return fused_qgemm_nt(
                x,
                buffers["packed"],
                parameters["scales"],
                None,
                bias,
                order,
                self.bits,
                self.group_size,
                self.in_features,
                self.out_features,
            )
        if not isinstance(x, Tensor):
            raise ValueError(f"QuantLinear: x: expected a tensor, got {type(x).__name__}")
        # As torch does for its own linears: double stays double, and is then refused.
        castable = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if castable and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if order is not None and x.shape[-1:] == (self.in_features,):
            x = ops.permute_columns(x, order, buffers["inverse"])
        return ops.qgemm_nt(
            x,
            self._readable(),
            self.scales,
            bits=self.bits,
            group_size=self.group_size,
            g_idx=g_idx,
            bias=self.bias,
        )

    def adapted_weight(
        self, adapters: tuple[tuple[Tensor, Tensor, float], ...]
    ) -> ops.AdaptedWeight | None:
        """What `ops.project_token` and `ops.finish_token` take; None where they do not serve: on
        other devices, of groups that no ``order`` makes trivial, of scales that are computed
        (parametrizations)."""
        buffers: dict[str, Any] = self._buffers
        parameters: dict[str, Any] = self._parameters
        order = buffers["order"]
        if (
            (order is None and buffers["g_idx"] is not None)
            or self._layout != "cpu"
            or "scales" not in parameters
            or "bias" not in parameters
        ):
            return None
        packed, scales, bias = buffers["packed"], parameters["scales"], parameters["bias"]
        if type(packed) is not Tensor or type(scales) is not nn.Parameter:
            return None  # stand-ins, shards
        if not scales.is_contiguous() or not (bias is None or in_memory(bias)):
            return None
        return ops.AdaptedWeight(
            packed,
            scales,
            None if bias is None else bias.float().contiguous(),
            order,
            self.bits,
            self.group_size,
            self.in_features,
            self.out_features,
            adapters,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}, "
            f"act_order={self.g_idx is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # Moving is fine where the layout stays the same.
        kinds = {self.packed.device.type, _device_after(fn, self.packed).type}
        if len(kinds) == 2 and "meta" not in kinds:
            old = self.packed.device
            qweight, qzeros = (fn(tensor) for tensor in self._unpack())
            g_idx = None if self.g_idx is None else fn(self.g_idx)
            if old.type == "cuda":  # copies to the CPU may still be under way (non_blocking)
                torch.cuda.current_stream(old).synchronize()
            self._hold(qweight, qzeros, g_idx)
        with _masters_kept(self, "scales"):
            super()._apply(fn, recurse)
        if "meta" in kinds:  # no bytes came along
            self._layout = self.packed.device.type
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Canonical: a pickle may be read on another device.
        qweight, qzeros = self._unpack()
        buffers = {**self._buffers, "packed": None}
        return {**self.__dict__, "_buffers": buffers, "_canonical": (qweight, qzeros)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        qweight, qzeros = state.pop("_canonical")
        super().__setstate__(state)
        self._hold(qweight, qzeros, self.g_idx)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.canonical().items():
            own = getattr(self, name, None)
            keep = keep_vars and isinstance(own, nn.Parameter)
            destination[prefix + name] = own if keep else tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wanted = ["qweight", "qzeros", "scales", "g_idx"] + ["bias"] * (self.bias is not None)
        found = {name: state_dict[prefix + name] for name in wanted if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in wanted if name not in found)
        unexpected_keys.extend(
            key
            for key in state_dict
            if key.startswith(prefix) and key.removeprefix(prefix) not in wanted
        )
        try:
            if ("qweight" in found) != ("qzeros" in found):
                raise ValueError("expected qweight and qzeros together, got one of them")
            self._check(**{name: x for name, x in found.items() if name != "g_idx"})
            g_idx = self._nontrivial(found["g_idx"]) if "g_idx" in found else self.g_idx
            # The layer stays where it is, as its parameters do.
            assigns = self.packed.is_meta or local_metadata.get("assign_to_params_buffers", False)
            if found.keys() & {"qweight", "g_idx"} and not assigns:
                device = self.packed.device
                g_idx = None if g_idx is None else g_idx.to(device)
                found.update(
                    {
                        name: found[name].to(device)
                        for name in ("qweight", "qzeros")
                        if name in found
                    }
                )
            if found.keys() & {"qweight", "g_idx"}:
                qweight, qzeros = (
                    (found["qweight"], found["qzeros"]) if "qweight" in found else self._unpack()
                )
                self._hold(qweight, qzeros, g_idx)
                self.integers = object()
            for name in ("scales", "bias"):
                if name in found:
                    self._load_parameter(name, found[name])
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")

    @torch.no_grad()
    def _load_parameter(self, name: str, value: Tensor) -> None:
        """In place, as any module does it: an optimizer may hold the parameter."""
        own = getattr(self, name)
        if own.is_meta:
            dtype = torch.float32 if name == "scales" else value.dtype
            value = value.detach().to(dtype).clone()
            setattr(self, name, nn.Parameter(value, requires_grad=own.requires_grad))
        else:
            own.copy_(value)


def _select_columns(qweight: Tensor, columns: Tensor, bits: int) -> Tensor:
    codes = ops.unpack_qweight(qweight, bits=bits)
    return ops.pack_qweight(codes.index_select(1, columns), bits=bits)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return inverse


@contextmanager
def _masters_kept(module: nn.Module, *names: str) -> Iterator[None]:
    """Parameters that .to(), .cuda() and .half() may move, but not cast: they stay float32."""
    # What is in the parameters may be replaced, these being the same objects.
    masters = {name: getattr(module, name).detach() for name in names}
    yield
    for name, master in masters.items():
        own = getattr(module, name)
        if own.dtype != torch.float32:
            own.data = master.to(own.device)


def _device_after(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> torch.device:
    """Where what ``Module._apply`` is given puts a tensor."""
    return fn(tensor.new_empty(0)).device


class _Dropout(nn.Dropout):
    """torch's own, but for the core's on the CPU, which is several times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return ops.dropout(x, self.p) if ops.serves(x) else super().forward(x)


class LowRank(nn.Module):
    """One adapter of one linear: ``scaling * B A dropout(x)``.

    `a` [r, K] and `b` [N, r] are float32 masters; products are in the type of the activations, but
    float32 where the core has them: of tokens that a model generates, and where torch's are slow.
    `a` starts as PEFT's does, `b` as zeros: an adapter starts out as nothing. `with_scales` says
    that it was trained together with its base's scales and means nothing without them; `upon`
    has the digests of scales that it goes with, None while these are those in use; `starts`
    are the digests of adapters that its training started from, one after another, `parts` those of
    what was folded into it; `order` counts the adapters of a model as they came, the same for all
    linears of one.
    """

    order = 0
    with_scales = False
    upon: str | None = None
    starts: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, scaling: float, dropout: float
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.dropout = _Dropout(dropout)
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        with _masters_kept(self, "a", "b"):
            super()._apply(fn, recurse)
        return self

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., N] plus what the adapter makes of x [..., K]."""
        if self.a.requires_grad:  # what is frozen counts as it is
            x = self.dropout(x)
        slow = dense.is_slow(x)
        if slow and ops.serves(x, y):
            return ops.add_low_rank(y, x, self.a.float(), self.b.float(), scaling=self.scaling)
        low, b = dense.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)
        if slow:
            return torch.add(y, dense.linear(low, b), alpha=self.scaling)
        rows = y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1])
        return torch.addmm(*rows, b.mT, alpha=self.scaling).view(y.shape)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"


class LoraLinear(nn.Module):
    """A linear, packed or not, and the adapters stacked on it, the newest last:
    ``base(x) + sum of (alpha / r) B A dropout(x)`` (Hu et al. 2106.09685)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        x = x.to(y.dtype)  # autocast's, if it is on
        for adapter in self.adapters:
            y = adapter.add_to(y, x)  # type: ignore[operator]
        return y

"""What a training will need, before anything is loaded.

The model is built of fake tensors, which have shapes and no data, and its forward is run on them:
what autograd keeps is counted, not estimated by a formula for each architecture.
"""

from __future__ import annotations

import os
import re
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowbitcore import ops
from lowbitcore.blocks import find_blocks, linear_shape, quantizable, set_module
from lowbitcore.checks import check_length
from lowbitcore.head import chunk_tokens
from lowbitcore.lora import prepare_lora
from lowbitcore.lrec import SHARD, TOKENS_TOGETHER
from lowbitcore.modeling import use_own_operations
from lowbitcore.nn import QuantLinear
from lowbitcore.peqa import prepare_peqa, thaw_scales
from lowbitcore.skeleton import tied_names
from lowbitcore.training import KEPT, Checkpointing

Method = Literal["peqa", "emef", "lrec"]

# What glibc's heap holds beside live tensors: its end, and between them a share of those that come
# and go (measured on two models and three kinds of checkpointing, together: 20 to 100 MB).
_HELD_BYTES = 32 << 20
_HELD_SHARE = 0.1

# What a tokenizer has in memory for each token it knows (measured: 31 MB for 49,152).
_TOKEN_BYTES = 640

# A gradient and AdamW's two moments, float32, beside each trained float32 parameter.
_OPTIMIZER_BYTES = 12


class Plan(NamedTuple):
    """Bytes of what is in memory at the peak of a training, and what goes to disk.

    The peak is that of a training step or, where LREC keeps its teacher's states in a cache, of
    filling it. `teacher_bytes` are what of the 16-bit model is in memory beside the packed one:
    while the cache fills, its embeddings, its largest block and the states of the examples that go
    through that together; without a cache all of it, all along. `runtime_bytes` is this very
    process, Python and the libraries that training imports, and a tokenizer; `held_bytes` is what
    the C library's heap keeps of freed tensors; `cache_bytes` is LREC's teacher cache for `tokens`,
    on disk.
    """

    trainable_parameters: int
    runtime_bytes: int
    weights_bytes: int
    teacher_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    loss_bytes: int
    held_bytes: int
    peak_bytes: int
    cache_bytes: int
    fits: bool
    largest_micro_batch: int


def plan(
    config: PretrainedConfig,
    *,
    method: Method,
    bits: int,
    group_size: int,
    rank: int = 8,
    targets: list[str] | None = None,
    scales: bool = False,
    length: int = 512,
    micro_batch: int = 1,
    tokens: int = 0,
    cache: bool = True,
    memory: int,
    checkpointing: Checkpointing = "none",
) -> Plan:
    """Plans a training of the model that `config` describes, with its blocks' linears packed.

    `targets` None means q_proj and v_proj for "emef"; "lrec" adapts every linear, and trains the
    scales, too, if `scales`, and keeps the teacher's states for `tokens` if `cache`. Raises
    ValueError for settings that the methods would refuse.
    """
    ops.check_format("plan", bits=bits, group_size=group_size, in_features=32, out_features=32)
    for name, value, least in (
        ("length", length, 1),
        ("micro_batch", micro_batch, 1),
        ("tokens", tokens, 0),
    ):
        if value < least:
            raise ValueError(f"plan: {name}: expected at least {least}, got {value}")
    check_length("plan: length", length, config)
    dtype = config.dtype or torch.float32
    if targets is not None and method == "peqa":
        raise ValueError("plan: targets: expected none for peqa, which trains scales")
    if scales and method != "lrec":
        raise ValueError(f"plan: scales: expected lrec, which has --scales-lr, got {method}")
    with FakeTensorMode():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        teacher = 0
        if method == "lrec":
            teacher = _filling_bytes(model, length, tokens) if cache else _bytes(model)
        _pack(model, bits, group_size)
        weights = _bytes(model)
        if method == "peqa":
            prepare_peqa(model)
        elif method == "lrec":
            prepare_lora(model, rank=rank, alpha=rank, targets=targets)
            if scales:
                thaw_scales(model)
        else:
            prepare_lora(model, rank=rank, targets=targets or ["q_proj", "v_proj"])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapters = _bytes(model) - weights
        model.train()
        one, two = (_activations(model, batch, length, checkpointing) for batch in (1, 2))
    optimizer = adapters + trained * _OPTIMIZER_BYTES
    # Logits, their gradient, and for LREC the teacher's; what is float32 is of a few rows.
    copies = 3 if method == "lrec" else 2
    loss = chunk_tokens(model) * model.config.get_text_config().vocab_size * copies * dtype.itemsize
    runtime = _resident() + _TOKEN_BYTES * config.get_text_config().vocab_size
    if method == "lrec" and cache:  # the teacher's states of a batch, and of its scored tokens
        states = 2 * length * model.config.get_text_config().hidden_size * dtype.itemsize
        one, two = one + states, two + 2 * states
    slope = two - one
    activation = one + (micro_batch - 1) * slope

    def held(activation: int) -> int:
        return _HELD_BYTES + int(_HELD_SHARE * (loss + activation))

    fixed = runtime + weights
    beside = 0 if cache else teacher  # in a step

    def step(activation: int) -> int:
        return fixed + beside + optimizer + loss + activation + held(activation)

    filling = fixed + adapters + teacher + held(0)
    peak = max(step(activation), filling)
    room = memory - step(one - slope) if filling <= memory else 0
    hidden = model.config.get_text_config().hidden_size
    return Plan(
        trainable_parameters=trained,
        runtime_bytes=runtime,
        weights_bytes=weights,
        teacher_bytes=teacher,
        optimizer_bytes=optimizer,
        activation_bytes=activation,
        loss_bytes=loss,
        held_bytes=held(activation),
        peak_bytes=peak,
        cache_bytes=tokens * hidden * dtype.itemsize if teacher and cache else 0,
        fits=peak <= memory,
        largest_micro_batch=max(0, int(room / ((1 + _HELD_SHARE) * slope))),
    )


def parse_memory(text: str | None) -> int:
    """Bytes of "8GB", "512MB" (decimal) or "8GiB" (binary); None: this machine's memory."""
    if text is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([MGT])(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"plan: memory: expected a size such as 8GB or 512MB, got {text!r}")
    exponent = "MGT".index(match[2].upper()) + 2
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def _pack(model: PreTrainedModel, bits: int, group_size: int) -> None:
    use_own_operations(model)
    blocks = find_blocks(model).modules
    for path, linear in quantizable(blocks).items():
        in_features, out_features = linear_shape(linear)
        packed = QuantLinear(
            in_features,
            out_features,
            bits=bits,
            group_size=group_size,
            bias=getattr(linear, "bias", None) is not None,
        )
        set_module(blocks, path, packed)


def _filling_bytes(model: PreTrainedModel, length: int, tokens: int) -> int:
    """What a BlockwiseModel has in memory while it fills a cache."""
    config, blocks = model.config.get_text_config(), find_blocks(model).modules
    surroundings = _bytes(model) - _bytes(blocks)
    if not tied_names(model):
        surroundings -= _bytes(model.get_output_embeddings())
    # Of each token what was embedded, and what came out of the last block.
    together = min(tokens, max(TOKENS_TOGETHER, SHARD * length))
    states = 2 * together * config.hidden_size * model.dtype.itemsize
    return surroundings + max(map(_bytes, blocks)) + states


def _bytes(model: nn.Module) -> int:
    """Of all parameters and buffers; tied ones count once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _Kept(TorchDispatchMode):
    """Counts the bytes that selective checkpointing keeps of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in KEPT:
            outputs = out if isinstance(out, tuple | list) else [out]
            self.total += sum(_size(item) for item in outputs if isinstance(item, Tensor))
        return out


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _size(tensor: Tensor) -> int:
    return _storage(tensor).nbytes()


def _activations(
    model: PreTrainedModel, batch: int, length: int, checkpointing: Checkpointing
) -> int:
    """Bytes that a forward keeps for its backward, and one block's where that is done again."""
    # By storage, which many tensors may share; held, as its id is good only while it lives.
    own = {id(s): s for s in map(_storage, [*model.parameters(), *model.buffers()])}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if id(storage) not in own:
            saved.setdefault(id(storage), storage)
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in saved.values())

    inputs: list[int] = []
    starts: list[int] = []
    sizes: list[int] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(_size(args[0]))
        starts.append(total())

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sizes.append(total() - starts[-1])

    handles = []
    for block in find_blocks(model).modules:
        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    ids = torch.zeros(batch, length, dtype=torch.int64)
    kept = _Kept()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), kept:
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    # The loss holds the scored states and their gradient.
    ends = 2 * _size(states)
    if checkpointing == "none":
        return total() + ends
    return sum(inputs) + max(sizes) + ends + (kept.total if checkpointing == "selective" else 0)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

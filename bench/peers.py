"""One 4-bit linear through what people use today on this machine, and through this library.

    python bench/peers.py [--shape 4096x4096] [--rows 1 16 128 1024] [--python PATH] [--device cpu]

Each peer runs in a process of its own, in turn with the others, three times; medians. On the GPU
that torch and this build share, else on the CPU. PATH is the interpreter that has the peers, if
this one has not. bf16 activations, groups of 128; up to 16 rows the weights rotate over copies that
no cache holds. "-": not installed there, or not for this machine; the reason is under the table.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import device
from ceilings import CACHE_BYTES

GROUP_SIZE, BITS = 128, 4
ROUNDS, REPEATS = 3, 9

Layer = Callable[[Tensor], Tensor]


def dense(n: int, k: int, where: str) -> Layer:
    weight = torch.randn(n, k).bfloat16().to(where)
    return lambda x: torch.nn.functional.linear(x, weight)


def ours(n: int, k: int, where: str) -> Layer:
    from memory import random_linear

    return random_linear(k, n, bits=BITS, group_size=GROUP_SIZE).to(where)


def aten_int4(n: int, k: int, where: str) -> Layer:
    """The operator under torchao's and transformers' int4."""
    aten = torch.ops.aten
    scales_zeros = torch.full((k // GROUP_SIZE, n, 2), 0.01, dtype=torch.bfloat16, device=where)
    if where == "cpu":
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        packed = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        multiply = aten._weight_int4pack_mm_for_cpu
    else:
        pairs = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=where)
        packed = aten._convert_weight_to_int4pack(pairs, 8)
        multiply = aten._weight_int4pack_mm
    return lambda x: multiply(x, packed, GROUP_SIZE, scales_zeros)


def scratch(linear: torch.nn.Module, where: str) -> dict[str, object]:
    """The memory that GPTQModel gives to layers of ExLlamaV2, and to no others."""
    if not hasattr(linear, "temp_dq_size"):
        return {}
    from gptqmodel.utils.exllamav2 import ScratchSpace

    return {"scratch_space": ScratchSpace(linear.temp_dq_size(), where)}


def gptqmodel(module: str, name: str, *, sym: bool = False) -> Callable[[int, int, str], Layer]:
    def make(n: int, k: int, where: str) -> Layer:
        kind = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
        usable, reason = kind.cached_validate_once()
        if not usable:
            raise ImportError(str(reason))
        linear = kind(
            bits=BITS,
            group_size=GROUP_SIZE,
            sym=sym,
            desc_act=False,
            in_features=k,
            out_features=n,
            dtype=torch.bfloat16,
        )
        for integers in (linear.qweight, linear.qzeros):
            integers.random_(-(2**31), 2**31 - 1)
        linear.scales.data = torch.full_like(linear.scales, 0.01, dtype=torch.bfloat16)
        linear.g_idx.data = torch.arange(k, dtype=torch.int32) // GROUP_SIZE
        linear.optimize = lambda *args, **kwargs: None  # it would compile anew for each copy
        linear.to(where).post_init(**scratch(linear, where))
        return linear.eval()

    return make


def vllm_marlin(n: int, k: int, where: str) -> Layer:
    """As vLLM loads a GPTQ checkpoint that is symmetric and has no act-order."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    words = torch.randint(-(2**31), 2**31 - 1, (k * BITS // 32, n), dtype=torch.int32).to(where)
    scales = torch.full((k // GROUP_SIZE, n), 0.01, dtype=torch.bfloat16, device=where)
    nothing = torch.empty(0, dtype=torch.int32, device=where)
    fixed = {
        "weight": _custom_ops.gptq_marlin_repack(
            words, perm=nothing, size_k=k, size_n=n, num_bits=BITS
        ),
        "weight_scale": marlin_utils.marlin_permute_scales(
            scales, size_k=k, size_n=n, group_size=GROUP_SIZE
        ),
        "weight_zp": nothing,
        "g_idx": nothing,
        "g_idx_sort_indices": nothing,
        "workspace": marlin_utils.marlin_make_workspace_new(torch.device(where)),
        "wtype": scalar_types.uint4b8,
        "output_size_per_partition": n,
        "input_size_per_partition": k,
        "is_k_full": True,
    }
    return lambda x: marlin_utils.apply_gptq_marlin_linear(input=x, **fixed)


def bitsandbytes_nf4(n: int, k: int, where: str) -> Layer:
    import bitsandbytes

    linear = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        torch.randn(n, k).bfloat16(), requires_grad=False, quant_type="nf4", blocksize=64
    )
    return linear.to(where)


OWN = {"dense bf16": dense, "lowbitcore": ours}  # where they fail, so does the script
BOTH = {
    **OWN,
    "aten int4pack": aten_int4,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "gptqmodel torch": gptqmodel("torch", "TorchLinear"),
}
PEERS = {
    "cpu": {**BOTH, "gptqmodel avx512": gptqmodel("torch_cpu_avx512", "TorchCpuAvx512Linear")},
    "cuda": {
        **BOTH,
        "gptqmodel triton": gptqmodel("tritonv2", "TritonV2Linear"),
        "gptqmodel exllamav2": gptqmodel("exllamav2", "ExllamaV2Linear"),  # computes in fp16
        "gptqmodel marlin": gptqmodel("marlin", "MarlinLinear", sym=True),
        "vllm marlin": vllm_marlin,
    },
}


@torch.no_grad()
def measure(peer: str, where: str, n: int, k: int, rows: list[int]) -> dict[int, float]:
    """Milliseconds for each number of rows."""
    seconds = device.gpu_seconds if where == "cuda" else device.cpu_seconds
    size = n * k * (2 if peer == "dense bf16" else BITS / 8)
    layers = [PEERS[where][peer](n, k, where) for _ in range(max(1, int(CACHE_BYTES // size)))]
    found = {}
    for m in rows:
        x = torch.randn(m, k).bfloat16().to(where)
        turn = itertools.cycle(layers if m <= 16 else layers[:1])

        def run(x: Tensor = x, turn: itertools.cycle[Layer] = turn) -> Tensor:
            return next(turn)(x)

        for _ in layers:  # what happens once happens before
            run()
        found[m] = 1e3 * statistics.median(seconds(run) for _ in range(REPEATS))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="4096x4096", metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--python", default=sys.executable, help="an interpreter with the peers")
    parser.add_argument("--device", choices=PEERS, help="default: the GPU, if it can be used")
    parser.add_argument("--only", metavar="PEER", help="measure one in this process, print JSON")
    arguments = parser.parse_args()
    n, k = map(int, arguments.shape.split("x"))
    where = arguments.device or device.device().type
    if arguments.only:
        try:
            print(json.dumps(measure(arguments.only, where, n, k, arguments.rows)))
        except Exception as error:  # whatever keeps others' software from running here
            if arguments.only in OWN:
                raise
            print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}))
        return
    peers = PEERS[where]
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    errors: dict[str, str] = {}
    for _, peer in itertools.product(range(ROUNDS), peers):
        if peer in errors:
            continue
        python = sys.executable if peer in OWN else arguments.python
        command = [python, __file__, "--shape", arguments.shape, "--device", where]
        done = subprocess.run(
            [*command, "--only", peer, "--rows", *map(str, arguments.rows)],
            stdout=subprocess.PIPE,
            stderr=None if peer in OWN else subprocess.DEVNULL,
            text=True,
            check=peer in OWN,
        )
        lines = done.stdout.splitlines() or ["it crashed"]
        result = json.loads(lines[-1]) if lines[-1].startswith("{") else {"error": "it crashed"}
        if "error" in result:
            errors[peer] = result["error"]
        else:
            found[peer].append(result)
    print(f"{'ms (x dense)':<20}" + "".join(f"{f'M = {m}':>18}" for m in arguments.rows))
    medians = {
        peer: [statistics.median(run[str(m)] for run in runs) for m in arguments.rows]
        for peer, runs in found.items()
        if runs
    }
    for peer in peers:
        if peer in errors:
            cells = [f"{'-':>18}"] * len(arguments.rows)
        else:
            pairs = zip(medians["dense bf16"], medians[peer], strict=True)
            cells = [f"{f'{ms:.3f} ({base / ms:.2f})':>18}" for base, ms in pairs]
        print(f"{peer:<20}" + "".join(cells))
    for peer, error in errors.items():
        print(f"{peer}: {error}")


if __name__ == "__main__":
    main()

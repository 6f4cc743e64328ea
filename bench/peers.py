"""One 4-bit linear through what people use on CPUs today, and through this library.

    python bench/peers.py [--shape 4096x4096] [--rows 1 16 128 1024] [--python PATH]

Each peer runs in a process of its own, in turn with the others, three times; medians. PATH is the
interpreter that has the peers, if this one has not. bf16 activations, groups of 128; up to 16 rows
the weights rotate over copies that no cache holds. "-": not installed there, or not for this CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ceilings import CACHE_BYTES

GROUP_SIZE, BITS = 128, 4
ROUNDS, REPEATS = 3, 9

Layer = Callable[[Tensor], Tensor]


def dense(n: int, k: int) -> Layer:
    weight = torch.randn(n, k).bfloat16()
    return lambda x: torch.nn.functional.linear(x, weight)


def ours(n: int, k: int) -> Layer:
    from memory import random_linear

    return random_linear(k, n, bits=BITS, group_size=GROUP_SIZE)


def aten_int4(n: int, k: int) -> Layer:
    """The operator under torchao's and transformers' int4 on CPUs."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (n, k), dtype=torch.int32), 1
    )
    scales_zeros = torch.full((k // GROUP_SIZE, n, 2), 0.01, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales_zeros)


def _gptqmodel(module: str, name: str, n: int, k: int) -> Layer:
    import importlib

    kind = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
    usable, reason = kind.cached_validate_once()
    if not usable:
        raise ImportError(str(reason))
    linear = kind(
        bits=BITS, group_size=GROUP_SIZE, sym=False, desc_act=False, in_features=k, out_features=n
    )
    for buffer in (linear.qweight, linear.qzeros):
        buffer.random_(-(2**31), 2**31 - 1)
    linear.scales = torch.full_like(linear.scales, 0.01, dtype=torch.bfloat16)
    linear.g_idx = torch.arange(k, dtype=torch.int32) // GROUP_SIZE
    linear.optimize = lambda *args, **kwargs: None  # it would compile anew for each copy
    linear.post_init()
    return linear.eval()


def gptqmodel_torch(n: int, k: int) -> Layer:
    return _gptqmodel("torch", "TorchLinear", n, k)


def gptqmodel_avx512(n: int, k: int) -> Layer:
    return _gptqmodel("torch_cpu_avx512", "TorchCpuAvx512Linear", n, k)


def bitsandbytes_nf4(n: int, k: int) -> Layer:
    import bitsandbytes

    linear = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        torch.randn(n, k).bfloat16(), requires_grad=False, quant_type="nf4", blocksize=64
    )
    return linear.to("cpu")


OWN = ("dense bf16", "lowbitcore")  # in this interpreter; where they fail, so does the script
PEERS = {
    "dense bf16": dense,
    "lowbitcore": ours,
    "aten int4pack": aten_int4,
    "gptqmodel torch": gptqmodel_torch,
    "gptqmodel avx512": gptqmodel_avx512,
    "bitsandbytes nf4": bitsandbytes_nf4,
}


@torch.no_grad()
def measure(peer: str, n: int, k: int, rows: list[int]) -> dict[int, float]:
    """Milliseconds for each number of rows."""
    size = n * k * (2 if peer == "dense bf16" else BITS / 8)
    layers = [PEERS[peer](n, k) for _ in range(max(1, int(CACHE_BYTES // size)))]
    found = {}
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        turn = itertools.cycle(layers if m <= 16 else layers[:1])
        times = []
        for _ in range(REPEATS + len(layers)):
            layer = next(turn)
            start = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
        found[m] = 1e3 * statistics.median(times[len(layers) :])  # after each has run once
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="4096x4096", metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--python", default=sys.executable, help="an interpreter with the peers")
    parser.add_argument("--only", choices=PEERS, help="measure one in this process, print JSON")
    arguments = parser.parse_args()
    n, k = map(int, arguments.shape.split("x"))
    if arguments.only:
        try:
            print(json.dumps(measure(arguments.only, n, k, arguments.rows)))
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            if arguments.only in OWN:
                raise
            print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}))
        return
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    errors: dict[str, str] = {}
    for _, peer in itertools.product(range(ROUNDS), PEERS):
        if peer in errors:
            continue
        python = sys.executable if peer in OWN else arguments.python
        command = [python, __file__, "--shape", arguments.shape, "--only", peer, "--rows"]
        done = subprocess.run(
            [*command, *map(str, arguments.rows)],
            stdout=subprocess.PIPE,
            stderr=None if peer in OWN else subprocess.DEVNULL,
            text=True,
            check=peer in OWN,
        )
        lines = done.stdout.splitlines() or ['{"error": "it crashed"}']
        result = json.loads(lines[-1]) if lines[-1].startswith("{") else {"error": "it crashed"}
        if "error" in result:
            errors[peer] = result["error"]
        else:
            found[peer].append(result)
    print(f"{'ms (x dense)':<18}" + "".join(f"{f'M = {m}':>18}" for m in arguments.rows))
    medians = {
        peer: [statistics.median(run[str(m)] for run in runs) for m in arguments.rows]
        for peer, runs in found.items()
        if runs
    }
    for peer in PEERS:
        if peer in errors:
            cells = [f"{'-':>18}"] * len(arguments.rows)
        else:
            pairs = zip(medians["dense bf16"], medians[peer], strict=True)
            cells = [f"{f'{ms:.3f} ({base / ms:.2f})':>18}" for base, ms in pairs]
        print(f"{peer:<18}" + "".join(cells))
    for peer, error in errors.items():
        print(f"{peer}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()

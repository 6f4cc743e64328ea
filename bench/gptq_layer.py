"""GPTQ of single layers, beside GPTQModel's of the same weight and activations.

    python bench/gptq_layer.py [--shapes 4096x4096 4096x11008] [--python PATH] [--rounds N]

Each side runs in a process of its own, in turn with the other; median seconds from a Hessian to
integers. 4 bits, groups of 128, act-order, min-max grids found on the weights as updated so far,
damping 0.01 on both sides. PATH is the interpreter that has GPTQModel, if this one has not. The
last columns hold both to the same task: the squared error of outputs relative to the outputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BITS, GROUP_SIZE, DAMP, TOKENS = 4, 128, 0.01, 8192


class Result(NamedTuple):
    seconds: float
    quantized: Tensor


def make_layer(n: int, k: int) -> dict[str, Tensor]:
    """A weight [N, K], and activations [tokens, K] that are correlated and of unequal sizes."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(TOKENS, k // 8, generator=generator)
    mixed = few @ torch.randn(k // 8, k, generator=generator) / (k // 8) ** 0.5
    sizes = torch.randn(k, generator=generator).exp()
    x = sizes * (mixed + 0.3 * torch.randn(TOKENS, k, generator=generator))
    return {"weight": 0.02 * torch.randn(n, k, generator=generator), "x": x}


def ours(weight: Tensor, x: Tensor) -> Result:
    from lowbitcore import ops
    from lowbitcore.fit import dequantized

    hessian = torch.zeros(x.shape[1], x.shape[1])
    ops.accumulate_hessian_(hessian, x)
    before = time.perf_counter()
    factor = ops.gptq_factorize(hessian, percdamp=DAMP, act_order=True)
    found = ops.gptq_quantize(weight, factor, bits=BITS, group_size=GROUP_SIZE, static_groups=False)
    seconds = time.perf_counter() - before
    codes, scales, zeros, g_idx, _ = found
    dense = dequantized(codes, scales, zeros, group_size=GROUP_SIZE, g_idx=g_idx)
    return Result(seconds, dense)


def gptqmodel(weight: Tensor, x: Tensor) -> Result:
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    linear = torch.nn.Linear(x.shape[1], len(weight), bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    settings = {"desc_act": True, "act_group_aware": False, "sym": False, "damp_percent": DAMP}
    task = GPTQ(linear, QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, **settings))
    task.quantizer.configure(perchannel=True)
    task.add_batch(x[None], linear(x[None]))
    task.finalize_hessian()
    before = time.perf_counter()
    quantized = task.quantize()[0]
    return Result(time.perf_counter() - before, quantized.float())


SIDES = {"lowbitcore": ours, "gptqmodel": gptqmodel}


def loss(weight: Tensor, quantized: Tensor, x: Tensor) -> float:
    few = x[:1024]
    wanted, got = few @ weight.T, few @ quantized.T
    return float((wanted - got).square().sum() / wanted.square().sum())


def measure(side: str, layer: Path) -> dict[str, float]:
    tensors = torch.load(layer)
    with torch.no_grad():
        result = SIDES[side](tensors["weight"], tensors["x"])
        return {"seconds": result.seconds, "loss": loss(**tensors, quantized=result.quantized)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008"], metavar="NxK")
    parser.add_argument("--python", default=sys.executable, help="one that has GPTQModel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs=2, metavar=("SIDE", "FILE"), help="print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        side, layer = arguments.only
        print(json.dumps(measure(side, Path(layer))))
        return
    print(f"{'NxK':<14}{'side':<14}{'seconds':>10}{'of lowbitcore':>15}{'relative loss':>16}")
    for shape in arguments.shapes:
        n, k = map(int, shape.split("x"))
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        why = ""
        with tempfile.TemporaryDirectory() as scratch:
            layer = Path(scratch) / "layer.pt"
            torch.save(make_layer(n, k), layer)
            for _ in range(arguments.rounds):
                for side in SIDES:
                    python = sys.executable if side == "lowbitcore" else arguments.python
                    command = [python, __file__, "--only", side, str(layer)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode and side == "lowbitcore":
                        sys.exit(done.stderr)
                    if done.returncode:
                        why = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
                        continue
                    runs[side].append(json.loads(done.stdout.splitlines()[-1]))
        medians = {
            side: [statistics.median(run[key] for run in found) for key in ("seconds", "loss")]
            for side, found in runs.items()
            if found
        }
        for side, (seconds, error) in medians.items():
            ratio = seconds / medians["lowbitcore"][0]
            print(f"{shape:<14}{side:<14}{seconds:>10.2f}{ratio:>15.2f}{error:>16.5f}", flush=True)
        if why and "gptqmodel" not in medians:
            print(f"{shape:<14}{'gptqmodel':<14}{'-':>10}  {why}")


if __name__ == "__main__":
    main()

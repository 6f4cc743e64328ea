"""What a quantization is asked to do."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lowbitcore.formats import gptq, peft
from lowbitcore.formats.gptq import GptqConfig


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize. `act_order`: order of GPTQ's columns by activation; "static" keeps groups
    on the original order (a plain file for every loader), "dynamic" permutes them (`g_idx`).
    `target`: what GPTQ holds a linear's outputs against: "model", those of the 16-bit model (Li et
    al., arXiv 2504.02692, asymmetric calibration; a second forward and one more block in memory),
    or "layer", those of the linear's own 16-bit weight on the quantized model's inputs. `rank`: of
    the correction that each linear gets beside its integers, a LoRA adapter fitted in closed form
    to what they leave over; 0 for none. `adapter_bits`: of its elements, 8 (float8 E4M3) or 16.
    `tune_epochs`: passes over the calibration windows in which each block's integers, scales and
    corrections are trained together to put out what the 16-bit block does; 0 for none."""

    bits: int = 4
    group_size: int = 64
    sym: bool = False
    method: Literal["gptq", "rtn"] = "gptq"
    act_order: Literal["static", "dynamic", "none"] = "static"
    true_sequential: bool = True
    percdamp: float = 0.01
    mse: bool = True
    target: Literal["model", "layer"] = "model"
    rank: int = 0
    adapter_bits: int = 8
    tune_epochs: int = 0

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, expected: str) -> None:
            if not fine:
                value = getattr(self, name)
                raise ValueError(f"QuantConfig: {name}: expected {expected}, got {value!r}")

        size = self.group_size
        check("bits", type(self.bits) is int and self.bits in gptq.BITS, "2, 3, 4 or 8")
        check(
            "group_size",
            type(size) is int and (size == -1 or (0 < size <= 2**30 and size % 32 == 0)),
            "-1 or a multiple of 32, at most 2^30",
        )
        check("method", self.method in ("gptq", "rtn"), "'gptq' or 'rtn'")
        check(
            "act_order",
            self.act_order in ("static", "dynamic", "none"),
            "'static', 'dynamic' or 'none'",
        )
        check("rank", type(self.rank) is int and self.rank >= 0, "0 or a positive integer")
        check("rank", self.rank == 0 or self.method == "gptq", "0 where the method is rtn")
        bits = self.adapter_bits
        check("adapter_bits", type(bits) is int and bits in peft.DTYPES, "8 or 16")
        check("target", self.target in ("model", "layer"), "'model' or 'layer'")
        epochs = self.tune_epochs
        check("tune_epochs", type(epochs) is int and epochs >= 0, "0 or a positive integer")
        check("tune_epochs", epochs == 0 or self.method == "gptq", "0 where the method is rtn")
        check("tune_epochs", epochs == 0 or self.target == "model", "0 unless the target is model")
        damp = self.percdamp
        check("percdamp", isinstance(damp, int | float) and 0 < damp < 1, "between 0 and 1")
        for name in ("sym", "true_sequential", "mse"):
            check(name, isinstance(getattr(self, name), bool), "True or False")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def gptq_config(self) -> GptqConfig:
        """What the files will say, up to the convention of zeros, which saving chooses."""
        return GptqConfig(
            bits=self.bits,
            group_size=self.group_size,
            desc_act=self.method == "gptq" and self.act_order == "dynamic",
            sym=self.sym,
            meta={
                "quantizer": f"lowbitcore:{package_version()}",
                "method": self.method,
                "damp_percent": self.percdamp,
                "true_sequential": self.true_sequential,
                "static_groups": self.act_order == "static",
                "mse": self.mse,
                "target": self.target,
                "tune_epochs": self.tune_epochs,
            },
        )


def package_version() -> str:
    try:
        return importlib.metadata.version("lowbitcore")
    except importlib.metadata.PackageNotFoundError:
        return "0"  # run from a source tree

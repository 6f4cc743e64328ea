"""The PTX interpreter against oracles in numpy and exact fractions, and every error it knows."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ptxsim

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
WARP = 32


@pytest.fixture(scope="module")
def sim() -> ptxsim.Simulator:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no C++ compiler: the interpreter cannot be built")
    return ptxsim.Simulator(ptxsim.build())


def entry(body: str, parameters: int = 1, directives: str = "", module: str = "") -> str:
    """A kernel k whose parameters are pointers, in %a0, %a1...; %t is the lane, %o 8 * lane."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %a{i}, [p{i}];" for i in range(parameters))
    return f"""{HEADER}{module}
.visible .entry k({declared}) {directives}
{{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<40>; .reg .f32 %f<16>; .reg .b64 %d<8>;
.reg .b64 %a<{parameters + 1}>; .reg .b32 %t; .reg .b64 %o;
{loads}
mov.u32 %t, %tid.x;
mul.wide.u32 %o, %t, 4;
{body}
ret;
}}"""


def run(
    sim: ptxsim.Simulator,
    body: str,
    *arrays: np.ndarray,
    block: int = WARP,
    grid: int = 1,
    shared: int = 0,
    **kw: str,
) -> dict[str, int]:
    """Runs a body; returns its counters."""
    sim.load(entry(body, len(arrays), **kw))
    sim.clear_log()
    sim.launch("k", (grid, 1, 1), (block, 1, 1), list(arrays), shared)
    counters: dict[str, int] = sim.log()[0]["counters"]
    return counters


def lanewise(
    sim: ptxsim.Simulator, code: str, inputs: Sequence[np.ndarray], result: Any
) -> np.ndarray:
    """Runs `code` on %x0, %x1... of each element, in groups of a warp; it leaves %y."""
    n = len(inputs[0])
    assert n % WARP == 0
    out = np.zeros(n, result)

    def bits(dtype: Any) -> int:
        return 8 * np.dtype(dtype).itemsize

    lines = [
        "mov.u32 %r0, %ctaid.x;",
        "mad.lo.u32 %r1, %r0, 32, %t;",
        f".reg .b{max(bits(result), 16)} %y;",
    ]
    for i, x in enumerate(inputs):
        size = x.dtype.itemsize
        lines += [
            f".reg .b{max(bits(x.dtype), 16)} %x{i};",
            f"mad.wide.u32 %d0, %r1, {size}, %a{i};",
            f"ld.global.b{8 * size} %x{i}, [%d0];",
        ]
    size = out.dtype.itemsize
    lines += [
        code,
        f"mad.wide.u32 %d0, %r1, {size}, %a{len(inputs)};",
        f"st.global.b{8 * size} [%d0], %y;",
    ]
    run(sim, "\n".join(lines), *inputs, out, grid=n // WARP)
    return out


def operands(bits: int, count: int, n: int = 16 * WARP, seed: int = 0) -> list[np.ndarray]:
    """Edge cases against each other, then anything."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(f"u{bits // 8}")
    top = 1 << (bits - 1)
    edges = np.array([0, 1, 2, 5, 31, 32, 33, top - 1, top, top + 1, 2 * top - 1], dtype)
    values = []
    for i in range(count):
        x = rng.integers(0, 2 * top - 1, n, dtype=dtype, endpoint=True)
        grid = np.repeat(np.tile(edges, len(edges) ** (count - 1 - i)), len(edges) ** i)[: n // 2]
        x[: len(grid)] = grid
        values.append(x)
    return values


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def truncated(a: int, b: int) -> int:
    """Division that rounds towards zero."""
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


# ---- Integers. Oracles take unsigned numbers; `s` makes them signed.


def s32(f: Callable[..., int]) -> Callable[..., int]:
    return lambda *x: f(*(signed(v, 32) for v in x))


def s64(f: Callable[..., int]) -> Callable[..., int]:
    return lambda *x: f(*(signed(v, 64) for v in x))


def s16(f: Callable[..., int]) -> Callable[..., int]:
    return lambda *x: f(*(signed(v, 16) for v in x))


def _permute(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    result = 0
    for k in range(4):
        choice = selector >> (4 * k) & 15
        byte = source[choice & 7]
        result |= ((255 if byte & 128 else 0) if choice & 8 else byte) << (8 * k)
    return result


def _extract(a: int, b: int, c: int, is_signed: bool) -> int:
    position, length = b & 255, c & 255
    top = min(position + length - 1, 31)
    sign = is_signed and length > 0 and bool(a >> top & 1)
    result = 0
    for k in range(32):
        bit = a >> (position + k) & 1 if k < length and position + k <= 31 else sign
        result |= int(bit) << k
    return result


def _insert(a: int, b: int, c: int, d: int) -> int:
    for k in range(d & 255):
        if (c & 255) + k < 32:
            b = b & ~(1 << ((c & 255) + k)) | (a >> k & 1) << ((c & 255) + k)
    return b


def _lop3(table: int) -> Callable[[int, int, int], int]:
    def apply(a: int, b: int, c: int) -> int:
        return sum(
            (table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | c >> k & 1) & 1) << k
            for k in range(32)
        )

    return apply


def _dot(a: int, b: int, c: int) -> int:
    return c + sum(signed(a >> k, 8) * (b >> k & 255) for k in (0, 8, 16, 24))


INTEGERS: dict[str, tuple[int, int, Callable[..., int]]] = {
    # instruction: bits of the operands, of the result, oracle
    "add.s32": (32, 32, lambda a, b: a + b),
    "add.u16": (16, 16, lambda a, b: a + b),
    "add.s64": (64, 64, lambda a, b: a + b),
    "sub.s32": (32, 32, lambda a, b: a - b),
    "sub.s64": (64, 64, lambda a, b: a - b),
    "mul.lo.s32": (32, 32, lambda a, b: a * b),
    "mul.lo.s16": (16, 16, lambda a, b: a * b),
    "mul.lo.s64": (64, 64, lambda a, b: a * b),
    "mul.hi.u32": (32, 32, lambda a, b: a * b >> 32),
    "mul.hi.s32": (32, 32, s32(lambda a, b: a * b >> 32)),
    "mul.hi.u64": (64, 64, lambda a, b: a * b >> 64),
    "mul.hi.s64": (64, 64, s64(lambda a, b: a * b >> 64)),
    "mul.wide.u32": (32, 64, lambda a, b: a * b),
    "mul.wide.s32": (32, 64, s32(lambda a, b: a * b)),
    "mul.wide.u16": (16, 32, lambda a, b: a * b),
    "mul.wide.s16": (16, 32, s16(lambda a, b: a * b)),
    "mad.lo.s32": (32, 32, lambda a, b, c: a * b + c),
    "mad.lo.u64": (64, 64, lambda a, b, c: a * b + c),
    "mad.hi.u32": (32, 32, lambda a, b, c: (a * b >> 32) + c),
    "min.s32": (32, 32, s32(min)),
    "min.u32": (32, 32, min),
    "max.s32": (32, 32, s32(max)),
    "max.s64": (64, 64, s64(max)),
    "max.u16": (16, 16, max),
    "min.s16": (16, 16, s16(min)),
    "and.b32": (32, 32, lambda a, b: a & b),
    "or.b64": (64, 64, lambda a, b: a | b),
    "xor.b16": (16, 16, lambda a, b: a ^ b),
    "not.b32": (32, 32, lambda a: ~a),
    "neg.s32": (32, 32, lambda a: -a),
    "neg.s64": (64, 64, lambda a: -a),
    "abs.s32": (32, 32, s32(abs)),
    "div.u32": (32, 32, lambda a, b: a // b if b else 2**32 - 1),
    "div.s32": (32, 32, s32(lambda a, b: truncated(a, b) if b else -1)),
    "div.s64": (64, 64, s64(lambda a, b: truncated(a, b) if b else -1)),
    "rem.u32": (32, 32, lambda a, b: a % b if b else a),
    "rem.s32": (32, 32, s32(lambda a, b: a - b * truncated(a, b) if b else a)),
    "popc.b32": (32, 32, lambda a: bin(a).count("1")),
    "popc.b64": (64, 32, lambda a: bin(a).count("1")),
    "clz.b32": (32, 32, lambda a: 32 - a.bit_length()),
    "clz.b64": (64, 32, lambda a: 64 - a.bit_length()),
    "brev.b32": (32, 32, lambda a: int(f"{a:032b}"[::-1], 2)),
    "bfind.u32": (32, 32, lambda a: a.bit_length() - 1),
    "bfind.s32": (32, 32, s32(lambda a: (a if a >= 0 else ~a).bit_length() - 1)),
    "sad.u32": (32, 32, lambda a, b, c: abs(a - b) + c),
    "sad.s32": (32, 32, s32(lambda a, b, c: abs(a - b) + c)),
    "prmt.b32": (32, 32, _permute),
    "prmt.b32.f4e": (32, 32, lambda a, b, c: (a | b << 32) >> (8 * (c & 3))),
    "bfe.u32": (32, 32, lambda a, b, c: _extract(a, b, c, False)),
    "bfe.s32": (32, 32, lambda a, b, c: _extract(a, b, c, True)),
    "bfi.b32": (32, 32, _insert),
    "shf.l.wrap.b32": (32, 32, lambda a, b, c: ((a | b << 32) << (c & 31)) >> 32),
    "shf.r.wrap.b32": (32, 32, lambda a, b, c: (a | b << 32) >> (c & 31)),
    "shf.l.clamp.b32": (32, 32, lambda a, b, c: ((a | b << 32) << min(c, 32)) >> 32),
    "shf.r.clamp.b32": (32, 32, lambda a, b, c: (a | b << 32) >> min(c, 32)),
    "dp4a.s32.u32": (32, 32, _dot),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integer(sim: ptxsim.Simulator, name: str) -> None:
    bits, result_bits, oracle = INTEGERS[name]
    count = (
        4 if name == "bfi.b32" else oracle.__code__.co_argcount if _plain(oracle) else _ARITY[name]
    )
    inputs = operands(bits, count)
    names = ", ".join(f"%x{i}" for i in range(count))
    got = lanewise(sim, f"{name} %y, {names};", inputs, f"u{result_bits // 8}")
    mask = (1 << result_bits) - 1
    want = [oracle(*(int(v) for v in values)) & mask for values in zip(*inputs, strict=True)]
    assert got.tolist() == want


def _plain(f: Callable[..., int]) -> bool:
    return hasattr(f, "__code__") and not f.__code__.co_flags & 4  # no *arguments


_UNARY = {"abs.s32", "bfind.s32"}
_TERNARY = {"sad.s32"}
_ARITY = {name: 1 if name in _UNARY else 3 if name in _TERNARY else 2 for name in INTEGERS}


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("kind", ["shl.b", "shr.u", "shr.s"])
def test_shift(sim: ptxsim.Simulator, kind: str, bits: int) -> None:
    (a,) = operands(bits, 1)
    amount = np.resize(np.array([0, 1, 7, 15, 16, 31, 32, 63, 64, 1000], np.uint32), len(a))
    got = lanewise(sim, f"{kind}{bits} %y, %x0, %x1;", [a, amount], a.dtype)
    for x, n, y in zip(a.tolist(), amount.tolist(), got.tolist(), strict=True):
        value = signed(x, bits) if kind == "shr.s" else x
        n = min(n, 200)
        assert y == (value << n if kind == "shl.b" else value >> n) & ((1 << bits) - 1)


@pytest.mark.parametrize("table", [0xEA, 0x96, 0xE8, 0xCA, 0x01, 0x6A, 0xC0])
def test_lop3(sim: ptxsim.Simulator, table: int) -> None:
    inputs = operands(32, 3, 4 * WARP)
    got = lanewise(sim, f"lop3.b32 %y, %x0, %x1, %x2, {table};", inputs, "u4")
    assert got.tolist() == [_lop3(table)(*map(int, x)) for x in zip(*inputs, strict=True)]


@pytest.mark.parametrize("relation", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("dtype", ["i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "f2"])
def test_setp(sim: ptxsim.Simulator, relation: str, dtype: str) -> None:
    bits = 8 * int(dtype[1])
    a, b = (x.view(dtype) for x in operands(bits, 2))
    if dtype[0] == "f":
        a[:4], b[:4] = [np.nan, 1, 0.0, np.inf], [1, np.nan, -0.0, np.inf]
    kind = {"i": "s", "u": "u", "f": "f"}[dtype[0]]
    code = f"setp.{relation}.{kind}{bits} %p0, %x0, %x1; selp.b32 %y, 1, 0, %p0;"
    got = lanewise(sim, code, [a.view(f"u{dtype[1]}"), b.view(f"u{dtype[1]}")], "u4")
    operation = {"eq": "equal", "ne": "not_equal", "lt": "less"}
    operation |= {"le": "less_equal", "gt": "greater", "ge": "greater_equal"}
    want = getattr(np, operation[relation])(a, b)
    if dtype[0] == "f":
        unordered = np.isnan(a) | np.isnan(b)
        want &= ~unordered
        code = code.replace(f".{relation}.", f".{relation}u.")
        also = lanewise(sim, code, [a.view(f"u{dtype[1]}"), b.view(f"u{dtype[1]}")], "u4")
        np.testing.assert_array_equal(also, want | unordered)
    np.testing.assert_array_equal(got, want)


def test_setp_combines_predicates_and_has_two_results(sim: ptxsim.Simulator) -> None:
    a, b = operands(32, 2, 4 * WARP)
    code = """setp.gt.u32 %p0, %x1, 5;
    setp.lt.and.u32 %p1|%p2, %x0, %x1, !%p0;
    selp.b32 %r5, 1, 0, %p1; selp.b32 %r6, 2, 0, %p2; or.b32 %y, %r5, %r6;"""
    got = lanewise(sim, code, [a, b], "u4")
    want = ((a < b) & ~(b > 5)) * 1 + (~(a < b) & ~(b > 5)) * 2
    np.testing.assert_array_equal(got, want)


# ---- Floats: exact fractions, rounded once


FORMATS = {"f32": (24, -126, 127), "f16": (11, -14, 15), "bf16": (8, -126, 127)}


def round_exactly(x: Fraction, format_: str, mode: str = "rn") -> float:
    """The nearest number of a format, as a Python float; ties to even."""
    precision, lowest, highest = FORMATS[format_]
    if x == 0:
        return 0.0
    exponent = max(_exponent(abs(x)), lowest)
    unit = Fraction(2) ** (exponent - precision + 1)
    quotient = x / unit
    whole = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}[mode](quotient)
    rounded = whole * unit
    if abs(rounded) >= Fraction(2) ** (highest + 1):
        largest = float((2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** highest)
        away = mode == "rn" or (mode == "rp" and x > 0) or (mode == "rm" and x < 0)
        return math.copysign(math.inf if away else largest, x)
    return float(rounded)


def _exponent(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def decode(bits: np.ndarray, format_: str) -> np.ndarray:
    if format_ == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    wide = bits.astype(np.uint32) << (16 if format_ == "bf16" else 0)
    with np.errstate(invalid="ignore"):
        return wide.view(np.float32).astype(np.float64)


def float_bits(format_: str, count: int, n: int = 16 * WARP) -> list[np.ndarray]:
    """Random bits, numbers of like size (which cancel and tie), subnormals, infinities, NaN."""
    bits = 32 if format_ == "f32" else 16
    precision = FORMATS[format_][0]
    rng = np.random.default_rng(1)
    one = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}[format_]
    infinity = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[format_]
    special = [0, 1, infinity - 1, infinity, infinity + 1, one, one + 1, (1 << precision - 1) - 1]
    special += [x | 1 << (bits - 1) for x in special]
    result = []
    for i in range(count):
        x = rng.integers(0, 1 << bits, n).astype(np.uint64)
        near = one + (rng.integers(-3, 4, n // 2) << (precision - 1)) + rng.integers(0, 4, n // 2)
        x[: n // 2] = near.astype(np.uint64) | (
            rng.integers(0, 2, n // 2).astype(np.uint64) << (bits - 1)
        )
        x[n // 4 : n // 4 + 128] = rng.integers(0, 1 << precision, 128)  # small
        x[-256:] = np.resize(np.repeat(special, len(special) ** i % 255 or 1), 256)
        result.append(x.astype(f"u{bits // 8}"))
    return result


def check_rounding(
    got: np.ndarray,
    inputs: list[np.ndarray],
    format_: str,
    oracle: Callable[..., Fraction],
    mode: str,
) -> None:
    values = [decode(x, format_) for x in inputs]
    result = decode(got, format_)
    for k in range(len(got)):
        x = [float(v[k]) for v in values]
        if not all(map(math.isfinite, x)):
            continue  # numpy checks these
        want = round_exactly(oracle(*map(Fraction, x)), format_, mode)
        assert result[k] == want, (x, result[k], want)


ARITHMETIC: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("format_", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_rounds_once(sim: ptxsim.Simulator, name: str, format_: str) -> None:
    count = ARITHMETIC[name].__code__.co_argcount
    inputs = float_bits(format_, count)
    names = ", ".join(f"%x{i}" for i in range(count))
    dtype = inputs[0].dtype
    rn = ".rn" if name == "fma" else ""
    got = lanewise(sim, f"{name}{rn}.{format_} %y, {names};", inputs, dtype)
    check_rounding(got, inputs, format_, ARITHMETIC[name], "rn")
    values = [decode(x, format_) for x in inputs]
    with np.errstate(all="ignore"):
        plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
        want = plain[name](*values) if name != "fma" else values[0] * values[1] + values[2]
    special = ~np.all([np.isfinite(v) for v in values], axis=0)
    np.testing.assert_array_equal(decode(got, format_)[special], want[special])
    if format_ != "f32":  # two to a register
        pairs = [x.astype(np.uint32) | np.roll(x, 1).astype(np.uint32) << 16 for x in inputs]
        both = lanewise(sim, f"{name}{rn}.{format_}x2 %y, {names};", pairs, np.uint32)
        np.testing.assert_array_equal(
            both, got.astype(np.uint32) | np.roll(got, 1).astype(np.uint32) << 16
        )


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_directed_rounding(sim: ptxsim.Simulator, name: str, mode: str) -> None:
    count = ARITHMETIC[name].__code__.co_argcount
    inputs = float_bits("f32", count, 8 * WARP)
    names = ", ".join(f"%x{i}" for i in range(count))
    got = lanewise(sim, f"{name}.{mode}.f32 %y, {names};", inputs, np.uint32)
    check_rounding(got, inputs, "f32", ARITHMETIC[name], mode)


FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "div.rn.f32": lambda a, b: a / b,
    "rcp.rn.f32": lambda a: np.float32(1) / a,
    "sqrt.rn.f32": np.sqrt,
    "min.f32": np.fmin,
    "max.f32": np.fmax,
    "min.NaN.f32": np.minimum,
    "max.NaN.f32": np.maximum,
    "abs.f32": np.abs,
    "neg.f32": np.negative,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float_function(sim: ptxsim.Simulator, name: str) -> None:
    unary = name.split(".")[0] in {"rcp", "sqrt", "abs", "neg"}
    inputs = float_bits("f32", 1 if unary else 2)
    names = ", ".join(f"%x{i}" for i in range(len(inputs)))
    got = lanewise(sim, f"{name} %y, {names};", inputs, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        want = FUNCTIONS[name](*(x.view(np.float32) for x in inputs))
    np.testing.assert_array_equal(got, want)


def test_flush_and_saturate(sim: ptxsim.Simulator) -> None:
    x = np.resize(np.array([1e-40, -1e-40, 0.25, 7, -3, np.nan, np.inf, 1e-38], np.float32), WARP)
    got = lanewise(sim, "add.ftz.f32 %y, %x0, 0f00000000;", [x.view(np.uint32)], np.float32)
    np.testing.assert_array_equal(got, np.where(np.abs(x) < 1.17549435e-38, 0, x))
    got = lanewise(sim, "add.sat.f32 %y, %x0, 0f00000000;", [x.view(np.uint32)], np.float32)
    np.testing.assert_array_equal(got, np.nan_to_num(np.clip(x, 0, 1), nan=0))


@pytest.mark.parametrize("format_", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_narrowing(sim: ptxsim.Simulator, format_: str, mode: str) -> None:
    (x,) = float_bits("f32", 1, 64 * WARP)
    # Ties and their neighbours, over all exponents of the narrow format and beyond.
    tie = 13 if format_ == "f16" else 16
    low = (1 << (tie - 1)) + np.arange(-1, 2)
    x[:1024] = np.resize((np.arange(1024) << 21) + np.resize(low, 1024), 1024).astype(np.uint32)
    got = lanewise(sim, f"cvt.{mode}.{format_}.f32 %y, %x0;", [x], np.uint16)
    for bits, y in zip(x, decode(got, format_), strict=True):
        value = float(np.uint32(bits).view(np.float32))
        if math.isnan(value):
            assert math.isnan(y)
        elif math.isinf(value):
            assert y == value
        else:
            assert y == round_exactly(Fraction(value), format_, mode)
    if mode == "rn":
        pair = lanewise(sim, f"cvt.rn.{format_}x2.f32 %y, %x0, 0f3F800000;", [x], np.uint32)
        one = 0x3C00 if format_ == "f16" else 0x3F80
        np.testing.assert_array_equal(pair, got.astype(np.uint32) << 16 | one)


def test_widening_of_every_half(sim: ptxsim.Simulator) -> None:
    x = np.arange(1 << 16, dtype=np.uint16)
    got = lanewise(sim, "cvt.f32.f16 %y, %x0;", [x], np.float32)
    np.testing.assert_array_equal(got, x.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("target", ["s32", "u32", "s64", "u8", "s16"])
def test_float_to_integer(sim: ptxsim.Simulator, mode: str, target: str) -> None:
    (x,) = float_bits("f32", 1)
    x[:8] = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -128.5, 65535.5], np.float32).view(
        np.uint32
    )
    bits = int(target[1:])
    got = lanewise(sim, f"cvt.{mode}.{target}.f32 %y, %x0;", [x], f"u{max(bits, 16) // 8}")
    low, high = (
        (-(1 << bits - 1), (1 << bits - 1) - 1) if target[0] == "s" else (0, (1 << bits) - 1)
    )
    rounding = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]
    for value, y in zip(x.view(np.float32).tolist(), got.tolist(), strict=True):
        if math.isnan(value):
            want = 0
        else:
            want = low if value < low else high if value > high else rounding(value)
        assert y & ((1 << bits) - 1) == min(max(want, low), high) & ((1 << bits) - 1)


CONVERSIONS: dict[str, tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = {
    "cvt.rn.f32.s32": ("u4", "f4", lambda x: x.view("i4").astype("f4")),
    "cvt.rn.f32.u32": ("u4", "f4", lambda x: x.astype("f4")),
    "cvt.rn.f32.u64": ("u8", "f4", lambda x: x.astype("f4")),
    "cvt.rn.f64.s64": ("u8", "f8", lambda x: x.view("i8").astype("f8")),
    "cvt.rn.f32.u16": ("u2", "f4", lambda x: x.astype("f4")),
    "cvt.s64.s32": ("u4", "u8", lambda x: x.view("i4").astype("i8").view("u8")),
    "cvt.u64.u32": ("u4", "u8", lambda x: x.astype("u8")),
    "cvt.u32.u64": ("u8", "u4", lambda x: x.astype("u4")),
    "cvt.s32.s8": ("u4", "u4", lambda x: x.astype("u1").view("i1").astype("i4").view("u4")),
    "cvt.u32.u8": ("u4", "u4", lambda x: x & np.uint32(255)),
    "cvt.s32.s16": ("u2", "u4", lambda x: x.view("i2").astype("i4").view("u4")),
    "cvt.u16.u32": ("u4", "u2", lambda x: x.astype("u2")),
    "cvt.sat.u8.s32": ("u4", "u2", lambda x: np.clip(x.view("i4"), 0, 255).astype("u2")),
    "cvt.f64.f32": ("u4", "f8", lambda x: x.view("f4").astype("f8")),
    "cvt.rn.f32.f64": ("u8", "f4", lambda x: x.view("f8").astype("f4")),
    "cvt.rn.f16.f64": ("u8", "f2", lambda x: x.view("f8").astype("f2")),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion(sim: ptxsim.Simulator, name: str) -> None:
    source, target, oracle = CONVERSIONS[name]
    (x,) = operands(8 * int(source[1]), 1)
    with np.errstate(all="ignore"):
        want = oracle(x)
    np.testing.assert_array_equal(lanewise(sim, f"{name} %y, %x0;", [x], target), want)


def test_packing(sim: ptxsim.Simulator) -> None:
    a, b = operands(32, 2)
    got = lanewise(sim, "mov.b64 %y, {%x0, %x1};", [a, b], np.uint64)
    np.testing.assert_array_equal(got, a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))
    got = lanewise(sim, "mov.b32 {%h0, %h1}, %x0; mov.b32 %y, {%h1, %h0};", [a], np.uint32)
    np.testing.assert_array_equal(got, a >> 16 | a << 16)


# ---- What the lanes of a warp do together


def test_shuffle(sim: ptxsim.Simulator) -> None:
    lane = np.arange(WARP)
    modes = {
        "up": lambda j, k, low, high: (j - k, j - k >= low),
        "down": lambda j, k, low, high: (j + k, j + k <= high),
        "bfly": lambda j, k, low, high: (j ^ k, j ^ k <= high),
        "idx": lambda j, k, low, high: (low + k % (high - low + 1), True),
    }
    for mode, source in modes.items():
        for width in (32, 8):
            clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
            for k in (0, 1, 3, 5):
                out, valid = np.zeros(WARP, np.uint32), np.zeros(WARP, np.uint32)
                run(
                    sim,
                    f"""shfl.sync.{mode}.b32 %r1|%p0, %t, {k}, {clamp}, 0xffffffff;
                    selp.b32 %r2, 1, 0, %p0;
                    add.s64 %d0, %a0, %o; st.global.u32 [%d0], %r1;
                    add.s64 %d0, %a1, %o; st.global.u32 [%d0], %r2;""",
                    out,
                    valid,
                )
                for j in lane.tolist():
                    low = j // width * width
                    want, ok = source(j, k, low, low + width - 1)
                    assert (out[j], valid[j]) == (want if ok else j, ok), (mode, width, k, j)


def store(register: str, array: int = 0) -> str:
    return f"add.s64 %d0, %a{array}, %o; st.global.u32 [%d0], {register};"


def test_votes_and_reductions(sim: ptxsim.Simulator) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, WARP, dtype=np.uint32)
    x[3] = x[7]
    i = x.view(np.int32)
    u8_ballot = int(sum(int(v & 1) << k for k, v in enumerate(x)))
    cases: dict[str, Any] = {
        "redux.sync.add.u32 %r2, %r1, -1;": int(x.sum(dtype=np.uint64)) % 2**32,
        "redux.sync.min.s32 %r2, %r1, -1;": int(i.min()) % 2**32,
        "redux.sync.max.u32 %r2, %r1, -1;": int(x.max()),
        "redux.sync.xor.b32 %r2, %r1, -1;": int(np.bitwise_xor.reduce(x)),
        "vote.sync.ballot.b32 %r2, %p0, -1;": u8_ballot,
        "vote.sync.any.pred %p1, %p0, -1; selp.b32 %r2, 1, 0, %p1;": 1,
        "vote.sync.all.pred %p1, %p0, -1; selp.b32 %r2, 1, 0, %p1;": 0,
        "vote.sync.uni.pred %p1, %p0, -1; selp.b32 %r2, 1, 0, %p1;": 0,
        "activemask.b32 %r2;": 2**32 - 1,
        "match.any.sync.b32 %r2, %r1, -1;": [1 << k if k not in (3, 7) else 136 for k in range(32)],
        "mov.u32 %r2, %lanemask_lt;": [(1 << k) - 1 for k in range(32)],
    }
    for code, want in cases.items():
        out = np.zeros(WARP, np.uint32)
        head = """add.s64 %d0, %a0, %o; ld.global.u32 %r1, [%d0];
        and.b32 %r3, %r1, 1; setp.eq.u32 %p0, %r3, 1;"""
        run(sim, head + code + store("%r2", 1), x, out)
        assert out.tolist() == (want if isinstance(want, list) else [want] * WARP), code


MMA = [
    ("f16", 16), ("f16", 8), ("bf16", 16), ("bf16", 8), ("tf32", 8), ("tf32", 4),
]  # fmt: skip


def to_bits(x: np.ndarray, format_: str) -> np.ndarray:
    """Small integers in a format, exactly."""
    if format_ == "f16":
        return x.astype(np.float16).view(np.uint16).astype(np.uint32)
    return x.astype(np.float32).view(np.uint32) >> np.uint32(16 if format_ == "bf16" else 0)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(("format_", "depth"), MMA)
def test_mma(sim: ptxsim.Simulator, format_: str, depth: int, identity: bool) -> None:
    """Fragments laid out by hand as the PTX ISA's figures have them."""
    rng = np.random.default_rng(0)
    a = np.eye(16, depth) if identity else rng.integers(-8, 9, (16, depth)).astype(float)
    b, c = (
        rng.integers(-8, 9, (depth, 8)).astype(float),
        rng.integers(-99, 99, (16, 8)).astype(float),
    )
    per = 1 if format_ == "tf32" else 2  # elements in a register
    na, nb = 16 * depth // 32 // per, 8 * depth // 32 // per
    pa, pb = np.zeros((na, WARP), np.uint32), np.zeros((nb, WARP), np.uint32)
    pc, out = np.zeros((4, WARP), np.float32), np.zeros((4, WARP), np.float32)
    row_c = [
        (lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2) for r in range(4) for lane in range(32)
    ]
    for lane in range(WARP):
        g, t = lane // 4, lane % 4
        for r in range(na):
            for e in range(per):
                column = t * per + e + (4 * per) * (r // 2)
                pa[r, lane] |= to_bits(a[g + 8 * (r % 2), column], format_) << np.uint32(16 * e)
        for r in range(nb):
            for e in range(per):
                pb[r, lane] |= to_bits(b[t * per + e + 4 * per * r, g], format_) << np.uint32(
                    16 * e
                )
    for k, (row, column) in enumerate(row_c):
        pc[k // 32, k % 32] = c[row, column]
    code, registers = "", 0
    for array, count in enumerate((na, nb, 4)):
        code += f"add.s64 %d0, %a{array}, %o;"
        for r in range(count):
            code += f"ld.global.b32 %r{registers}, [%d0+{128 * r}];"
            registers += 1
    names = [f"%r{k}" for k in range(registers)]
    braces = [names[:na], names[na : na + nb], names[na + nb :]]
    operand = ", ".join("{" + ", ".join(group) + "}" for group in braces)
    code += f"""mma.sync.aligned.m16n8k{depth}.row.col.f32.{format_}.{format_}.f32
        {{%r30, %r31, %r32, %r33}}, {operand}; add.s64 %d0, %a3, %o;"""
    code += "".join(f"st.global.b32 [%d0+{128 * r}], %r{30 + r};" for r in range(4))
    counters = run(sim, code, pa, pb, pc, out)
    want = a @ b + c
    assert [out[k // 32, k % 32] for k in range(128)] == [want[place] for place in row_c]
    assert (counters["mma"], counters["mma_flops"]) == (1, 2 * 16 * 8 * depth)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(sim: ptxsim.Simulator, count: int, transposed: bool) -> None:
    values = np.arange(4 * 64, dtype=np.uint16)  # four matrices of 8 rows of 16 bytes
    out = np.zeros((count, WARP), np.uint32)
    registers = ", ".join(f"%r{k}" for k in range(count))
    code = f"""mul.lo.u32 %r8, %t, 16; cvt.u64.u32 %d1, %r8; add.s64 %d0, %a0, %d1;
    ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d0];
    mov.u32 %r9, buffer; add.u32 %r9, %r9, %r8;
    st.shared.v4.u32 [%r9], {{%r10, %r11, %r12, %r13}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16
        {{{registers}}}, [%r9];
    add.s64 %d0, %a1, %o;"""
    code += "".join(f"st.global.u32 [%d0+{128 * k}], %r{k};" for k in range(count))
    counters = run(sim, code, values, out, module=".shared .align 16 .b8 buffer[512];")
    for q in range(count):
        matrix = values[64 * q : 64 * q + 64].reshape(8, 8)
        matrix = matrix.T if transposed else matrix
        pairs = matrix.reshape(32, 2).astype(np.uint32)
        np.testing.assert_array_equal(out[q], pairs[:, 0] | pairs[:, 1] << 16)
    assert counters["ldmatrix_wavefronts"] == counters["ldmatrix_wavefronts_ideal"] == count


# ---- Control


def test_divergent_loop_reconverges(sim: ptxsim.Simulator) -> None:
    out = np.zeros(2 * WARP, np.uint32)
    code = f"""mov.u32 %r1, 0; mov.u32 %r2, 0;
    loop: add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1;
    setp.le.u32 %p0, %r2, %t; @%p0 bra loop;
    shfl.sync.bfly.b32 %r3, %r1, 1, 31, 0xffffffff;
    {store("%r3")}"""
    run(sim, code, out, block=2 * WARP)
    assert out.tolist() == [(j ^ 1) * ((j ^ 1) + 1) // 2 for j in range(2 * WARP)]


def test_lanes_wait_for_others_behind_them(sim: ptxsim.Simulator) -> None:
    """A shuffle that half of the lanes reach by way of code that lies behind it."""
    out = np.zeros(WARP, np.uint32)
    code = f"""mov.u32 %r1, %t; setp.gt.u32 %p0, %t, 15; @%p0 bra cold;
    join: shfl.sync.down.b32 %r2, %r1, 16, 31, 0xffffffff;
    {store("%r2")} bra done;
    cold: add.u32 %r1, %r1, 100; bra join;
    done:"""
    run(sim, code, out)
    assert out.tolist() == [j + 116 for j in range(16)] + [j + 100 for j in range(16, 32)]


def test_indexed_branch(sim: ptxsim.Simulator) -> None:
    out = np.zeros(WARP, np.uint32)
    code = f"""and.b32 %r1, %t, 1;
    table: .branchtargets even, odd;
    brx.idx %r1, table;
    even: mov.u32 %r2, 10; bra done;
    odd: mov.u32 %r2, 20;
    done: {store("%r2")}"""
    run(sim, code, out)
    assert out.tolist() == [10, 20] * 16


SHARED = ".extern .shared .align 16 .b8 dynamic[];"
TO_SHARED = "mov.u32 %r9, dynamic; shl.b32 %r8, %t, 2; add.u32 %r7, %r9, %r8;"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_barrier_orders_warps(sim: ptxsim.Simulator, seed: int) -> None:
    out = np.zeros(4 * WARP, np.uint32)
    code = f"""{TO_SHARED} st.shared.u32 [%r7], %t; bar.sync 0;
    xor.b32 %r6, %r8, 256; add.u32 %r6, %r9, %r6; ld.shared.u32 %r5, [%r6]; {store("%r5")}"""
    with sim.options(seed=seed, quantum=1 if seed else 1000):
        counters = run(sim, code, out, block=4 * WARP, shared=512, module=SHARED)
    assert out.tolist() == [j ^ 64 for j in range(4 * WARP)]
    assert counters["barriers"] == 1


def test_named_barriers_pair_warps(sim: ptxsim.Simulator) -> None:
    """Warps 0 and 1 meet at barrier 1, warps 2 and 3 at 2; a pair says nothing about the other."""
    code = f"""{TO_SHARED} st.shared.u32 [%r7], %t; bar.sync 0; st.shared.u32 [%r7], %t;
    shr.u32 %r1, %t, 6; add.u32 %r2, %r1, 1; bar.sync %r2, 64;
    xor.b32 %r6, %r8, MASK; add.u32 %r6, %r9, %r6; ld.shared.u32 %r5, [%r6]; {store("%r5")}"""
    out = np.zeros(4 * WARP, np.uint32)
    run(sim, code.replace("MASK", "128"), out, block=128, shared=512, module=SHARED)
    assert out.tolist() == [j ^ 32 for j in range(128)]
    with pytest.raises(ptxsim.SimulationError, match="race: warp"):
        run(sim, code.replace("MASK", "256"), out, block=128, shared=512, module=SHARED)


def test_exited_warps_are_not_waited_for(sim: ptxsim.Simulator) -> None:
    out = np.zeros(WARP, np.uint32)
    code = f"setp.gt.u32 %p0, %t, 31; @%p0 exit; bar.sync 0; {store('%t')}"
    run(sim, code, out, block=3 * WARP)
    assert out.tolist() == list(range(WARP))


def test_atomics(sim: ptxsim.Simulator) -> None:
    sums, old = np.zeros(2, np.float32), np.zeros(4 * WARP, np.uint32)
    code = f"""mov.u32 %r9, dynamic; setp.eq.u32 %p0, %t, 0; @%p0 st.shared.u32 [%r9], 0;
    bar.sync 0; atom.shared.add.u32 %r1, [%r9], 1; bar.sync 0; {store("%r1", 1)}
    red.global.add.f32 [%a0], 0f3F000000; ld.shared.u32 %r2, [%r9]; cvt.rn.f32.u32 %r3, %r2;
    @%p0 st.global.f32 [%a0+4], %r3;"""
    counters = run(sim, code, sums, old, block=128, shared=4, module=SHARED)
    assert sums.tolist() == [64, 128] and sorted(old.tolist()) == list(range(128))
    assert counters["atomics"] == 256


def test_local_constant_and_parameter_memory(sim: ptxsim.Simulator) -> None:
    out = np.zeros(WARP, np.uint32)
    code = f"""mov.u64 %d1, table; and.b32 %r1, %t, 3; mul.wide.u32 %d2, %r1, 4;
    add.s64 %d1, %d1, %d2;
    ld.const.u32 %r2, [%d1]; st.local.u32 [stack+4], %r2; cvta.local.u64 %d3, 0; mov.u32 %r4, stack;
    cvt.u64.u32 %d4, %r4; add.s64 %d3, %d3, %d4; ld.u32 %r3, [%d3+4]; {store("%r3")}"""
    table = ".const .align 4 .u32 table[4] = {7, 8, 9, 0xA};"
    run(sim, ".local .align 8 .b8 stack[16];" + code, out, module=table)
    assert out.tolist() == [7, 8, 9, 10] * 8


# ---- cp.async

COPY = f"""{TO_SHARED} add.s64 %d1, %a0, %o;
cp.async.ca.shared.global [%r7], [%d1], 4; cp.async.commit_group;
cp.async.ca.shared.global [%r7+128], [%d1+128], 4; cp.async.commit_group;"""


def test_copies_land_at_their_wait(sim: ptxsim.Simulator) -> None:
    values, out = np.arange(64, dtype=np.uint32), np.zeros(WARP, np.uint32)
    code = COPY + f"cp.async.wait_group 1; ld.shared.u32 %r1, [%r7]; {store('%r1', 1)}"
    run(sim, code, values, out, shared=256, module=SHARED)
    assert out.tolist() == list(range(32))
    code = COPY + f"cp.async.wait_all; ld.shared.u32 %r1, [%r7+128]; {store('%r1', 1)}"
    run(sim, code, values, out, shared=256, module=SHARED)
    assert out.tolist() == list(range(32, 64))


def test_copies_fill_with_zeros(sim: ptxsim.Simulator) -> None:
    values, out = np.arange(1, 129, dtype=np.uint32), np.zeros(WARP, np.uint32)
    code = f"""{TO_SHARED} shl.b32 %r1, %t, 4; add.u32 %r7, %r9, %r1; cvt.u64.u32 %d1, %r1;
    add.s64 %d1, %a0, %d1; and.b32 %r2, %t, 3; shl.b32 %r2, %r2, 2;
    cp.async.cg.shared.global [%r7], [%d1], 16, %r2; cp.async.wait_all;
    ld.shared.v4.u32 {{%r3, %r4, %r5, %r6}}, [%r7]; add.u32 %r3, %r3, %r4; add.u32 %r3, %r3, %r5;
    add.u32 %r3, %r3, %r6; {store("%r3", 1)}"""
    run(sim, code, values, out, shared=512, module=SHARED)
    assert out.tolist() == [int(values[4 * j : 4 * j + j % 4].sum()) for j in range(32)]


# ---- Errors

STORE_SHARED = f"{TO_SHARED} st.shared.u32 [%r7], %t;"
ERRORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # body, what the message says, how it is run
    "global out of bounds": (
        "add.s64 %d0, %a0, %o; ld.global.u32 %r1, [%d0+4];",
        r"out of bounds: a load of 4 bytes at 0x\w+, lane 31; the nearest region is 0x\w+ \+ 128 "
        r"bytes, 0 bytes past its end; block \(0, 0, 0\), warp 0; PTX line \d+ of k: ld.global",
        {},
    ),
    "global before its start": ("st.global.u32 [%a0+-4], 1;", "4 bytes before its start", {}),
    "null pointer": ("mov.u64 %d1, 0; ld.global.u32 %r1, [%d1];", "out of bounds", {}),
    "global misaligned": ("ld.global.u32 %r1, [%a0+2];", "misaligned: a load of 4 bytes", {}),
    "vector misaligned": ("ld.global.v2.u32 {%r1, %r2}, [%a0+4];", "misaligned: .* 8 bytes", {}),
    "atomic out of bounds": ("red.global.add.u32 [%a0+128], 1;", "out of bounds: an atomic", {}),
    "shared out of bounds": (
        STORE_SHARED,
        r"out of bounds: a store of 4 bytes at shared address 0x7c, lane 31; .* 124 bytes",
        {"shared": 124},
    ),
    "shared misaligned": (f"{TO_SHARED} st.shared.u32 [%r7+2], %t;", "misaligned: a store", {}),
    "local out of bounds": (
        ".local .align 4 .b8 stack[8]; st.local.u32 [stack+8], 1;",
        "out of bounds: a store of 4 bytes at local address 0x8",
        {},
    ),
    "uninitialised register": (
        "add.u32 %r1, %r2, 1; st.global.u32 [%a0], %r1;",
        "uninitialised register: %r1 has no value in lane 0",
        {},
    ),
    "register of some lanes": (
        "setp.lt.u32 %p0, %t, 5; @%p0 mov.u32 %r1, 1; st.global.u32 [%a0], %r1;",
        "uninitialised register: %r1 has no value in lane 5",
        {},
    ),
    "uninitialised guard": ("@%p3 mov.u32 %r1, 1;", "the guard %p3 has no value", {}),
    "uninitialised shared": (
        f"{TO_SHARED} ld.shared.u32 %r1, [%r7];",
        "uninitialised shared memory: a read at 0x0, lane 0",
        {},
    ),
    "race, write after write": (
        f"{TO_SHARED} and.b32 %r6, %r8, 127; add.u32 %r6, %r9, %r6; st.shared.u32 [%r6], %t;",
        "race: a write at shared address 0x0 by warp 1, lane 0, which warp 0 wrote",
        {"block": 64},
    ),
    "race, read after write": (
        STORE_SHARED + "xor.b32 %r6, %r8, 128; add.u32 %r6, %r9, %r6; ld.shared.u32 %r5, [%r6];",
        r"race: warp \d, lane 0 reads shared address 0x\w+, which warp \d wrote",
        {"block": 64, "quantum": 1},
    ),
    "race, write after read": (
        f"""{STORE_SHARED} bar.sync 0; xor.b32 %r6, %r8, 128; add.u32 %r6, %r9, %r6;
        setp.lt.u32 %p0, %t, 32; @!%p0 ld.shared.u32 %r5, [%r6]; @%p0 st.shared.u32 [%r7], %t;""",
        "race: a write at shared address 0x0 by warp 0, lane 0, which warp 1 read",
        {"block": 64},
    ),
    "race of bytes": (
        f"{TO_SHARED} and.b32 %r6, %t, 31; add.u32 %r6, %r9, %r6; st.shared.u8 [%r6], %t;",
        "race: a write at shared address 0x0 by warp 1",
        {"block": 64},
    ),
    "race within an instruction": (
        f"{TO_SHARED} st.shared.u32 [%r9], %t;",
        "race: lane 1 and another lane of warp 0 write different values",
        {},
    ),
    "race with a landed copy": (
        f"""{TO_SHARED} add.s64 %d1, %a0, %o; cp.async.ca.shared.global [%r7], [%d1], 4;
        cp.async.wait_all; xor.b32 %r6, %r8, 128; add.u32 %r6, %r9, %r6;
        ld.shared.u32 %r5, [%r6];""",
        "race: warp 0, lane 0 reads shared address 0x80, which warp 1 wrote",
        {"block": 64, "bytes": 256, "quantum": 1},
    ),
    "read in flight": (
        COPY + "cp.async.wait_group 1; ld.shared.u32 %r1, [%r7+128];",
        "in flight: a read at shared address 0x80, lane 0",
        {"bytes": 256},
    ),
    "write in flight": (
        COPY + "st.shared.u32 [%r7], %t;",
        "in flight: a write at shared address 0x0",
        {"bytes": 256},
    ),
    "copy out of bounds": (COPY, "out of bounds: a cp.async of 4 bytes", {}),
    "deadlock": (
        "setp.gt.u32 %p0, %t, 31; @%p0 bra other; bar.sync 1; bra done; other: bar.sync 2; done:",
        "deadlock: every warp waits at a barrier: warp 0 at barrier 1 .* warp 1 at barrier 2",
        {"block": 64},
    ),
    "endless loop": ("loop: bra loop;", "endless loop", {"budget": 1000}),
    "mma with inactive lanes": (
        """setp.lt.u32 %p0, %t, 16; mov.b32 %r1, 0;
        @%p0 mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32
        {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%r1}, {%r1, %r1, %r1, %r1};""",
        "inactive lanes: lanes 0xffffffff must execute this together, only 0x0000ffff do",
        {},
    ),
    "ldmatrix after an exit": (
        f"""{STORE_SHARED} setp.lt.u32 %p0, %t, 1; @%p0 exit;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%r9];""",
        "inactive lanes: .* only 0xfffffffe do",
        {},
    ),
    "shuffle with inactive lanes": (
        """setp.lt.u32 %p0, %t, 16; @!%p0 bra done;
        shfl.sync.bfly.b32 %r1, %t, 1, 31, 0xffffffff; done:""",
        "inactive lanes",
        {},
    ),
    "barrier of part of a warp": (
        "setp.lt.u32 %p0, %t, 16; @%p0 bar.sync 0; bar.sync 0;",
        "inactive lanes",
        {},
    ),
    "unknown instruction": (
        "frobnicate.b32 %r1, %r2;",
        r"PTX line \d+: unknown instruction: frobnicate.b32 %r1, %r2;",
        {},
    ),
    "unknown variant": ("mul.sat.f16 %r1, %r2, %r3;", "unknown instruction: mul.sat.f16", {}),
    "unknown label": ("bra nowhere;", "no label 'nowhere'", {}),
    "trap": ("trap;", "trap: lane 0", {}),
    "too much shared": ("", "too much shared memory: 999999 bytes", {"shared": 999999}),
    "too many threads": (
        "",
        "a block of 64 threads, but .maxntid is 32",
        {"block": 64, "limit": 1},
    ),
    "no threads": ("", r"invalid block \(0, 1, 1\)", {"block": 0}),
    "empty grid": ("", r"invalid grid \(0, 1, 1\)", {"grid": 0}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(sim: ptxsim.Simulator, name: str) -> None:
    body, message, how = ERRORS[name]
    memory = np.zeros(how.get("bytes", 128) // 4, np.uint32)
    options = {key: how[key] for key in ("quantum", "budget") if key in how}
    with sim.options(**options), pytest.raises(ptxsim.SimulationError, match=message):
        run(
            sim,
            body,
            memory,
            block=how.get("block", WARP),
            grid=how.get("grid", 1),
            shared=how.get("shared", 512),
            module=SHARED,
            directives=".maxntid 32, 1, 1" if "limit" in how else "",
        )


def test_wrong_parameters(sim: ptxsim.Simulator) -> None:
    sim.load(entry("", 2))
    with pytest.raises(ptxsim.SimulationError, match="2 parameters, got 1"):
        sim.launch("k", (1, 1, 1), (32, 1, 1), [None])
    with pytest.raises(ptxsim.SimulationError, match="expected 16 bytes, got 8"):
        sim.launch_packed("k", (1, 1, 1), (32, 1, 1), bytes(8), 0)
    with pytest.raises(ptxsim.SimulationError, match="no kernel 'nothing'"):
        sim.launch("nothing", (1, 1, 1), (32, 1, 1), [])


def test_races_can_be_counted(sim: ptxsim.Simulator) -> None:
    with sim.options(races=2):
        counters = run(sim, ERRORS["race, write after write"][0], np.zeros(1, np.uint32),
                       block=64, shared=512, module=SHARED)  # fmt: skip
    assert counters["races"] == 32


def test_other_kernels_of_a_module_stay_usable(sim: ptxsim.Simulator) -> None:
    good = entry("")
    sim.load(good + good.replace(HEADER, "").replace(" k(", " bad(").replace("ret;", "nonsense;"))
    sim.launch("k", (1, 1, 1), (32, 1, 1), [None])
    with pytest.raises(ptxsim.SimulationError, match="unknown instruction: nonsense;"):
        sim.launch("bad", (1, 1, 1), (32, 1, 1), [None])


def test_what_is_chosen_needs_a_value_what_is_not_does_not(sim: ptxsim.Simulator) -> None:
    """Compilers turn a value that only some paths set into a selection, and copy it before."""
    out = np.zeros(WARP, np.uint32)
    code = f"""mov.u32 %r2, %r1; setp.lt.u32 %p0, %t, 40; selp.b32 %r3, %t, %r2, %p0;
    setp.gt.u32 %p1, %r1, 3; and.pred %p2, %p1, !%p0; @%p2 bra skip; {store("%r3")} skip:"""
    run(sim, code, out)
    assert out.tolist() == list(range(WARP))


# ---- Counters


@pytest.mark.parametrize(
    ("stride", "bytes_", "wavefronts", "ideal"),
    [(4, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (0, 4, 1, 1), (132, 4, 1, 1),
     (8, 8, 2, 2), (16, 8, 4, 2), (16, 16, 4, 4), (128, 16, 32, 4), (144, 16, 4, 4)],
)  # fmt: skip
def test_bank_conflicts(
    sim: ptxsim.Simulator, stride: int, bytes_: int, wavefronts: int, ideal: int
) -> None:
    vector, registers = {
        4: ("", "%r1"),
        8: (".v2", "{%r1, %r2}"),
        16: (".v4", "{%r1, %r2, %r3, %r4}"),
    }[bytes_]
    zero = registers.replace("%r1", "0").replace("%r2", "0").replace("%r3", "0").replace("%r4", "0")
    code = f"""mov.u32 %r9, dynamic; mul.lo.u32 %r8, %t, {stride}; add.u32 %r7, %r9, %r8;
    st.shared{vector}.u32 [%r7], {zero}; ld.shared{vector}.u32 {registers}, [%r7];"""
    counters = run(sim, code, np.zeros(1), shared=31 * stride + bytes_, module=SHARED)
    assert (counters["shared_loads"], counters["shared_stores"]) == (1, 1)
    assert counters["shared_wavefronts"] == 2 * wavefronts
    assert counters["shared_wavefronts_ideal"] == 2 * ideal


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1), (-4, 4)])
def test_sectors(sim: ptxsim.Simulator, stride: int, sectors: int) -> None:
    storage = np.zeros(2048, np.uint8)
    start = -storage.ctypes.data % 32
    array = storage[start : start + 1024]
    base = 124 if stride < 0 else 0
    code = f"""mul.wide.s32 %d1, %t, {stride}; add.s64 %d1, %a0, %d1;
    ld.global.u32 %r1, [%d1+{base}]; st.global.u32 [%d1+{base}], %r1;"""
    counters = run(sim, code, array)
    assert counters["global_loads"] == counters["global_stores"] == 1
    assert counters["global_load_bytes"] == 128
    for name in ("global_load_sectors", "global_store_sectors", "dram_read_sectors",
                 "dram_write_sectors"):  # fmt: skip
        assert counters[name] == sectors, name


def test_instruction_classes(sim: ptxsim.Simulator) -> None:
    code = """lop3.b32 %r1, %t, %t, %t, 0x96; prmt.b32 %r2, %r1, %r1, 0x3210;
    add.f32 %r3, %r1, %r1; fma.rn.f16x2 %r4, %r1, %r1, %r1; cvt.rn.f32.u32 %r5, %t;
    bar.sync 0; shfl.sync.idx.b32 %r6, %t, 0, 31, -1;"""
    counters = run(sim, code, np.zeros(1), grid=3)
    for name in ("lop3", "prmt", "fp32", "half", "convert"):
        assert counters[f"class_{name}"] == 3
    assert counters["barriers"] == counters["shuffles"] == 3
    assert counters["warp_instructions"] == 3 * 11


# ---- The CUDA runtime

PROGRAM = """
#include <cuda_runtime.h>
__constant__ float scale = 2;
__global__ void __launch_bounds__(128) add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + scale * b[i];
}
__global__ void reverse(int* x) {
  extern __shared__ int s[];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
extern "C" {
int vector_add(const float* a, const float* b, float* c, int n, int threads) {
  add<<<(n + threads - 1) / threads, threads>>>(a, b, c, n);
  return cudaGetLastError();
}
int reverse_some(const int* from, int* to, int n, int shared, int opt_in) {
  int* device;
  if (cudaMalloc(&device, n * sizeof(int))) return -1;
  cudaMemcpy(device, from, n * sizeof(int), cudaMemcpyHostToDevice);
  if (opt_in >= 0) {
    int error = cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in);
    if (error) { cudaFree(device); cudaGetLastError(); return 1000 + error; }
  }
  reverse<<<1, n, shared>>>(device);
  int error = cudaGetLastError();
  cudaMemcpy(to, device, n * sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(device);
  return error;
}
int set_scale(float value) { return cudaMemcpyToSymbol(scale, &value, sizeof value); }
int device(char* name, int* sms) {
  cudaDeviceProp properties;
  int error = cudaGetDeviceProperties(&properties, 0);
  for (int i = 0; i < 64; ++i) name[i] = properties.name[i];
  return error ? error : cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, 0);
}
const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
"""


@pytest.fixture(scope="module")
def program(sim: ptxsim.Simulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with kernels and the code that launches them, on the runtime here."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: host code with launches cannot be compiled")
    built = ptxsim.build().parent
    if not (built / "libptxsim_cudart.a").exists():
        pytest.skip("CMake found no CUDA toolkit: the runtime on the interpreter was not built")
    path = tmp_path_factory.mktemp("program")
    (path / "program.cu").write_text(PROGRAM)
    for command in (
        f"{nvcc} -std=c++17 -gencode arch=compute_80,code=compute_80 --compress-mode=none "
        "-Xcompiler -fPIC -c program.cu -o program.o",
        f"c++ -shared program.o -o libprogram.so {built}/libptxsim_cudart.a {built}/libptxsim.a "
        "-Wl,--undefined=ptxsim_load -Wl,-z,defs",
    ):
        done = subprocess.run(command.split(), cwd=path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return path / "libprogram.so"


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def test_cuda_runtime(program: Path) -> None:
    library, runtime = ctypes.CDLL(str(program)), ptxsim.Simulator(program)
    library.message.restype = ctypes.c_char_p
    a, b = np.arange(1000, dtype=np.float32), np.ones(1000, np.float32)
    c = np.zeros(1000, np.float32)
    arguments = (pointer(a), pointer(b), pointer(c), 1000, 128)
    with runtime.regions(a, b, c):
        assert library.vector_add(*arguments) == 0
        np.testing.assert_array_equal(c, a + 2)
        assert library.set_scale(ctypes.c_float(3)) == 0
        assert library.vector_add(*arguments) == 0
        np.testing.assert_array_equal(c, a + 3)
        assert [(e["grid"], e["block"]) for e in runtime.log()] == [([8, 1, 1], [128, 1, 1])] * 2
        # More threads than __launch_bounds__, than any device has; none.
        assert library.vector_add(*arguments[:4], 256) == 1
        assert library.vector_add(*arguments[:4], 2048) == 9
        assert library.vector_add(*arguments[:3], 0, 128) == 9
    with runtime.regions(a, b, c[:900]):
        error = library.vector_add(*arguments)
    message = library.message(error).decode()
    assert error == 719
    assert message.startswith("unspecified launch failure: out of bounds: a store of 4 bytes")
    assert "block (7, 0, 0), warp 0" in message and "st.global.f32" in message


def test_cuda_runtime_limits_of_shared_memory(program: Path) -> None:
    library, runtime = ctypes.CDLL(str(program)), ptxsim.Simulator(program)
    x, y = np.arange(256, dtype=np.int32), np.zeros(256, np.int32)

    def reverse(shared: int, opt_in: int) -> int:
        result: int = library.reverse_some(pointer(x), pointer(y), 256, shared, opt_in)
        return result

    assert reverse(1024, -1) == 0
    np.testing.assert_array_equal(y, x[::-1])
    assert reverse(512, -1) == 719  # too little for the kernel
    assert reverse(64 * 1024, -1) == 1  # not asked for
    assert reverse(64 * 1024, 64 * 1024) == 0
    assert reverse(1024, 200 * 1024) == 1001
    with runtime.options(max_dynamic_shared=32 * 1024):
        assert reverse(1024, 48 * 1024) == 1001


def test_cuda_runtime_device(program: Path) -> None:
    library, runtime = ctypes.CDLL(str(program)), ptxsim.Simulator(program)
    name, sms = ctypes.create_string_buffer(64), ctypes.c_int()
    with runtime.options(sms=7):
        assert library.device(name, ctypes.byref(sms)) == 0
    assert (name.value, sms.value) == (b"ptxsim (emulated sm_80)", 7)

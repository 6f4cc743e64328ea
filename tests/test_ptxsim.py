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
    count = 4 if name == "bfi.b32" else oracle.__code__.co_argcount if _plain(oracle) else _ARITY[name]
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
        x[: n // 2] = near.astype(np.uint64) | (rng.integers(0, 2, n // 2).astype(np.uint64) << (bits - 1))
        x[n // 4 : n // 4 + 128] = rng.integers(0, 1 << precision, 128)  # small
        x[-256:] = np.resize(np.repeat(special, len(special) ** i % 255 or 1), 256)
        result.append(x.astype(f"u{bits // 8}"))
    return result


def check_rounding(
    got: np.ndarray, inputs: list[np.ndarray], format_: str, oracle: Callable[..., Fraction], mode: str
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
        np.testing.assert_array_equal(both, got.astype(np.uint32) | np.roll(got, 1).astype(np.uint32) << 16)


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
    x[:8] = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -128.5, 65535.5], np.float32).view(np.uint32)
    bits = int(target[1:])
    got = lanewise(sim, f"cvt.{mode}.{target}.f32 %y, %x0;", [x], f"u{max(bits, 16) // 8}")
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if target[0] == "s" else (0, (1 << bits) - 1)
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

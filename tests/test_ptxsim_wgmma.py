"""wgmma in the PTX interpreter: operands laid out as the PTX ISA says, and every error it knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ptxsim
from test_ptxsim import sim, to_bits

__all__ = ["sim"]  # the fixture

WARP, GROUP = 32, 128
ROWS, DEPTH = 64, 16
SHARED_BYTES = 40960
# What the descriptor's last two bits mean: bytes of a row of a permuted tile.
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}

# ---- Layouts: where element (line, k) of an operand lies; lines are rows of A, columns of B.


def permuted(address: np.ndarray, width: int) -> np.ndarray:
    """Chunks of 16 bytes within tiles of 8 rows of `width` bytes, by the row of 128 bytes."""
    return address ^ (address // 128 % 8 & (width // 16 - 1)) * 16


def k_major(line: np.ndarray, k: np.ndarray, width: int, leading: int, stride: int) -> np.ndarray:
    """8 lines are a tile; its rows have 16 bytes, or `width` of a longer depth, permuted."""
    if width == 16:
        return line % 8 * 16 + line // 8 * stride + k // 8 * leading + k % 8 * 2
    return permuted(line % 8 * width + line // 8 * stride + k * 2, width)


def line_major(
    line: np.ndarray, k: np.ndarray, width: int, leading: int, stride: int
) -> np.ndarray:
    """8 depths are a tile, whose rows have width / 2 lines."""
    if width == 16:
        return line // 8 * stride + k // 8 * leading + k % 8 * 16 + line % 8 * 2
    lines = width // 2
    along = line // lines * leading + line % lines * 2
    return permuted(along + k % 8 * width + k // 8 * stride, width)


def place(
    matrix: np.ndarray, swizzle: int, transposed: bool, base: int, memory: np.ndarray
) -> tuple[int, int, int]:
    """Writes the bits of matrix[line, k] to memory; base, leading and stride bytes."""
    lines, width = len(matrix), SWIZZLES[swizzle]
    if not transposed:
        leading, stride = (lines * 16, 128) if width == 16 else (16, width * 8)
    elif width == 16:
        leading, stride = 128, 256
    else:
        leading, stride = width * 16, width * 8  # two tiles of 8 depths each
    line, k = np.indices(matrix.shape)
    layout = line_major if transposed else k_major
    at = base + layout(line, k, width, leading, stride)
    assert len(np.unique(at)) == at.size
    memory[at // 2] = matrix
    return base, leading, stride


def descriptor(base: int, leading: int, stride: int, swizzle: int) -> int:
    return base >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62


# ---- Programs: four warps copy an image to shared memory, load A, multiply, store D.


def registers(prefix: str, first: int, count: int) -> str:
    return "{" + ", ".join(f"%{prefix}{first + k}" for k in range(count)) + "}"


def program(body: str, columns: int = 8) -> str:
    """%a0: image of shared memory, %a1: A as fragments, %a2: D; %r0..3 hold A, %f0.. D = 0."""
    return f""".version 8.0
.target sm_90a
.address_size 64
.shared .align 1024 .b8 memory[{SHARED_BYTES}];
.visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2)
{{
.reg .pred %p<4>; .reg .b32 %r<40>; .reg .f32 %f<{max(columns, 64)}>; .reg .b64 %d<8>;
.reg .b64 %a<4>; .reg .b32 %t;
ld.param.u64 %a0, [p0]; ld.param.u64 %a1, [p1]; ld.param.u64 %a2, [p2];
mov.u32 %t, %tid.x;
mov.u32 %r20, memory;
setp.eq.u32 %p1, 0, 0;
{body}
ret;
}}"""


COPY_IMAGE = f"""
mov.u32 %r21, %t;
copy: mul.wide.u32 %d0, %r21, 16; add.s64 %d0, %a0, %d0;
ld.global.v4.u32 {{%r22, %r23, %r24, %r25}}, [%d0];
shl.b32 %r26, %r21, 4; add.u32 %r26, %r20, %r26;
st.shared.v4.u32 [%r26], {{%r22, %r23, %r24, %r25}};
add.u32 %r21, %r21, {GROUP}; setp.lt.u32 %p0, %r21, {SHARED_BYTES // 16}; @%p0 bra copy;
"""
PUBLISH = "fence.proxy.async.shared::cta; bar.sync 0;"
LOAD_A = """
mul.wide.u32 %d0, %t, 16; add.s64 %d0, %a1, %d0;
ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%d0];
"""


def zero(columns: int) -> str:
    return "".join(f"mov.f32 %f{k}, 0f00000000;" for k in range(columns // 2))


def product(
    b: int,
    columns: int = 8,
    *,
    format_: str = "f16",
    a: str = "{%r0, %r1, %r2, %r3}",
    d: int = 0,
    scale: str = "%p1",
    modes: str = "1, 1, 0",
) -> str:
    return (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{format_}.{format_} "
        f"{registers('f', d, columns // 2)}, {a}, {b}, {scale}, {modes};"
    )


FENCE = "wgmma.fence.sync.aligned;"
COMMIT = "wgmma.commit_group.sync.aligned;"


def wait(pending: int = 0) -> str:
    return f"wgmma.wait_group.sync.aligned {pending};"


def store(columns: int = 8) -> str:
    lines = [f"mul.wide.u32 %d0, %t, {columns * 2}; add.s64 %d0, %a2, %d0;"]
    lines += [f"st.global.f32 [%d0+{4 * k}], %f{k};" for k in range(columns // 2)]
    return "\n".join(lines)


def run(
    sim: ptxsim.Simulator,
    body: str,
    memory: np.ndarray | None = None,
    a: np.ndarray | None = None,
    columns: int = 8,
    threads: int = GROUP,
) -> tuple[np.ndarray, dict[str, int]]:
    """D as [64, columns], and the counters."""
    image = np.zeros(SHARED_BYTES // 2, np.uint16) if memory is None else memory
    fragments = np.zeros((GROUP, 4), np.uint32) if a is None else a
    out = np.full((GROUP, columns // 2), np.nan, np.float32)
    sim.load(program(body, columns))
    sim.clear_log()
    sim.launch("k", (1, 1, 1), (threads, 1, 1), [image, fragments, out])
    d = np.empty((ROWS, columns), np.float32)
    thread, r = np.indices(out.shape)
    row = thread // WARP * 16 + thread % WARP // 4 + 8 * (r // 2 % 2)
    d[row, r // 4 * 8 + thread % 4 * 2 + r % 2] = out
    return d, sim.log()[0]["counters"]


def fragments_of(a: np.ndarray, format_: str) -> np.ndarray:
    """A [64, 16] in registers: each warp has 16 rows, as in mma.m16n8k16."""
    bits = to_bits(a, format_)
    thread, r = np.indices((GROUP, 4))
    row = thread // WARP * 16 + thread % WARP // 4 + 8 * (r % 2)
    column = thread % 4 * 2 + 8 * (r // 2)
    return (bits[row, column] | bits[row, column + 1] << np.uint32(16)).astype(np.uint32)


def integers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(float)


@pytest.mark.parametrize("format_", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("columns", "swizzle", "transposed"),
    [
        (columns, swizzle, transposed)
        for columns in (8, 64, 128, 256)
        for swizzle, width in SWIZZLES.items()
        for transposed in (False, True)
        if not transposed or columns % (width // 2) == 0  # whole tiles
    ],
)
def test_layouts(
    sim: ptxsim.Simulator, columns: int, swizzle: int, transposed: bool, format_: str
) -> None:
    a, b = integers(0, ROWS, DEPTH), integers(1, columns, DEPTH)
    memory = np.full(SHARED_BYTES // 2, 0x7FFF, np.uint16)  # NaN
    at = place(to_bits(b, format_), swizzle, transposed, 2048, memory)
    call = product(
        descriptor(*at, swizzle), columns, format_=format_, modes=f"1, 1, {int(transposed)}"
    )
    body = COPY_IMAGE + PUBLISH + LOAD_A + zero(columns) + FENCE + call + COMMIT + wait()
    d, counters = run(sim, body + store(columns), memory, fragments_of(a, format_), columns)
    np.testing.assert_array_equal(d, a @ b.T)
    assert counters["wgmma"] == 4
    assert counters["mma_flops"] == 2 * ROWS * columns * DEPTH


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_left_operand_in_shared_memory(
    sim: ptxsim.Simulator, swizzle: int, transposed: bool
) -> None:
    a, b = integers(0, ROWS, DEPTH), integers(1, 8, DEPTH)
    memory = np.full(SHARED_BYTES // 2, 0x7FFF, np.uint16)
    at_a = place(to_bits(a, "f16"), swizzle, transposed, 4096, memory)
    at_b = place(to_bits(b, "f16"), 1, False, 1024, memory)
    call = product(
        descriptor(*at_b, 1), a=str(descriptor(*at_a, swizzle)), modes=f"1, 1, {int(transposed)}, 0"
    )
    d, _ = run(
        sim, COPY_IMAGE + PUBLISH + zero(8) + FENCE + call + COMMIT + wait() + store(), memory
    )
    np.testing.assert_array_equal(d, a @ b.T)


def test_depth_within_a_permuted_tile(sim: ptxsim.Simulator) -> None:
    """Rows of 128 bytes hold four times 16 columns, 32 bytes apart in the descriptor."""
    a, b = integers(0, ROWS, DEPTH), integers(1, 8, 64)
    memory = np.zeros(SHARED_BYTES // 2, np.uint16)
    base, leading, stride = place(to_bits(b, "f16"), 1, False, 1024, memory)
    calls = [product(descriptor(base + 32 * q, leading, stride, 1)) for q in range(4)]
    body = COPY_IMAGE + PUBLISH + LOAD_A + zero(8) + FENCE + "".join(calls) + COMMIT + wait()
    d, _ = run(sim, body + store(), memory, fragments_of(a, "f16"))
    np.testing.assert_array_equal(d, a @ b.reshape(8, 4, DEPTH).sum(axis=1).T)


B = 1024
PLACED = descriptor(B, 16, 1024, 1)


@pytest.fixture(scope="module")
def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A, B and how a program takes them."""
    a, b = integers(2, ROWS, DEPTH), integers(3, 8, DEPTH)
    memory = np.zeros(SHARED_BYTES // 2, np.uint16)
    place(to_bits(b, "f16"), 1, False, B, memory)
    return a, b, memory, fragments_of(a, "f16")


READY = COPY_IMAGE + PUBLISH + LOAD_A + zero(8)


@pytest.mark.parametrize(
    ("calls", "factor"),
    [
        (product(PLACED, modes="-1, 1, 0"), -1),
        (product(PLACED, modes="-1, -1, 0"), 1),
        (product(PLACED) * 3, 3),
        ("setp.ne.u32 %p1, 0, 0;" + product(PLACED) * 2, 1),  # without what was there
        (product(PLACED) + COMMIT + wait(1) + product(PLACED), 2),
    ],
)
def test_signs_and_accumulators(
    sim: ptxsim.Simulator, operands: Any, calls: str, factor: int
) -> None:
    a, b, memory, fragments = operands
    body = READY + FENCE + calls + COMMIT + wait() + store()
    d, _ = run(sim, body, memory, fragments)
    np.testing.assert_array_equal(d, factor * (a @ b.T))


def test_groups_end_in_order(sim: ptxsim.Simulator, operands: Any) -> None:
    """The first of two groups is done and may be used, the second runs on."""
    a, b, memory, fragments = operands
    both = product(PLACED) + COMMIT + product(PLACED, d=8) + COMMIT
    zeros = "".join(f"mov.f32 %f{k}, 0f00000000;" for k in range(8, 12))
    body = READY + zeros + FENCE + both + wait(1) + store() + wait()
    d, _ = run(sim, body, memory, fragments)
    np.testing.assert_array_equal(d, a @ b.T)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_warps_need_not_keep_step(sim: ptxsim.Simulator, operands: Any, seed: int) -> None:
    a, b, memory, fragments = operands
    with sim.options(seed=seed, quantum=3):
        d, _ = run(
            sim, READY + FENCE + product(PLACED) + COMMIT + wait() + store(), memory, fragments
        )
    np.testing.assert_array_equal(d, a @ b.T)


# ---- Errors


CALL = FENCE + product(PLACED) + COMMIT
# Thread t's 16 bytes of the tile of B; all is read.
TO_TILE = f"shl.b32 %r27, %t, 4; and.b32 %r27, %r27, 1008; add.u32 %r27, %r27, {B};"
FIRST_WARP = "setp.lt.u32 %p2, %t, 32;"
COPY_TO_TILE = f"""{TO_TILE} cvt.u64.u32 %d1, %r27; add.s64 %d1, %a0, %d1;
setp.ge.u32 %p2, %t, 64; @%p2 cp.async.cg.shared.global [%r27], [%d1], 16;"""
ERRORS: dict[str, tuple[str, str]] = {
    # body, what the message says
    "accumulators are read": (READY + CALL + store(), "in flight: a read of %f0, which a wgmma"),
    "accumulators are copied": (READY + CALL + "mov.f32 %f20, %f3;", "in flight: a read of %f3"),
    "accumulators are read too early": (
        READY + CALL + FENCE + product(PLACED) + COMMIT + wait(1) + store(),
        "in flight: a read of %f0",
    ),
    "an uncommitted product is waited for": (
        READY + FENCE + product(PLACED) + wait() + store(),
        "in flight: a read of %f0",
    ),
    "accumulators are written": (
        READY + CALL + "mov.f32 %f2, 0f00000000;",
        "in flight: a write to %f2, which a wgmma is still accumulating",
    ),
    "an operand is written": (
        READY + CALL + "add.u32 %r1, %r1, 1;",
        "in flight: a write to %r1, which a wgmma is still reading",
    ),
    "an operand is another's accumulator": (
        READY + CALL + FENCE + product(PLACED, a="{%f0, %f1, %f2, %f3}", d=8),
        "in flight: a read of %f0",
    ),
    "accumulators of another shape": (
        READY + zero(16) + FENCE + product(PLACED) + product(PLACED, 16),
        "accumulates in %f0, which one of another shape still does",
    ),
    "accumulators without a value": (
        COPY_IMAGE + PUBLISH + LOAD_A + CALL,
        "uninitialised register: %f0 has no value",
    ),
    "an operand without a value": (
        COPY_IMAGE + PUBLISH + zero(8) + CALL,
        "uninitialised register: %r0 has no value",
    ),
    "no fence of registers": (
        READY + product(PLACED),
        "no wgmma.fence since %r0, an operand, was written",
    ),
    "a register after the fence": (
        READY + FENCE + "mov.f32 %f1, 0f00000000;" + product(PLACED),
        "no wgmma.fence since %f1",
    ),
    "no fence of the proxy": (
        COPY_IMAGE + "bar.sync 0;" + LOAD_A + zero(8) + CALL,
        r"no proxy fence: a wgmma of warp \d reads shared address 0x400, which lane 0 of warp 2",
    ),
    "a fence of the proxy by the reader": (
        COPY_IMAGE + FIRST_WARP + "@%p2 fence.proxy.async; bar.sync 0;" + LOAD_A + zero(8) + CALL,
        r"which lane 0 of warp 2 wrote with no fence.proxy.async",
    ),
    "a copy that lands after the fence": (
        READY + COPY_TO_TILE + "fence.proxy.async; cp.async.wait_all; bar.sync 0;" + CALL,
        "no proxy fence",
    ),
    "a copy under way": (
        READY + COPY_TO_TILE + "bar.sync 0;" + CALL,
        "in flight: a read at shared address 0x400, lane 0, of bytes that a cp.async",
    ),
    "no barrier": (
        COPY_IMAGE
        + "fence.proxy.async; bar.sync 0;"
        + COPY_IMAGE.replace("copy", "again")
        + "fence.proxy.async;"
        + LOAD_A
        + zero(8)
        + CALL
        + wait(),
        "race: ",
    ),
    "bytes that nobody wrote": (
        "bar.sync 0;" + LOAD_A + zero(8) + CALL,
        "uninitialised shared memory",
    ),
    "what is read is written": (
        READY + CALL + TO_TILE + "st.shared.u32 [%r27], %t;",
        "in flight: a write at shared address .* to bytes that a wgmma is still reading",
    ),
    "what is read is copied to": (
        READY + CALL + COPY_TO_TILE,
        "in flight: a cp.async at shared address .* to bytes that a wgmma is still reading",
    ),
    "what another warp reads is written": (
        READY + CALL + wait() + TO_TILE + FIRST_WARP + "@%p2 st.shared.u32 [%r27], %t;",
        r"(race|in flight): a write at shared address 0x400",
    ),
    "the end comes first": (READY + CALL, "in flight: the warp exits with a wgmma"),
    "part of a group": (
        READY + FIRST_WARP + "@%p2 bra done;" + CALL + wait() + "done:",
        r"warpgroup: warp \d exits after \d wgmmas, warp \d after \d",
    ),
    "warps with different products": (
        READY + FIRST_WARP + f"@%p2 bra other; {CALL} bra done; other: {CALL} done: {wait()}",
        "is not what another warp of its group issued",
    ),
    "part of a warp": (
        READY + "setp.lt.u32 %p2, %t, 16; @%p2 " + product(PLACED),
        "inactive lanes",
    ),
    "lanes with different descriptors": (
        READY + "cvt.u64.u32 %d2, %t;" + FENCE + product(PLACED).replace(str(PLACED), "%d2"),
        "wgmma: lane 1 has another descriptor",
    ),
    "beyond shared memory": (
        READY + FENCE + product(descriptor(SHARED_BYTES, 16, 1024, 1)),
        "out of bounds: a wgmma of 16 bytes",
    ),
    "a base offset": (READY + FENCE + product(PLACED | 1 << 49), "base offset is not supported"),
    "too few registers": (
        READY + FENCE + product(PLACED).replace("m64n8", "m64n16"),
        "wgmma: D needs 8 registers",
    ),
    "another depth": (
        READY + FENCE + product(PLACED).replace("n8k16", "n8k8"),
        "unknown instruction",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(sim: ptxsim.Simulator, name: str) -> None:
    body, message = ERRORS[name]
    with pytest.raises(ptxsim.SimulationError, match=message):
        run(sim, body)


def test_half_a_warpgroup(sim: ptxsim.Simulator) -> None:
    with pytest.raises(ptxsim.SimulationError, match=r"warp \d is in no group of four"):
        run(sim, CALL.replace(FENCE, PUBLISH + LOAD_A + zero(8) + FENCE), threads=64)


def test_faultless(sim: ptxsim.Simulator) -> None:
    """What the errors are made of runs without them."""
    for body in (
        READY + CALL + wait() + store(),
        READY
        + CALL
        + wait()
        + "bar.sync 0;"
        + TO_TILE
        + FIRST_WARP
        + "@%p2 st.shared.u32 [%r27], %t;",
        READY + COPY_TO_TILE + "cp.async.wait_all;" + PUBLISH + CALL + wait(),
    ):
        run(sim, body)

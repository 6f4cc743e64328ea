"""Text: reading files, cutting calibration windows, sampling text from a model."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowbitcore.blocks import evaluating
from lowbitcore.checks import check_integer, check_kind, check_length, check_path, check_unicode
from lowbitcore.files import one_line

_HUB_DOCUMENTS = 10_000
_TRAINING = 1 << 31  # above the seeds that people use; torch looks at 32 bits of one
# A sampled window starts below where the tokenizer has no bos: the low ids of a BPE vocabulary,
# special tokens apart, are its bytes and most frequent pieces.
_COMMON_TOKENS = 2000


# A label that no loss counts: that of torch.nn.functional.cross_entropy.
IGNORED = -100


class Example(NamedTuple):
    """An instruction and its answer, in Alpaca's wording."""

    prompt: str
    response: str

    @property
    def text(self) -> str:
        return self.prompt + self.response


def alpaca_example(instruction: str, context: str, output: str) -> Example:
    """Alpaca's prompt template; `context` may be empty."""
    if context:
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    else:
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    return Example(prompt, output)


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The documents of a text file, as `read_examples` reads it."""
    return [example.text for example in read_examples(path)]


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """The documents of a text file; those that are no instructions have an empty prompt.

    `.jsonl` (an object a line) and `.json` (a list of objects) hold Alpaca's `instruction`,
    `input`, `output` (or `instances` of the last two), or `text`; any other file is one
    document. Raises ValueError for what holds no text.
    """
    check_path("read_examples: path", path)
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if path.suffix.lower() not in (".json", ".jsonl"):
        if not content.strip():
            raise ValueError(f"{path}: holds no text")
        return [Example("", content)]
    examples = []
    for where, record in _records(path, content):
        found = _record_examples(where, record)
        for example in found:
            check_unicode(where, example.text)  # JSON may escape half of a surrogate pair
        examples += found
    if not any(example.text.strip() for example in examples):
        raise ValueError(f"{path}: holds no text")
    return examples


def hub_texts(name: str) -> list[str]:
    """The first documents of a hub data set's `train` split (its `text` column), or of a directory.

    `name` may end in `:CONFIGURATION`. Raises ValueError where there is no such thing.
    """
    from datasets import load_dataset

    path, _, configuration = name.partition(":")
    if not path:
        raise ValueError(f"hf:{name}: expected the name of a data set, hf:NAME")
    try:
        stream = load_dataset(path, configuration or None, split="train", streaming=True)
        records = itertools.islice(stream, _HUB_DOCUMENTS)
        texts = [item for item in (record["text"] for record in records) if isinstance(item, str)]
    except Exception as error:  # network, unknown name, no such column: all end here
        raise ValueError(f"hf:{name}: cannot be read: {one_line(error)}") from error
    if not any(text.strip() for text in texts):
        raise ValueError(f"hf:{name}: holds no text")
    return texts


def _records(path: Path, content: str) -> list[tuple[str, Any]]:
    if path.suffix.lower() == ".json":
        value = _parse_json(str(path), content)
        if not isinstance(value, list):
            raise ValueError(f"{path}: expected a list of objects, got {type(value).__name__}")
        return [(f"{path}: record {number}", record) for number, record in enumerate(value)]
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    lines = enumerate(content.split("\n"), start=1)
    return [
        (f"{path}:{number}", _parse_json(f"{path}:{number}", line))
        for number, line in lines
        if line.strip()
    ]


def _parse_json(where: str, content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def _record_examples(where: str, record: Any) -> list[Example]:
    if isinstance(record, dict):
        instruction = record.get("instruction")
        instances = record.get("instances", [record])
        if isinstance(instruction, str) and isinstance(instances, list):
            pairs: list[tuple[Any, Any]] = [
                (item.get("input") or "", item.get("output"))
                for item in instances
                if isinstance(item, dict)
            ]
            if pairs and all(isinstance(text, str) for pair in pairs for text in pair):
                return [alpaca_example(instruction, given, output) for given, output in pairs]
        if isinstance(record.get("text"), str):  # beside an instruction, it says the same once more
            return [Example("", record["text"])]
    raise ValueError(f"{where}: expected an object with text, or with instruction and output")


def calibration_windows(
    texts: list[str], tokenizer: Any, *, samples: int, length: int, seed: int
) -> torch.Tensor:
    """int64 [samples, length]: windows of text, without special tokens, fixed by the seed.

    Documents are taken in an order drawn from the seed, joined by an empty line, and cut into
    windows without overlap; where there is more text than needed, the windows are drawn too.
    Raises ValueError where the texts are too short.
    """
    _check_sizes("calibration_windows", samples, length)
    generator = torch.Generator().manual_seed(seed)
    windows = _windows(texts, tokenizer, samples, length, generator)
    if len(windows) < samples:
        raise ValueError(
            f"calibration_windows: texts: expected at least {samples * length} tokens ({samples} "
            f"windows of {length}), got enough for {len(windows)} "
            "(give more text, or fewer or shorter samples)"
        )
    return windows[torch.randperm(len(windows), generator=generator)[:samples]]


def _windows(
    texts: Sequence[str], tokenizer: Any, count: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Windows of shuffled documents, at least `count` if there are so many: int64 [n, length]."""
    order = torch.randperm(len(texts), generator=generator).tolist()
    tokens: list[int] = []
    # In batches: a fast tokenizer then works in parallel, and reading stops when there is enough.
    for start in range(0, len(order), 64):
        if len(tokens) >= count * length:
            break
        batch = [texts[i] + "\n\n" for i in order[start : start + 64] if texts[i].strip()]
        if batch:
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            tokens += [token for ids in encoded for token in ids]
    available = len(tokens) // length
    return torch.tensor(tokens[: available * length], dtype=torch.int64).view(-1, length)


class TrainingSet(Dataset[dict[str, torch.Tensor]]):
    """`input_ids` and `labels`, int64 [at most length]; labels are IGNORED where nothing is learnt.

    Texts are shuffled, joined and cut into windows, every token a label. Instructions are one
    example each, in Alpaca's prompt, after the tokenizer's bos if it sets one before prompts, ended
    by its eos and cut off at `length`;
    `mask_prompt` leaves the prompt out of the labels, and examples with nothing but a prompt are
    left out. `limit` is the number of examples that are wanted, or `tokens` of tokens: reading
    stops there. Raises ValueError where no example is left, and for a prompt to mask where there
    are texts alone.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        *,
        length: int,
        mask_prompt: bool = False,
        limit: int | None = None,
        tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        _check_sizes("TrainingSet", 1 if limit is None else limit, length)
        if not isinstance(examples, Sequence) or isinstance(examples, str):
            got = type(examples).__name__
            raise ValueError(f"TrainingSet: examples: expected a list of Example, got {got}")
        check_kind("TrainingSet: tokenizer", tokenizer, PreTrainedTokenizerBase)
        for example in examples:
            if not isinstance(example, Example):
                raise ValueError(
                    "TrainingSet: examples: expected those of read_examples, or "
                    f'Example("", text), got a {type(example).__name__}'
                )
        most = sys.maxsize if limit is None else limit
        # Other documents first than a calibration with the same seed has taken.
        generator = torch.Generator().manual_seed(seed ^ _TRAINING)
        texts = [example.text for example in examples if not example.prompt]
        instructions = [example for example in examples if example.prompt]
        if mask_prompt and not instructions:
            raise ValueError("TrainingSet: mask_prompt: expected instructions, got texts alone")
        if not instructions:
            most = min(most, sys.maxsize if tokens is None else -(-tokens // length))
            windows = _windows(texts, tokenizer, most, length, generator)
            self.items = [(window, 0) for window in windows[:most]]
        else:
            whole = sys.maxsize // length
            windows = _windows(texts, tokenizer, whole, length, generator)
            self.items, count = [], 0
            order = torch.randperm(len(windows) + len(instructions), generator=generator)
            for i in order.tolist():
                if len(self.items) == most or (tokens is not None and count >= tokens):
                    break
                if i < len(windows):
                    ids, masked = windows[i], 0
                else:
                    example = instructions[i - len(windows)]
                    ids, masked = _tokenize(example, tokenizer, length, mask_prompt)
                if masked < len(ids) > 1:
                    self.items.append((ids, masked))
                    count += len(ids)
        if not self.items:
            raise ValueError(
                f"TrainingSet: examples: expected text for a window of {length} tokens, or an "
                f"instruction whose prompt is shorter, got none in {len(examples)}"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, masked = self.items[index]
        labels = ids.clone()
        labels[:masked] = IGNORED
        return {"input_ids": ids, "labels": labels}

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.items)

    def digest(self) -> str:
        """SHA-256 over all tokens and masks: what was computed from them can be told by it."""
        digest = hashlib.sha256()
        for ids, masked in self.items:
            digest.update(f"{len(ids)} {masked} ".encode())
            digest.update(ids.numpy().tobytes())
        return digest.hexdigest()


def _tokenize(
    example: Example, tokenizer: Any, length: int, mask_prompt: bool
) -> tuple[torch.Tensor, int]:
    """The tokens of an instruction and its answer, and how many of them are not learnt."""
    prompt, response = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in (example.prompt, example.response)
    )
    prompt = [*_begin(tokenizer), *prompt]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = torch.tensor([*prompt, *response, *end][:length], dtype=torch.int64)
    if not mask_prompt:
        return ids, 0
    return ids, len(prompt) if response else len(ids)


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a prompt that a model is to answer: bos, as LLaMA's does, or
    nothing."""
    alone = tokenizer("", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and alone[:1] == [bos] else []


def _check_sizes(name: str, samples: int, length: int) -> None:
    check_integer(f"{name}: samples", samples, least=1)
    check_integer(f"{name}: length", length, least=2)


@torch.no_grad()
def sample_from_model(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    progress: bool = True,
) -> torch.Tensor:
    """int64 [samples, length]: text the model itself writes at temperature 1, fixed by the seed.

    For users without calibration text (the idea of LLM-QAT, 2305.17888): a window starts with bos,
    or with a random common token where the tokenizer has none, and goes on past any end of text.
    """
    _check_sizes("sample_from_model", samples, length)
    check_length("sample_from_model: length", length, model.config)
    generator = torch.Generator().manual_seed(seed)
    if tokenizer.bos_token_id is not None:
        first = torch.full((samples, 1), tokenizer.bos_token_id, dtype=torch.int64)
    else:
        special = set(tokenizer.all_special_ids)
        size = min(len(tokenizer), _COMMON_TOKENS)
        common = torch.tensor([token for token in range(size) if token not in special])
        first = common[torch.randint(len(common), (samples, 1), generator=generator)]
    # Key-value caches are what memory goes to here; 32 windows at a time keep the matrices busy.
    batches = first.split(32)
    bar = tqdm(
        total=len(batches) * (length - 1), desc="sampling text", unit="token", disable=not progress
    )
    with evaluating(model), bar:
        return torch.cat([_sample_batch(model, batch, length, generator, bar) for batch in batches])


def _sample_batch(
    model: PreTrainedModel,
    first: torch.Tensor,
    length: int,
    generator: torch.Generator,
    bar: tqdm[Any],
) -> torch.Tensor:
    tokens, cache = [first], None
    for _ in range(length - 1):
        output = model(input_ids=tokens[-1].to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(-1).cpu()
        if not torch.isfinite(probabilities).all():
            raise ValueError("sample_from_model: model: its logits hold NaN or Inf")
        tokens.append(torch.multinomial(probabilities, 1, generator=generator))
        bar.update()
    return torch.cat(tokens, dim=1)

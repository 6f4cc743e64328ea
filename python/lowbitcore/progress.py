"""What a person sees of a training: a bar while it runs, a plot of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from lowbitcore.files import atomic_path


class Bar(TrainerCallback):  # type: ignore[misc]
    """Progress on stderr, with what was logged last."""

    _bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        shown = {"loss": "loss", "eval_ppl": "perplexity"}
        if self._bar is not None:
            self._bar.set_postfix({shown[k]: f"{v:.3f}" for k, v in logs.items() if k in shown})

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def draw(history: list[dict[str, Any]], path: Path, *, windows: int, final: float | None) -> None:
    """Loss and perplexity against tokens, as PNG: perplexity on the first `windows` of the
    evaluation text while training, and `final` on all of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    losses = [(item["num_input_tokens_seen"], item["loss"]) for item in history if "loss" in item]
    points = [
        (i.get("num_input_tokens_seen", 0), i["eval_ppl"]) for i in history if "eval_ppl" in i
    ]
    axes.plot(*zip(*losses, strict=True), color="tab:blue", label="training loss")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token)")
    handles = axes.get_lines()
    if points:
        right = axes.twinx()
        right.set_yscale("log")
        right.yaxis.set_major_formatter(ScalarFormatter())
        right.yaxis.set_minor_formatter(ScalarFormatter())
        right.set_ylabel("perplexity on the evaluation text (log scale)")
        label = f"perplexity (first {windows} windows)"
        handles = handles + right.plot(
            *zip(*points, strict=True), color="tab:orange", marker="o", label=label
        )
    if final is not None:
        axes.set_title(f"perplexity at the end, on all of the text: {final:,.2f}")
    axes.legend(handles=handles)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)

"""What a person sees and what the log keeps while a run goes on."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peml.training.folder import RunFolder

if TYPE_CHECKING:
    from typing import Self


def progress_bar(console: Console) -> Progress:
    """The one style of progress bar; disappears when done."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class LiveView:
    """What is drawn anew on the terminal for as long as a `with` block lasts; `live` is what draws it."""

    live: Live

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()


class RunLog(TrainerCallback):
    """A bar on the terminal, and every logged number as a line of `log.jsonl`.

    Args:
        spent: seconds that the run had taken before, if it is resumed.
    """

    def __init__(self, folder: RunFolder, progress: Progress, spent: float = 0.0, label: str = "train") -> None:
        self.folder = folder
        self.progress = progress
        self.spent = spent
        self.label = label
        self.bar: Any = None
        self.first_loss: dict[str, float] = {}
        self.last_loss: dict[str, float] = {}
        self._start = time.perf_counter()

    def start(self) -> None:
        """The training begins now."""
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of the training so far, with those before an interruption."""
        return self.spent + time.perf_counter() - self._start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, from where a resumed run goes on."""
        for entry in state.log_history:
            self._remember(entry)
        if state.is_world_process_zero:
            self.bar = self.progress.add_task(self.label, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step further."""
        if self.bar is not None:
            self.progress.update(self.bar, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the numbers; show the loss beside the bar."""
        self._remember(logs or {})
        if state.is_world_process_zero and logs:
            elapsed = round(self.elapsed(), 3)
            self.folder.append_log({"step": state.global_step, "elapsed_seconds": elapsed, **logs})
            if self.bar is not None and "loss" in logs:
                self.progress.update(self.bar, description=f"{self.label} (loss {logs['loss']:.3f})")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time at a checkpoint, from which the bill of a resumed run goes on."""
        if state.is_world_process_zero:
            elapsed = round(self.elapsed(), 3)
            self.folder.append_log({"step": state.global_step, "elapsed_seconds": elapsed, "checkpoint": True})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away; say which step was kept, where that is not the last."""
        if state.is_world_process_zero and (chosen := kept(args, state)):
            elapsed = round(self.elapsed(), 3)
            self.folder.append_log({"step": state.global_step, "elapsed_seconds": elapsed, **chosen})
        if self.bar is not None:
            self.progress.remove_task(self.bar)
            self.bar = None

    def _remember(self, logs: dict[str, float]) -> None:
        for key, value in logs.items():
            kind, slash, task = key.partition("/")
            if kind == "loss" and slash:
                self.first_loss.setdefault(task, value)
                self.last_loss[task] = value


class Patience(EarlyStoppingCallback):
    """transformers' early stopping, which begins when a search is over."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """One evaluation more or less to wait."""
        prompt = kwargs["model"].base_model.prompt
        if not getattr(prompt, "searching", False):
            super().on_evaluate(args, state, control, metrics, **kwargs)


def kept(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Which step was the best, and by what; nothing where the last one is kept."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return {}
    metric = args.metric_for_best_model
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    return {"kept": {"step": state.best_global_step, "metric": metric, "value": float(state.best_metric)}}

"""`MultiTaskSFTTrainer`: TRL's supervised trainer on a data set whose rows name their tasks; needs the extra `trl`.

Without it TRL drops the column twice: as unknown to the model, and in a collator that builds its batches anew. An
adapter that all tasks share needs none of this and trains in `SFTTrainer` itself; where its prompt is searched, add
`SearchCallback` to that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peml.config import PemlConfig
from peml.errors import PemlError
from peml.prompts import Attempt
from peml.training.groups import parameter_groups
from peml.training.search import FINETUNE_FRACTION, SearchLog, SearchSchedule
from peml.tuner import PemlModel

try:
    import trl
    from trl import SFTTrainer
except ImportError as error:
    raise PemlError("MultiTaskSFTTrainer needs TRL: pip install 'peml[trl]'") from error


class MultiTaskSFTTrainer(SearchLog, SFTTrainer):
    """Train one PEML adapter on the rows of a data set, each routed by its column `task`.

    The loss is TRL's, a mean over tokens, in which long answers and large tasks weigh more than in `MultiTaskTrainer`;
    the penalties of prompt and features are added, a search is led to its end, and prompt and architecture have
    learning rates of their own. Packed rows carry a task per token, which adapters and, in sdpa
    and eager attention, prompts follow.

    Args:
        model: as for `trl.SFTTrainer`; a name, a model, or a `PeftModel` with a PEML adapter active.
        args: as for `trl.SFTTrainer`.
        task_column: column with the name or the id of each row's task.
        prompt_learning_rate, task_prompt_learning_rate, architecture_learning_rate: as for `MultiTaskTrainer`.
        finetune_fraction: share of the steps after the architecture is derived.
        kwargs: as for `trl.SFTTrainer`, among them `peft_config`.

    Raises:
        PemlError: no PEML adapter, or a data set whose tasks are missing or unknown.
    """

    data_collator: Any
    optimizer: Any

    def __init__(
        self,
        model: str | nn.Module,
        args: Any = None,
        *,
        task_column: str = "task",
        prompt_learning_rate: float | None = None,
        task_prompt_learning_rate: float | None = None,
        architecture_learning_rate: float | None = None,
        finetune_fraction: float = FINETUNE_FRACTION,
        **kwargs: Any,
    ) -> None:
        inner = getattr(model, "base_model", None)
        config = inner.config_in_force if isinstance(inner, PemlModel) else kwargs.get("peft_config")
        if not isinstance(config, PemlConfig):
            raise PemlError(
                "MultiTaskSFTTrainer needs a PEML adapter: pass peft_config=PemlConfig(...) or a model that has one"
            )
        if isinstance(config.prompt, Attempt):
            raise PemlError("Attempt makes its prompt from the text before the answer, which TRL does not tell apart")
        smoothed = kwargs.get("compute_loss_func") is not None or getattr(args, "label_smoothing_factor", 0) > 0
        if smoothed and config.adapter is not None and config.adapter.feature_loss_weight > 0:
            raise PemlError(
                "adapter.align trains on the features of the step's only forward, and TRL makes a second one for "
                "label_smoothing_factor and compute_loss_func: leave them out"
            )
        self._tasks = RowTasks(task_column, tuple(config.task_names), config.needs_task)
        self._rates = {
            "prompt": prompt_learning_rate,
            "prompt per task": task_prompt_learning_rate,
            "architecture": architecture_learning_rate,
        }
        if kwargs.get("train_dataset") is not None:
            self._tasks.check(kwargs["train_dataset"])
        super().__init__(model, args, **kwargs)
        self.tuner = cast("PemlModel", self.model.base_model)
        self.data_collator = TaskCollator(self.data_collator, self._tasks)
        self.schedule = SearchSchedule(self.tuner, finetune_fraction, log=self.log)
        self.add_callback(self.schedule)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._tasks.column not in self._signature_columns:
            self._signature_columns.append(self._tasks.column)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """TRL's, which keeps the column unless it packs; then it is packed here, as a task per token."""
        self._tasks.check(dataset)
        unpacked = args
        if packing:
            if args.max_length is None or args.packing_strategy == "wrapped":
                raise PemlError(
                    "packing needs max_length, the length of the rows that are filled, and packing_strategy='bfd' or "
                    "'bfd_split': 'wrapped' lets texts of different tasks see each other"
                )
            # What is too long is cut by the packing, in the way that its strategy asks for.
            unpacked = copy.copy(args)
            unpacked.max_length = None
        rows = super()._prepare_dataset(dataset, processing_class, unpacked, False, formatting_func, dataset_name)
        column = self._tasks.column
        if not packing:
            return rows
        columns = ["input_ids", "labels"]
        if self._tasks.among(next(iter(rows))):
            rows = rows.map(lambda row: {column: [self._tasks.id_of(row[column])] * len(row["input_ids"])})
            columns.append(column)
        packed = trl.pack_dataset(rows.select_columns(columns), args.max_length, args.packing_strategy)
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss, plus the penalties of prompt and features."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not torch.is_grad_enabled():
            return found
        # With a number of items, accumulation is left to the loss; without, the Trainer divides.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        penalty = sum(self.tuner.penalties().values(), 0.0) / steps
        return (found[0] + penalty, found[1]) if return_outputs else found + penalty

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per part, as in `MultiTaskTrainer`."""
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(parameter_groups(self.tuner, self.args, self._rates), **settings)
        return self.optimizer  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RowTasks:
    """Where the tasks of rows stand, and which there are.

    Args:
        column: of the data set.
        names: the adapter's tasks, in the order of their ids.
        needed: whether the adapter differs by task.
    """

    column: str
    names: tuple[str, ...]
    needed: bool

    def among(self, columns: Any) -> bool:
        """Whether the column is there.

        Raises:
            PemlError: it is not, and the adapter needs it.
        """
        if self.column not in columns and self.needed:
            raise PemlError(
                f"this adapter differs by task, and the data set has no column {self.column!r} with one of "
                f"{', '.join(self.names)} per row: add it, or name another with task_column="
            )
        return self.column in columns

    def check(self, dataset: Any) -> None:
        """Look at all tasks of a data set in memory, and at the first row of a stream.

        Raises:
            PemlError: the column is missing though needed, or names an unknown task.
        """
        if isinstance(dataset, Mapping):
            for part in dataset.values():
                self.check(part)
            return
        columns = getattr(dataset, "column_names", None) or next(iter(dataset))
        if self.among(columns) and hasattr(dataset, "unique"):
            for task in dataset.unique(self.column):
                self.id_of(task)

    def id_of(self, task: object) -> int:
        """Id of a name or an id.

        Raises:
            PemlError: neither of a task that the adapter has.
        """
        if isinstance(task, str) and task in self.names:
            return self.names.index(task)
        if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(self.names):
            return task
        raise PemlError(f"unknown task {task!r} in column {self.column!r}; this adapter has {', '.join(self.names)}")


@dataclass
class TaskCollator:
    """TRL's collator, with `tasks` beside what it gives.

    Args:
        inner: the collator of everything else.
        tasks: where the tasks stand.
    """

    inner: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    tasks: RowTasks

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch, with B ids, or one row of ids per token where rows are laid end to end."""
        batch, column = self.inner(rows), self.tasks.column
        if not self.tasks.among(rows[0]):
            return batch
        given = [row[column] for row in rows]
        if not getattr(self.inner, "padding_free", False):
            return {**batch, "tasks": [self._of_row(task) for task in given]}
        ids: list[int] = []
        for row, task in zip(rows, given, strict=True):
            length = len(row["input_ids"])
            ids += task if isinstance(task, list) else [self.tasks.id_of(task)] * length
        ids += ids[-1:] * (batch["input_ids"].shape[1] - len(ids))
        return {**batch, "tasks": [ids]}

    def _of_row(self, task: Any) -> int:
        if isinstance(task, list):
            raise PemlError("rows are packed for evaluation but not for training: set eval_packing to packing")
        return self.tasks.id_of(task)

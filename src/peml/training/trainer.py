"""`MultiTaskTrainer`: the Hugging Face Trainer with mixed-task batches, a loss per task and parameter groups.

Overridden are batch composition, routing, the loss, the optimiser's groups and evaluation; loop, precision,
distribution and checkpoints are the Trainer's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from peml.balance import Balance, CoBa, Equal, per_sample
from peml.errors import PemlError
from peml.mixing import Mixing, MixtureSampler, Onward, held_out
from peml.training.balancing import Balancer
from peml.training.bilevel import ArchitectureSteps
from peml.training.data import Collator, TaskRows, call_of
from peml.training.distillation import Distillation
from peml.training.groups import parameter_groups
from peml.training.guard import check_finite, check_room
from peml.training.loss import LossMeter, balanced, by_task, row_counts, row_losses
from peml.training.regime import Bilevel
from peml.training.search import FINETUNE_FRACTION, SearchSchedule, searching
from peml.training.steps import BalancedSteps, StepUpdates
from peml.training.streaming import StreamedRows
from peml.tuner import PemlModel


class MultiTaskTrainer(BalancedSteps):
    """Train one PEML adapter on many tasks.

    Args:
        model: a `PeftModel` with a PEML adapter active.
        args: transformers' arguments; `learning_rate` is the adapter's.
        train_dataset: rows with their tasks; its `task_names` must be the adapter's.
        mixing: how tasks share an epoch and a batch.
        prompt_learning_rate, task_prompt_learning_rate, architecture_learning_rate: of the prompt, of what in it
            belongs to single tasks, and of what chooses a structure; None: the prompt's own default.
        head_learning_rate: of the heads; None: `HEAD_STEP` over the numbers that a head sees.
        balance: how tasks share the loss and the gradient; None: equally.
        task_weights: weight of each task in the loss, beside those of the balance; None: all 1.
        finetune_fraction: share of the steps after the architecture is derived.
        measure_gap: whether `evaluate_tasks` is called just before and just after that.
        bilevel: how the architecture is trained on rows of its own; None: with everything else.
        frozen: parts that are not trained: adapter, prompt, architecture, heads.
        steps_before: of a training that this one goes on behind: its rows are not drawn again before the others.
        distillation: what is learnt from a teacher; None: nothing.
        evaluate_tasks: called with the model, returns `{task: {metric: value}}`; `score` of each task
            enters `eval_average`.
        kwargs: as for `transformers.Trainer`.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: TaskRows,
        mixing: Mixing | None = None,
        prompt_learning_rate: float | None = None,
        task_prompt_learning_rate: float | None = None,
        architecture_learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        balance: Balance | None = None,
        task_weights: Mapping[str, float] | None = None,
        finetune_fraction: float = FINETUNE_FRACTION,
        measure_gap: bool = True,
        bilevel: Bilevel | None = None,
        frozen: Collection[str] = (),
        steps_before: int = 0,
        distillation: Distillation | None = None,
        evaluate_tasks: Callable[[nn.Module], dict[str, dict[str, float]]] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise PemlError(
                "several GPUs in one process are not supported: start one process per GPU, `accelerate launch`"
            )
        # The collator's `tasks` is no argument of the base model's forward; transformers would drop it.
        args.remove_unused_columns = False
        self.mixing = mixing or Mixing()
        if not isinstance(getattr(model, "base_model", None), PemlModel):
            raise PemlError(
                "MultiTaskTrainer needs a model with a PEML adapter: get_peft_model(model, PemlConfig(...))"
            )
        self.tuner = cast("PemlModel", model.base_model)
        self.task_names = list(train_dataset.task_names)
        self.form = train_dataset.form
        config = self.tuner.config_in_force
        if config is None or self.task_names != config.task_names:
            trained = "none" if config is None else ", ".join(config.task_names)
            raise PemlError(f"the data has the tasks {', '.join(self.task_names)}, the active adapter {trained}")
        if (self.form == "heads") != (config.heads is not None):
            raise PemlError("rows that were encoded for heads, and no others, need an adapter with heads")
        self._rates = {
            "prompt": prompt_learning_rate,
            "prompt per task": task_prompt_learning_rate,
            "architecture": architecture_learning_rate,
            "heads": head_learning_rate,
        }
        self._distillation, self._steps_before = distillation, steps_before
        self.balance = balance or Equal()
        self._evaluate_tasks = evaluate_tasks
        self._meter = LossMeter(self.task_names)
        self._penalties: dict[str, Tensor] = {}
        pad = getattr(kwargs.get("processing_class"), "pad_token_id", None)
        kwargs.setdefault("data_collator", Collator(pad if isinstance(pad, int) else 0, self.form))
        if evaluate_tasks is not None:
            # Never read, since `evaluate` is overridden; without one transformers refuses an `eval_strategy`.
            kwargs.setdefault("eval_dataset", train_dataset)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        if self.is_fsdp_enabled and self.tuner.parts()["architecture"]:
            raise PemlError(
                "a prefix cannot be searched under FSDP, where no process has whole parameters to read gates and costs "
                "from: use DDP, a prefix that is not searched, or `--architecture`"
            )
        # The loss is divided by the tokens of the whole step, so accumulation must not divide it again.
        self.loss_is_scaled_for_ga = True
        self.frozen = {*frozen} | ({"architecture"} if bilevel is not None else set())
        measured = measure_gap and evaluate_tasks is not None
        self.schedule = SearchSchedule(
            self.tuner, finetune_fraction, log=self.log, measure=self._measure if measured else None
        )
        self.add_callback(self.schedule)
        self.balancer = Balancer(
            self.balance, self.task_names, task_weights, args.seed, self._obstacle(config, distillation)
        )
        self.add_callback(StepUpdates(self))
        self.states.append(self.balancer)
        if bilevel is not None:
            rate = bilevel.learning_rate if architecture_learning_rate is None else architecture_learning_rate
            self._rates["architecture"] = rate
            self.architect = ArchitectureSteps(self, bilevel, rate, finetune_fraction)
            # Behind the schedule, which says whether the search goes on.
            self.add_callback(self.architect)
            self.states.append(self.architect)
        if isinstance(self.balance, CoBa) and not isinstance(train_dataset, StreamedRows):
            self.held_out = held_out(train_dataset.row_tasks, self.task_names, self.balance.rows, args.seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: TaskRows = self.train_dataset
        if isinstance(rows, StreamedRows):
            return self._behind(self._stream_sampler(rows))
        if self.architect is not None:
            self.sampler = self.architect.weight_rows()
            return self.sampler
        sampler = MixtureSampler(
            rows.row_tasks,
            self.mixing,
            self.args.seed,
            self.args.train_batch_size,
            task_names=self.task_names,
            without=self.held_out,
        )
        steps = self.args.max_steps
        samples = steps * self.step_rows if steps > 0 else math.ceil(self.args.num_train_epochs * len(sampler))
        sampler.check(samples + self._drawn_before(sampler))
        return self._behind(sampler)

    def _drawn_before(self, sampler: MixtureSampler) -> int:
        """Rows of the steps before; the last step of an epoch has what is left of it."""
        epochs, steps = divmod(self._steps_before, math.ceil(len(sampler) / self.step_rows))
        return epochs * len(sampler) + steps * self.step_rows

    def _behind(self, sampler: MixtureSampler) -> Sampler[int]:
        self.sampler = Onward(sampler, self._drawn_before(sampler)) if self._steps_before else sampler
        return self.sampler

    def _stream_sampler(self, rows: StreamedRows) -> MixtureSampler:
        args = self.args
        if args.max_steps <= 0 or isinstance(self.balance, CoBa):
            wrong = (
                "balance: coba sets rows apart" if isinstance(self.balance, CoBa) else "train.max_steps is not given"
            )
            raise PemlError(f"tasks with streaming: true have no known number of rows, and {wrong}")
        return rows.sampler(self.mixing, args.seed, args.train_batch_size, args.max_steps * self.step_rows)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """What the loss is divided by: losses or rows by task, over the micro-batches and devices of a step, `[T]`."""
        if not batch_samples:
            return None
        counts = torch.zeros(len(self.task_names), dtype=torch.long)
        for batch in batch_samples:
            of_rows = row_counts(self.form, batch["labels"].cpu())
            _, of_rows = per_sample(self.balance.mean, of_rows, of_rows)
            counts += by_task(of_rows, batch["tasks"], len(self.task_names))
        return self.accelerator.reduce(counts.to(device), "sum")  # type: ignore[no-any-return]

    def sums_by_task(self, logits: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Losses of the answers, and how many they are, by task, `[T]`."""
        labels = inputs["labels"]
        losses = self._row_losses(logits, labels, inputs["tasks"])
        losses, counts = per_sample(self.balance.mean, losses, row_counts(self.form, labels))
        sums, counts = (by_task(values, inputs["tasks"], len(self.task_names)) for values in (losses, counts))
        return sums, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Balanced mean over tasks of the loss of the answers, plus the penalties of prompt and features."""
        given = self.call(inputs)
        if self._distillation is not None:
            given["output_hidden_states"] = True
        outputs = model(**given)
        sums, counts = self.sums_by_task(outputs.logits, inputs)
        if model.training:
            self._meter.add(sums, counts)
            self.balancer.add(sums)
        whole = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else counts
        loss = balanced(self.balance.mean, sums, whole.to(sums.device), self.balancer.weights())
        terms = self.tuner.penalties() if torch.is_grad_enabled() else {}
        if self._distillation is not None and torch.is_grad_enabled():
            terms |= self._distillation(model, given, inputs["labels"], outputs)
        self._penalties = {name: term.detach() for name, term in terms.items()}
        # Gradients are averaged over devices, whereas `whole` already counts all of them.
        loss = loss * self.accelerator.num_processes
        loss = loss + sum(terms.values(), 0.0) / getattr(self, "current_gradient_accumulation_steps", 1)
        return (loss, outputs) if return_outputs else loss

    def objective(self, inputs: dict[str, Any], whole: Tensor, parts: int) -> Tensor:
        """This device's share of the loss and the penalties of a step, without a trace in log or balance.

        Args:
            inputs: a micro-batch, on the device.
            whole: what the loss is divided by, `[T]`, over all micro-batches and devices.
            parts: micro-batches of the step on each device.
        """
        sums, _ = self.sums_by_task(self.model(**self.call(inputs)).logits, inputs)
        loss = balanced(self.balance.mean, sums, whole.to(sums.device), self.balancer.weights())
        penalties = sum(self.tuner.penalties().values(), torch.zeros_like(loss))
        whole_loss: Tensor = loss + penalties / (parts * self.accelerator.num_processes)
        return whole_loss

    def call(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model is called with."""
        return call_of(self.form, self.tuner.model, inputs)

    def _row_losses(self, logits: Tensor, labels: Tensor, tasks: Sequence[int]) -> Tensor:
        config, smoothing = self.tuner.config_in_force, self.args.label_smoothing_factor
        if self.form == "heads":
            assert config is not None and config.heads is not None
            return config.heads.losses(logits, labels, tasks, smoothing)
        return row_losses(self.form, logits, labels, smoothing)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per part: adapter, adapter per task (no decay), prompt, architecture (no decay)."""
        self._freeze()
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(self._parameter_groups(), **settings)
        return self.optimizer  # type: ignore[no-any-return]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.tuner, self.args, self._rates)

    def _freeze(self) -> None:
        """Again and again: PEFT makes an adapter trainable as a whole when it loads or enables it."""
        parts = self.tuner.parts()
        for part in self.frozen:
            for parameter in parts[part]:
                parameter.requires_grad_(False)

    def learning_rates(self) -> dict[str, float]:
        """Initial learning rate of every parameter group, for the record."""
        return {group["name"]: group["lr"] for group in self._parameter_groups()}

    def _measure(self) -> dict[str, dict[str, float]]:
        assert self._evaluate_tasks is not None
        return self._evaluate_tasks(self.model)

    def finish_from(self, checkpoint: Path) -> None:
        """Take over the checkpoint of the last step: nothing is left to train, only to derive."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self._freeze()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def has_ended(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is that of the last step, or of the one at which patience came to its end."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        control = state["stateful_callbacks"].get("TrainerControl", {}).get("args", {})
        return state["global_step"] >= self.args.max_steps > 0 or bool(control.get("should_training_stop"))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Transformers' own, but while a search is open: what is kept would not be what was measured."""
        return not searching(self.tuner.prompt) and super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Transformers' own, of weights that are numbers; the oldest go by their step.

        Transformers goes by the time of the files: after a clock was set back, the newest would be deleted.
        """
        check_finite(self.model, self.state.global_step)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            check_room(error, Path(self.args.output_dir), "and go on with --resume")
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self._get_output_dir(trial=trial),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss of each task and the penalties to what is logged."""
        if "loss" in logs:
            by_task = self._meter.pop(self.accelerator)
            wrong = [name for name, value in by_task.items() if not math.isfinite(value)]
            if wrong:
                raise PemlError(
                    f"training diverged: the loss of task {wrong[0]!r} is not finite at step {self.state.global_step}; "
                    "lower the learning rates"
                )
            logs |= {f"loss/{name}": value for name, value in by_task.items()}
            logs |= self.balancer.pop()
            logs |= {f"penalty/{name}": float(value) for name, value in self._penalties.items()}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Every metric of every task as `eval_{task}/{metric}`, and `eval_average` over their scores."""
        if self._evaluate_tasks is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[no-any-return]
        results = self._evaluate_tasks(self.model)
        metrics = {f"{metric_key_prefix}_{t}/{m}": v for t, own in results.items() for m, v in own.items()}
        metrics[f"{metric_key_prefix}_average"] = sum(r["score"] for r in results.values()) / len(results)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

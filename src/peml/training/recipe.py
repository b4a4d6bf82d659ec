"""The recipe: one YAML file that says everything about a run, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, PlainSerializer, ValidationError, model_validator
from transformers import TrainingArguments

from peml.adapters import AdapterConfig
from peml.balance import Balance, Equal
from peml.config import PemlConfig
from peml.errors import PemlError
from peml.methods import METHODS, method, named
from peml.mixing import Batches, By, Mixing
from peml.prompts import Architecture, Attempt, MultitaskPrompt, PrefixNAS
from peml.tasks import Task
from peml.training.arguments import AVERAGE, DEFAULTS, check_best, checked, one_line, training_arguments
from peml.training.balancing import read_balance, write_balance
from peml.training.contenders import Compare
from peml.training.entries import OwnEntry, Section, SuiteEntry, build_tasks, first_problem, read_entry
from peml.training.folder import RESOLVED
from peml.training.grouping import Grouped, RetrainCluster
from peml.training.ranges import Tune, Tuned
from peml.training.regime import (
    REGIMES,
    DistilThenAdapt,
    Grow,
    Joint,
    Regime,
    Searched,
    Sequential,
    read_regime,
)

FOREIGN_KEYS: Mapping[str, str] = {
    "base_model": "model",
    "model_name_or_path": "model",
    "lora_r": "set: {adapter.r: ...}",
    "lora_rank": "set: {adapter.r: ...}",
    "lora_alpha": "set: {adapter.lora_alpha: ...}",
    "lora_dropout": "set: {adapter.lora_dropout: ...}",
    "r": "set: {adapter.r: ...}",
    "target_modules": "set: {target_modules: ...}",
    "num_virtual_tokens": "set: {prompt.num_virtual_tokens: ...}",
    "cutoff_len": "train: {max_length: ...}",
    "max_seq_length": "train: {max_length: ...}",
    "datasets": "tasks",
    "dataset": "tasks",
    "template": "prompt of a task",
    "learning_rate": "train: {learning_rate: ...}",
    "max_steps": "train: {max_steps: ...}",
    "seed": "train: {seed: ...}",
    "output_dir": "train: {output_dir: ...}",
}
"""Keys that other tools use for what a recipe calls otherwise."""

SHIPPED: Mapping[str, Path] = {
    path.stem: path for path in (Path(__file__).parents[1] / "assets" / "recipes").glob("*.yaml")
}
"""Recipes that lie in the package, by name."""


METHOD_OF: Mapping[str, dict[str, Any]] = {
    "one_plus_n": {"method": "one-plus-n"},
    "progressive": {"method": "progressive"},
}
"""Methods of regimes with clusters, where a recipe names none."""


class MixingSection(Section):
    """How tasks share an epoch and a batch; see `peml.mixing`."""

    by: By = "temperature"
    temperature: float = Field(2.0, gt=0)
    weights: dict[str, float] | None = None
    cap: int | dict[str, int] | None = None
    epochs: float | dict[str, float] | None = None
    batches: Batches = "mixed"

    def among(self, tasks: Sequence[str]) -> MixingSection:
        """The section for some of the tasks only."""
        named = {
            key: {name: value for name, value in given.items() if name in tasks}
            for key in ("weights", "cap", "epochs")
            if isinstance(given := getattr(self, key), dict)
        }
        return self.model_copy(update=named)


class Recipe(Section):
    """Model, tasks, method and training of a run.

    Args:
        model: Hub id or local folder; "toy" is the small model in the package.
        tasks: suites and own tasks, in any number.
        method: a name from `peml methods`.
        set: changes to the method, e.g. `{adapter.r: 16, prompt.num_virtual_tokens: 32}`.
        architecture: of a searched prefix, from a run before: the file, or what is in it; or "random:SEED". Nothing is
            searched then. The recipe that is stored with a run holds the architecture itself.
        chat: whether every task is asked as a user's turn of the model's chat template, unless it says otherwise.
        mixing: how tasks share a batch.
        balance: how tasks share the loss and the gradient, by name or with settings; "equal" is the mean over tasks.
        regime: how the parts are trained, by name or with settings; None: as the method says.
        train: names of `TrainingArguments`, and `dtype`, `attn_implementation`, `max_length`,
            `prompt_learning_rate`, `task_prompt_learning_rate`, `architecture_learning_rate`, `head_learning_rate`,
            `probe_rows`, `finetune_fraction`, `after_search`, `measure_gap`, `early_stopping_patience`,
            `early_stopping_threshold`.
        evaluate_before: measure the base model too, before training.
        held_out: share (below 1) or number of each task's training rows that are measured on, in place of the
            evaluation rows; None: the evaluation rows.
        tune: what `peml tune` tries; training ignores it.
        tuned: where its values were found, and at what cost.
        compare: what `peml compare` does; training ignores it.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    tasks: list[SuiteEntry | OwnEntry] = Field(min_length=1)
    method: str = "peml"
    set: dict[str, Any] = Field(default_factory=dict)
    architecture: str | dict[str, Any] | None = None
    chat: bool = False
    mixing: MixingSection = MixingSection()
    balance: Annotated[Balance, PlainSerializer(write_balance)] = Equal()
    regime: Regime | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate_before: bool = True
    held_out: float | None = Field(None, gt=0)
    tune: Tune | None = None
    tuned: Tuned | None = None
    compare: Compare | None = None

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # A section without entries is null to YAML, and empty to whoever wrote it.
        data = {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        if isinstance(data.get("train"), dict):
            data["train"] = checked(data["train"])
        if "balance" in data:
            data["balance"] = read_balance(data["balance"])
        if data.get("regime") is not None:
            name = data["regime"].get("name") if isinstance(data["regime"], dict) else data["regime"]
            data = METHOD_OF.get(str(name), {}) | data
            known = METHODS.get(str(data.get("method")))
            data["regime"] = read_regime(data["regime"], "joint" if known is None else known.regime)
        given = data.get("architecture")
        if isinstance(given, str) and not given.startswith("random:"):
            data["architecture"] = Architecture.load(given).to_dict()
        if isinstance(data.get("tasks"), list):
            data["tasks"] = [read_entry(i, raw) for i, raw in enumerate(data["tasks"])]
        return data

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        named(self.method)
        names = [task.name for task in self.every_task()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PemlError(f"tasks: {twice[0]!r} is there twice; give each task a name of its own")
        self.build_mixing().check(names)
        check_best(self.train, self.build_tasks())
        if self.architecture is not None and not isinstance(method(self.method, names, self.set).prompt, PrefixNAS):
            raise PemlError(f"architecture is that of a searched prefix, and method {self.method!r} has none: use peml")
        if self.tune is not None:
            self.tune.check(self.method, self.build_tasks(), self.settings)
        prompt = method(self.method, names, self.settings).prompt
        if isinstance(self.how, DistilThenAdapt):
            self.how.check(names)
            if not isinstance(prompt, MultitaskPrompt | Attempt):
                raise PemlError(
                    f"regime distil_then_adapt trains a MultitaskPrompt or Attempt, and method {self.method!r} has "
                    "neither: use mpt, or the regime joint"
                )
            if self.balance.needs_gradients and self.how.distillation_weight > 0:
                raise PemlError(
                    "balance cannot keep the gradients of tasks apart while a student is distilled: use another rule, "
                    "or regime: {distillation_weight: 0}"
                )
        elif isinstance(self.how, Grow | RetrainCluster):
            self.how.check(names)
        elif isinstance(prompt, Attempt):
            raise PemlError("method 'attempt' needs prompts of source tasks: leave its regime, distil_then_adapt")
        elif isinstance(self.how, Grouped):
            given = method(self.method, names, self.settings)
            self.how.check(names, self.method, given.adapter, given.groups)
            self.config()
        elif isinstance(self.how, Sequential | Searched):
            config = self.config()
            self.how.check(self.method, config.adapter, config.prompt)
        return self

    @property
    def how(self) -> Regime:
        """The regime: what the recipe says, else what the method says."""
        return self.regime or REGIMES[named(self.method).regime]()

    def build_tasks(self) -> list[Task]:
        """The tasks of the adapter that the run ends with, in order; nothing is read yet."""
        tasks, how = self.every_task(), self.how
        if not isinstance(how, DistilThenAdapt):
            return tasks
        targets = how.target_names([task.name for task in tasks])
        return [
            dataclasses.replace(task, source=dataclasses.replace(task.source, limit_train=_least(how.shots, task)))
            for task in tasks
            if task.name in targets
        ]

    def every_task(self) -> list[Task]:
        """Those too that only an earlier stage of the regime trains on."""
        tasks = [task for entry in self.tasks for task in build_tasks(entry, self.seed)]
        if self.held_out is not None:
            tasks = [
                dataclasses.replace(t, source=dataclasses.replace(t.source, held_out=self.held_out)) for t in tasks
            ]
        return [dataclasses.replace(t, chat=True) if self.chat and t.chat is None else t for t in tasks]

    def stage(self, tasks: Sequence[str], **changes: Any) -> Recipe:
        """The recipe of one stage: these tasks alone, trained jointly, with other keys changed."""
        entries = []
        for entry in self.tasks:
            own = [task.name for task in build_tasks(entry, self.seed) if task.name in tasks]
            if own and isinstance(entry, SuiteEntry):
                entry = entry.model_copy(update={"include": own, "exclude": None})
            entries += [entry] if own else []
        update: dict[str, Any] = {"tasks": entries, "regime": Joint(), "mixing": self.mixing.among(tasks), **changes}
        train: dict[str, Any] = update.get("train", self.train)
        metric = train.get("metric_for_best_model")
        if metric is not None and not any(f"{task}/" in metric for task in tasks):
            # The task that chooses the checkpoint is not in this stage.
            update["train"] = {**train, "metric_for_best_model": AVERAGE}
        return self.model_copy(update=update)

    def task_weights(self) -> dict[str, float]:
        """Weight of each task in the loss."""
        return {task.name: entry.weight for entry in self.tasks for task in build_tasks(entry, self.seed)}

    def config(self) -> PemlConfig:
        """The adapter's configuration."""
        names = [task.name for task in self.build_tasks()]
        config = method(self.method, names, self.settings, task_type="CAUSAL_LM")
        if isinstance(self.how, Grouped) and isinstance(self.how.clusters, list):
            config.set_groups(self.how.levels(lambda *_: None, names))
        if isinstance(config.prompt, Attempt) and isinstance(self.how, DistilThenAdapt):
            sources = self.how.source_names([task.name for task in self.every_task()])
            config.prompt = dataclasses.replace(config.prompt, num_sources=len(sources))
        return config

    @property
    def settings(self) -> dict[str, Any]:
        """Changes to the method: `set`, and an architecture that was found before."""
        return self.set if self.architecture is None else {**self.set, "prompt.architecture": self.architecture}

    def build_mixing(self) -> Mixing:
        """The mixing rule."""
        return Mixing(**self.mixing.model_dump())

    @property
    def seed(self) -> int:
        """Of sampling, initialisation and hold-outs."""
        return int(self.train.get("seed", DEFAULTS["seed"]))

    def setting(self, key: str) -> Any:
        """A value of `train`, or its default here."""
        return self.train.get(key, DEFAULTS.get(key))

    @property
    def finetune_fraction(self) -> float:
        """Share of the steps that follows a search."""
        return 0.0 if self.setting("after_search") == "keep" else float(self.setting("finetune_fraction"))

    def training_arguments(self, output_dir: str) -> TrainingArguments:
        """What transformers' Trainer gets.

        Raises:
            PemlError: transformers refuses a value.
        """
        adapter = named(self.method).adapter
        rate = AdapterConfig.learning_rate if adapter is None else adapter.learning_rate
        return training_arguments(self.train, rate, output_dir)

    def to_yaml(self) -> str:
        """The recipe with the defaults written out and local paths made absolute: it reads the same from anywhere."""
        full = self.model_dump(exclude_none=True)
        full["model"] = _absolute(self.model)
        for entry in full["tasks"]:
            entry |= {key: _absolute(entry[key]) for key in ("path", "eval_path") if key in entry}
        full["train"] = {**DEFAULTS, **self.train}
        if "num_train_epochs" in self.train and "max_steps" not in self.train:
            del full["train"]["max_steps"]
        return RESOLVED + yaml.safe_dump(full, sort_keys=False, allow_unicode=True)


def _least(shots: int | None, task: Task) -> int | None:
    """Training rows of a target: no more than either limit allows."""
    limits = [limit for limit in (shots, task.source.limit_train) if limit is not None]
    return min(limits, default=None)


def _absolute(path: str) -> str:
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


def load_recipe(path: str | Path, **changes: Any) -> Recipe:
    """Read and check a recipe, with other keys changed.

    Raises:
        PemlError: naming the file, the line or key, and what is allowed.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise PemlError(f"{path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    return validated({**data, **changes}, path)


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice: YAML would forget the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        PemlError: there is none, or its line that is no YAML.
    """
    path = Path(path)
    try:
        return yaml.load(_found(path).read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise PemlError(
            f"there is no recipe {path}: give a file, or one of the package ({', '.join(sorted(SHIPPED))})"
        ) from None
    except IsADirectoryError:
        raise PemlError(f"{path} is a folder: give the recipe, a YAML file") from None
    except UnicodeDecodeError as error:
        raise PemlError(f"{path} is not UTF-8 (byte {error.start}): save the recipe as UTF-8") from None
    except (RecursionError, MemoryError):
        raise PemlError(f"{path} is nested too deep to be a recipe") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PemlError(f"{path}{line} is not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise PemlError(f"{path} is not valid YAML: {one_line(error)}") from None


def _found(path: Path) -> Path:
    """A recipe's file; a bare name that is none may be a recipe of the package, as `toy` is a model of it."""
    return SHIPPED[path.name] if str(path) in SHIPPED and not path.exists() else path


def validated(data: dict[str, Any], path: str | Path) -> Recipe:
    """The recipe that a mapping says, with the file in front of what is wrong with it.

    Raises:
        PemlError: naming the file, the key, and what is allowed.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise PemlError(f"{path}: {_problem(error)}") from None
    except PemlError as error:
        raise PemlError(f"{path}: {error}") from None


def _problem(error: ValidationError) -> str:
    location = error.errors(include_url=False)[0]["loc"]
    sections: Mapping[str, type[Section]] = {"mixing": MixingSection, "tune": Tune, "tuned": Tuned, "compare": Compare}
    section = sections.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
    return first_problem(error, list(section.model_fields), FOREIGN_KEYS)

"""The recipe: one YAML file that says everything about a run, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from transformers import TrainingArguments

from peml.config import PemlConfig
from peml.errors import PemlError
from peml.methods import method, named
from peml.mixing import Mixing
from peml.tasks import FileSource, HubSource, Task, suite_tasks
from peml.tasks.files import READERS

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


def _texts(value: Any) -> Any:
    # YAML reads yes, no and numbers as something else than the words that a task wants.
    def text(item: Any) -> str:
        return ("true" if item else "false") if isinstance(item, bool) else str(item)

    return [text(item) for item in value] if isinstance(value, list) else value


Texts = Annotated[list[str], BeforeValidator(_texts)]


class Section(BaseModel):
    """A part of the recipe; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SuiteEntry(Section):
    """Tasks of a built-in suite.

    Args:
        suite: name of the suite.
        include, exclude: tasks to take or leave; None: all.
        limit_train, limit_eval: most rows of each task, drawn by seed.
        weight: of each of the tasks in the loss.
    """

    suite: str
    include: list[str] | None = None
    exclude: list[str] | None = None
    limit_train: int | None = Field(None, gt=0)
    limit_eval: int | None = Field(None, gt=0)
    weight: float = Field(1.0, gt=0)


class OwnEntry(Section):
    """A task on the user's own rows; `path`, `split` and `revision` as in `datasets.load_dataset`.

    Args:
        name: the task's name.
        path: file (jsonl, json, csv, tsv, parquet), local folder, or Hub id.
        eval_path: file with rows to evaluate on; without one, `eval_fraction` of the training rows is held out.
        subset: configuration name of a Hub data set.
        split: names of the training and evaluation splits of a Hub data set.
        kind, prompt, choices, answer, labels, metrics: as in `peml.Task`.
    """

    name: str
    path: str
    eval_path: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: dict[Literal["train", "eval"], str] = {}
    eval_fraction: float | None = Field(None, gt=0, lt=1)
    limit_train: int | None = Field(None, gt=0)
    limit_eval: int | None = Field(None, gt=0)
    kind: Literal["choose", "generate"]
    prompt: str
    answer: str
    choices: Texts | str | None = None
    labels: dict[Any, Any] = {}
    metrics: list[str] = []
    max_new_tokens: int = Field(16, gt=0)
    length_normalization: bool = False
    weight: float = Field(1.0, gt=0)


class MixingSection(Section):
    """How tasks share an epoch and a batch; see `peml.mixing`."""

    by: Literal["proportional", "temperature", "equal"] = "temperature"
    temperature: float = Field(2.0, gt=0)
    cap: int | None = Field(None, gt=0)
    batches: Literal["mixed", "homogeneous"] = "mixed"


_ARGUMENTS = {f.name for f in dataclasses.fields(TrainingArguments)}
_OWN_ARGUMENTS: Mapping[str, tuple[type, ...]] = {
    "dtype": (str,),
    "attn_implementation": (str,),
    "max_length": (int,),
    "prompt_learning_rate": (float, int),
    "architecture_learning_rate": (float, int),
    "finetune_fraction": (float, int),
}
DEFAULTS: Mapping[str, Any] = {
    "max_length": 512,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "max_steps": 1000,
    "logging_steps": 10,
    "warmup_steps": 0.05,
    "lr_scheduler_type": "linear",
    "seed": 0,
    "dtype": "auto",
    "finetune_fraction": 0.1,
}


class Recipe(Section):
    """Model, tasks, method and training of a run.

    Args:
        model: Hub id or local folder; "toy" is the small model in the package.
        tasks: suites and own tasks, in any number.
        method: a name from `peml methods`.
        set: changes to the method, e.g. `{adapter.r: 16, prompt.num_virtual_tokens: 32}`.
        mixing: how tasks share a batch.
        balance: how tasks share the loss; "equal" is the mean over tasks.
        train: names of `TrainingArguments`, and `dtype`, `attn_implementation`, `max_length`,
            `prompt_learning_rate`, `architecture_learning_rate`, `finetune_fraction`.
        evaluate_before: measure the base model too, before training.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    tasks: list[SuiteEntry | OwnEntry] = Field(min_length=1)
    method: str = "peml"
    set: dict[str, Any] = {}
    mixing: MixingSection = MixingSection()
    balance: Literal["equal"] = "equal"
    train: dict[str, Any] = {}
    evaluate_before: bool = True

    @model_validator(mode="before")
    @classmethod
    def _entries(cls, data: Any) -> Any:
        # Deciding by key, not by trial, keeps pydantic from reporting both readings of a faulty entry.
        if isinstance(data, dict) and isinstance(data.get("tasks"), list):
            data = dict(data)
            data["tasks"] = [_entry(i, raw) for i, raw in enumerate(data["tasks"])]
        return data

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        unknown = [key for key in self.train if key not in _ARGUMENTS and key not in _OWN_ARGUMENTS]
        if unknown:
            raise PemlError(
                f"train.{unknown[0]} is not a training argument{_near(unknown[0], _ARGUMENTS | set(_OWN_ARGUMENTS))}"
            )
        for key, kinds in _OWN_ARGUMENTS.items():
            value = self.train.get(key)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise PemlError(f"train.{key} must be {' or '.join(k.__name__ for k in kinds)}, not {value!r}")
        if not 0 <= self.train.get("finetune_fraction", 0) < 1:
            raise PemlError(f"train.finetune_fraction must be in [0, 1), not {self.train['finetune_fraction']}")
        named(self.method)
        tasks = self.build_tasks()
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PemlError(f"tasks: {twice[0]!r} is there twice; give each task a name of its own")
        method(self.method, names, self.set)
        return self

    def build_tasks(self) -> list[Task]:
        """The tasks, in order; nothing is read yet."""
        return [task for entry in self.tasks for task in _build(entry, self.seed)]

    def task_weights(self) -> dict[str, float]:
        """Weight of each task in the loss."""
        return {task.name: entry.weight for entry in self.tasks for task in _build(entry, self.seed)}

    def config(self) -> PemlConfig:
        """The adapter's configuration."""
        names = [task.name for task in self.build_tasks()]
        return method(self.method, names, self.set, task_type="CAUSAL_LM")

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

    def training_arguments(self, output_dir: str) -> TrainingArguments:
        """What transformers' Trainer gets.

        Raises:
            PemlError: transformers refuses a value.
        """
        given = {k: v for k, v in {**DEFAULTS, **self.train}.items() if k not in _OWN_ARGUMENTS and k != "output_dir"}
        if "num_train_epochs" in self.train and "max_steps" not in self.train:
            given.pop("max_steps")
        rate = named(self.method).adapter
        given.setdefault("learning_rate", 3e-4 if rate is None else rate.learning_rate)
        given.setdefault("dataloader_pin_memory", torch.cuda.is_available())
        given.setdefault("save_strategy", "steps")
        given.setdefault("save_total_limit", 2)
        given |= {"output_dir": output_dir, "disable_tqdm": True, "remove_unused_columns": False}
        try:
            return TrainingArguments(**given)
        except (TypeError, ValueError) as error:
            raise PemlError(f"train: {str(error).strip()}") from error

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        full = self.model_dump(exclude_none=True)
        full["train"] = {**DEFAULTS, **self.train}
        return yaml.safe_dump(full, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        PemlError: naming the file, the line or key, and what is allowed.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PemlError(f"there is no recipe {path}") from None
    except IsADirectoryError:
        raise PemlError(f"{path} is a folder: give the recipe, a YAML file") from None
    except UnicodeDecodeError as error:
        raise PemlError(f"{path} is not UTF-8 (byte {error.start}): save the recipe as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PemlError(f"{path}{line} is not valid YAML: {error.problem or error.context}") from None
    if not isinstance(data, dict):
        raise PemlError(f"{path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise PemlError(f"{path}: {_first_problem(error, data)}") from None
    except PemlError as error:
        raise PemlError(f"{path}: {error}") from None


def _entry(index: int, raw: Any) -> Any:
    if isinstance(raw, Section):
        return raw
    if isinstance(raw, str):
        return SuiteEntry(suite=raw)
    if not isinstance(raw, dict):
        raise PemlError(f"tasks[{index}] must be a mapping with `suite`, or with `name` and `path`, not {raw!r}")
    kind = SuiteEntry if "suite" in raw else OwnEntry
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        label = raw.get("name") or raw.get("suite") or index
        raise PemlError(f"tasks[{label}]: {_first_problem(error, raw, kind)}") from None


def _first_problem(error: ValidationError, data: Any, kind: type[BaseModel] | None = None) -> str:
    """One sentence for the first thing that pydantic found."""
    problem = error.errors(include_url=False)[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, PemlError):
        return str(cause)
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        allowed = list((kind or _section_of(problem["loc"])).model_fields)
        if name in FOREIGN_KEYS and kind is None:
            return f"{key} is called `{FOREIGN_KEYS[name]}` here"
        return f"unknown key {key}{_near(name, allowed)}; allowed are {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"the key {key} is missing"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _section_of(location: tuple[int | str, ...]) -> type[BaseModel]:
    return MixingSection if location[0] == "mixing" and len(location) > 1 else Recipe


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _build(entry: SuiteEntry | OwnEntry, seed: int) -> list[Task]:
    """Tasks of one entry."""
    limits: dict[str, Any] = {"limit_train": entry.limit_train, "limit_eval": entry.limit_eval, "seed": seed}
    if isinstance(entry, SuiteEntry):
        tasks = suite_tasks(entry.suite, entry.include, entry.exclude)
        return [dataclasses.replace(t, source=dataclasses.replace(t.source, **limits)) for t in tasks]
    is_file = Path(entry.path).suffix.lower() in READERS and not Path(entry.path).is_dir()
    held_out = entry.eval_fraction
    source: FileSource | HubSource
    if is_file or entry.eval_path is not None:
        if held_out is None and entry.eval_path is None:
            held_out = 0.1
        source = FileSource(train=entry.path, eval=entry.eval_path, eval_fraction=held_out, **limits)
    else:
        evaluation = None if held_out else entry.split.get("eval", "validation")
        source = HubSource(
            path=entry.path,
            name=entry.subset,
            train=entry.split.get("train", "train"),
            eval=evaluation,
            revision=entry.revision,
            eval_fraction=held_out,
            **limits,
        )
    choices = tuple(entry.choices) if isinstance(entry.choices, list) else entry.choices
    labels = {_label(k): _label(v) for k, v in entry.labels.items()}
    return [
        Task(
            name=entry.name,
            kind=entry.kind,
            prompt=entry.prompt,
            answer=entry.answer,
            choices=choices,
            labels=labels,
            metrics=tuple(entry.metrics),
            max_new_tokens=entry.max_new_tokens,
            length_normalization=entry.length_normalization,
            source=source,
        )
    ]


def _label(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

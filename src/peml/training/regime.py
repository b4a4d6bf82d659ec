"""The section `regime` of a recipe: how the parts of a method are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, ValidationError

from peml.errors import PemlError
from peml.prompts import PrefixNAS
from peml.training.arguments import checked
from peml.training.entries import Section, first_problem
from peml.training.grouping import OnePlusN, Progressive, RetrainCluster


class Joint(Section):
    """One training of everything together."""

    name: Literal["joint"] = "joint"


class DistilThenAdapt(Section):
    """Multitask prompt tuning (arXiv:2303.02861, section 3): teachers, a student of all of them, adaptation.

    Args:
        sources: tasks with a teacher each, which the student learns from; None: all.
        targets: tasks of the final adapter; None: those that are no sources, or all if every task is one.
        distillation_weight: kappa, of both distillation losses; 0: no teachers.
        hidden_layers: whose hidden states are compared: "all", "last", or every k-th.
        shots: training rows of each target; None: all.
        teachers, student: what these stages have in `train` other than the recipe, e.g. `{max_steps: 300}`.
    """

    name: Literal["distil_then_adapt"] = "distil_then_adapt"
    sources: list[str] | None = None
    targets: list[str] | None = None
    distillation_weight: float = Field(0.9, ge=0)
    hidden_layers: Literal["all", "last"] | StrictInt = "all"
    shots: int | None = Field(None, gt=0)
    teachers: dict[str, Any] = Field(default_factory=dict)
    student: dict[str, Any] = Field(default_factory=dict)

    def source_names(self, tasks: Sequence[str]) -> list[str]:
        """Tasks with a teacher, in the recipe's order."""
        return list(tasks) if self.sources is None else [name for name in tasks if name in self.sources]

    def target_names(self, tasks: Sequence[str]) -> list[str]:
        """Tasks of the final adapter, in the recipe's order."""
        if self.targets is not None:
            return [name for name in tasks if name in self.targets]
        return [name for name in tasks if name not in self.source_names(tasks)] or list(tasks)

    def check(self, tasks: Sequence[str]) -> None:
        """Refuse names of tasks that the recipe has not.

        Raises:
            PemlError: naming the key and the task.
        """
        for key in ("sources", "targets"):
            given = getattr(self, key)
            if given is not None and not given:
                raise PemlError(f"regime.{key} is empty: leave it out, or name a task")
            for name in given or ():
                if name not in tasks:
                    raise PemlError(f"regime.{key} names {name!r}, which is no task here; there are {', '.join(tasks)}")
        if not isinstance(self.hidden_layers, str) and self.hidden_layers < 1:
            raise PemlError(f"regime.hidden_layers must be all, last, or 1 and more, not {self.hidden_layers}")


class Grow(Section):
    """Further tasks for the adapter of a finished run.

    Args:
        run: its folder.
        tasks: the new ones, the last of the recipe.
        freeze: "shared": train only what belongs to the new tasks alone, on their rows; "none": everything, on all.
        init: where the new tasks' own parameters start, as in `PemlModel.add_task`.
        beside: of an adapter with groups: the task whose groups they join, which may be the first of them; None: each
            has groups of its own.
    """

    name: Literal["grow"] = "grow"
    run: str
    tasks: list[str] = Field(min_length=1)
    freeze: Literal["shared", "none"] = "shared"
    init: str = "identity"
    beside: str | None = None

    def trained(self, tasks: Sequence[str]) -> list[str]:
        """Tasks whose rows are trained on."""
        return self.tasks if self.freeze == "shared" else list(tasks)

    def check(self, tasks: Sequence[str]) -> None:
        """Refuse new tasks that are not the last ones, or are all there is.

        Raises:
            PemlError: naming them.
        """
        if list(tasks)[-len(self.tasks) :] != self.tasks or len(self.tasks) >= len(tasks):
            raise PemlError(
                f"regime.tasks must be the last tasks of the recipe, behind the run's own, not {', '.join(self.tasks)}"
            )


class Sequential(Section):
    """One axis after the other, in as many steps as a joint training has.

    Args:
        order: which axis comes first; it is frozen while the other is trained. A search belongs to the prompt.
        split: share of the steps that the first axis gets; our choice: half.
    """

    name: Literal["sequential"] = "sequential"
    order: Literal["prompt_first", "adapter_first"] = "prompt_first"
    split: float = Field(0.5, gt=0, lt=1)

    def check(self, method: str, adapter: object, prompt: object) -> None:
        """Refuse a method that lacks one of the two.

        Raises:
            PemlError: naming what it lacks.
        """
        for axis, part in (("adapter", adapter), ("prompt", prompt)):
            if part is None:
                raise PemlError(
                    f"regime sequential trains adapter and prompt one after the other, and method {method!r} has no "
                    f"{axis}: use one with both, as lora+prefix and peml have, or the regime joint"
                )


class Searched(Section):
    """A regime that is about an architecture."""

    def check(self, method: str, adapter: object, prompt: object) -> None:
        """Refuse a method that searches nothing.

        Raises:
            PemlError: naming it, and those that do.
        """
        name = self.name  # type: ignore[attr-defined]
        if not isinstance(prompt, PrefixNAS):
            raise PemlError(
                f"regime {name} searches an architecture, and method {method!r} has none: use peml, prefix-nas or "
                "peml+mtl, or the regime joint"
            )
        if prompt.architecture is not None:
            raise PemlError(
                f"regime {name} searches an architecture, and this recipe imports one: leave out architecture, or the "
                "regime"
            )


class Bilevel(Searched):
    """Architecture and weights by turns, each on rows of its own (DARTS, arXiv:1806.09055).

    Args:
        held_out: share of each task's training rows that the architecture is trained on, and the weights are not.
        betas, weight_decay, max_grad_norm: of the architecture's Adam, as in DARTS's official code, whose clipping is
            of the weights'; its rate is `train.architecture_learning_rate`, here 3e-4 if it is not given.
    """

    held_out: float = Field(0.5, gt=0, lt=1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.999)
    weight_decay: float = Field(1e-3, ge=0)
    max_grad_norm: float = Field(5.0, ge=0)

    @property
    def learning_rate(self) -> float:
        """DARTS's, of the architecture."""
        return 3e-4


class Alternate(Bilevel):
    """First order: the architecture takes the weights as they are."""

    name: Literal["alternate"] = "alternate"


class Unrolled(Bilevel):
    """Second order: the architecture looks one step of the weights ahead.

    Args:
        epsilon: norm by which the weights are moved for the difference of gradients.
    """

    name: Literal["unrolled"] = "unrolled"
    epsilon: float = Field(0.01, gt=0)


class Retrain(Searched):
    """A joint search, then a fresh adapter with what it found, trained from the start in as many steps again."""

    name: Literal["retrain"] = "retrain"


Regime = (
    Joint
    | DistilThenAdapt
    | Grow
    | Sequential
    | Alternate
    | Unrolled
    | Retrain
    | OnePlusN
    | Progressive
    | RetrainCluster
)
"""The section of any regime."""

REGIMES: dict[str, Any] = {
    "joint": Joint,
    "distil_then_adapt": DistilThenAdapt,
    "grow": Grow,
    "sequential": Sequential,
    "alternate": Alternate,
    "unrolled": Unrolled,
    "retrain": Retrain,
    "one_plus_n": OnePlusN,
    "progressive": Progressive,
    "retrain_cluster": RetrainCluster,
}
"""Every regime that a recipe can name."""


def read_regime(raw: Any, default: str) -> Regime:
    """The section of a recipe: the name of a regime, or a mapping of its settings.

    Args:
        raw: what the recipe has.
        default: regime of the method, for a mapping without `name`.

    Raises:
        PemlError: naming the key.
    """
    if isinstance(raw, Section):
        return raw  # type: ignore[return-value]
    raw = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(raw, dict):
        raise PemlError(f"regime must be a name ({', '.join(REGIMES)}) or a mapping, not {raw!r}")
    settings = {"name": default, **raw}
    if settings["name"] not in REGIMES:
        raise PemlError(f"regime.name must be one of {', '.join(REGIMES)}, not {settings['name']!r}")
    kind = REGIMES[settings["name"]]
    for stage in ("teachers", "student"):
        if isinstance(settings.get(stage), dict):
            for key in settings[stage]:
                if key in ("dtype", "attn_implementation", "output_dir"):
                    raise PemlError(f"regime.{stage}.{key} cannot differ from the recipe: set train.{key}")
            try:
                settings[stage] = checked(settings[stage])
            except PemlError as error:
                raise PemlError(str(error).replace("train.", f"regime.{stage}.", 1)) from None
    try:
        section: Regime = kind.model_validate(settings)
        return section
    except ValidationError as error:
        raise PemlError(f"regime: {first_problem(error, list(kind.model_fields))}") from None

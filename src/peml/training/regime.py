"""The section `regime` of a recipe: how the parts of a method are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, StrictInt, ValidationError

from peml.errors import PemlError
from peml.training.arguments import checked
from peml.training.entries import Section, first_problem


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
    """

    name: Literal["grow"] = "grow"
    run: str
    tasks: list[str] = Field(min_length=1)
    freeze: Literal["shared", "none"] = "shared"
    init: str = "identity"

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


REGIMES: dict[str, Any] = {
    "joint": Joint,
    "distil_then_adapt": DistilThenAdapt,
    "grow": Grow,
}
"""Every regime that a recipe can name."""


def read_regime(raw: Any, default: str) -> Joint | DistilThenAdapt | Grow:
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
    kind: type[Joint] | type[DistilThenAdapt] | type[Grow] = REGIMES[settings["name"]]
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
        return kind.model_validate(settings)
    except ValidationError as error:
        raise PemlError(f"regime: {first_problem(error, list(kind.model_fields))}") from None

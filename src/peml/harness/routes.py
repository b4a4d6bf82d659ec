"""Which of the adapter's tasks answers the requests of a task of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from peml.errors import PemlError

Given = str | Sequence[str] | Mapping[str, str]
"""Routes as people give them: `glue_rte=rte;mmlu_*=mmlu`, a list of such, or a mapping."""


def read_routes(given: Given) -> dict[str, str]:
    """Names or patterns of lm-eval's tasks, and the adapter's task of each.

    Args:
        given: routes as text (with `;` between them, because lm-eval splits its arguments at commas), list or mapping.

    Raises:
        PemlError: a route without `=`, or two for one name.
    """
    if isinstance(given, Mapping):
        return {str(name): str(task) for name, task in given.items()}
    listed = given.split(";") if isinstance(given, str) else given
    routes: dict[str, str] = {}
    for each in listed:
        name, sign, task = (part.strip() for part in each.partition("="))
        if not each.strip():
            continue
        if not (name and sign and task):
            raise PemlError(f"route {each!r} must be HARNESS_TASK=TASK, as in glue_rte=rte")
        if routes.setdefault(name, task) != task:
            raise PemlError(f"{name} has two routes, to {routes[name]} and to {task}: give one")
    return routes


@dataclass(frozen=True)
class Routes:
    """From names of lm-eval to names of the adapter.

    A route for the very name comes first, then the adapter's task of the same name, then the first pattern that fits:
    `*=rte` is for what has no other. Nothing falls back to a task that nobody has named.

    Args:
        given: of `read_routes`.
        task_names: of the adapter.

    Raises:
        PemlError: a route to a task that the adapter has not.
    """

    given: Mapping[str, str]
    task_names: Sequence[str]

    def __post_init__(self) -> None:
        for name, task in self.given.items():
            if task not in self.task_names:
                raise PemlError(f"route {name}={task}: the adapter has the tasks {', '.join(self.task_names)}")

    def task_of(self, name: str | None) -> str:
        """The adapter's task.

        Args:
            name: of a task of lm-eval, of a sub-task where it is a group.

        Raises:
            PemlError: it has no route.
        """
        if name is None:
            raise PemlError("a request of lm-eval does not say which task it is of: it cannot be routed")
        if name in self.given:
            return self.given[name]
        if name in self.task_names:
            return name
        for pattern, task in self.given.items():
            if fnmatchcase(name, pattern):
                return task
        raise PemlError(
            f"task {name!r} of lm-eval has no route: the adapter has the tasks {', '.join(self.task_names)}; name one "
            f"of them with --harness-route {name}=TASK, or with route={name}=TASK among lm-eval's own --model_args"
        )

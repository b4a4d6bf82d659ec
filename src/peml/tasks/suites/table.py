"""The suites as one table, for the documentation."""

from peml.tasks.suites import SUITES, suite_tasks
from peml.tasks.suites.published import SuiteSource
from peml.tasks.task import Task

_HEAD = ("task", "Hub id", "configuration", "train", "evaluation", "kind", "metrics", "local files")


def table() -> str:
    """Markdown: what each task of the published suites is read from, asked as and measured by."""
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    for name, suite in SUITES.items():
        for task in suite_tasks(name):
            source = task.source
            if not isinstance(source, SuiteSource):
                continue
            group = next((group for group, members in suite.groups.items() if task.name in members), None)
            if group is None:
                lines.append(_row(f"{name}/{task.name}", task, source, ""))
            elif task.name == suite.groups[group][0]:
                # The tasks of a group differ in their names only.
                label = f"{name}/SUBJECT, {len(suite.groups[group])} of the group `{group}`"
                lines.append(_row(label, task, source, task.name))
    return "\n".join(lines) + "\n"


def _row(label: str, task: Task, source: SuiteSource, subject: str) -> str:
    where = source.published
    files = [
        name
        for layout in where.layouts
        for use in ("train", "eval")
        for names in layout.wanted(use).values()
        for name in names[:1]
    ]
    cells = (
        label,
        where.hub or "files only",
        where.config or "-",
        where.train if where.hub else "-",
        ", ".join(where.eval.values()) if where.hub else "-",
        task.kind,
        ", ".join(f"**{metric}**" if metric in task.score else metric for metric in task.metrics),
        ", ".join(dict.fromkeys(f"`{name}`" for name in files)),
    )
    return _line([cell.replace(subject, "SUBJECT") if subject else cell for cell in cells])


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"

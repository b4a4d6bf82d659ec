"""What is compared: each method with its settings on an equal budget, and the recipe of each of its jobs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from peml.config import PemlConfig
from peml.errors import PemlError
from peml.methods import WHERE, match_params, named, trainable_parameters
from peml.training.contenders import Compare, Contender, check_ranges, read_contender
from peml.training.predictions import fingerprint
from peml.training.ranges import Tune, ends
from peml.training.recipe import Recipe, validated
from peml.training.workbench import Workbench, prepare
from peml.tuning.space import flat
from peml.tuning.trials import with_section

_OWN = ("tune", "compare", "regime", "architecture", "tuned")
"""Keys of a recipe that go with its own method, or with no single run."""


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Args:
        name: in the tables.
        data: its recipe, without a seed.
        parameters: that it trains.
        sized: what was solved for the budget, by the keys of `set`.
        ranges: of its tuning; None: it is not tuned.
        drawn: what it trains by seed, where each seed draws an architecture; else nothing.
    """

    name: str
    data: Mapping[str, Any]
    parameters: int
    sized: Mapping[str, Any]
    ranges: Mapping[str, Any] | None = None
    drawn: Mapping[int, int] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return re.sub(r"[^\w+.-]+", "-", self.name).strip("-.")

    def recipe(self, seed: int, found: Recipe | None = None) -> Recipe:
        """The recipe of one run.

        Args:
            seed: of it.
            found: what a tuning has found.
        """
        data = dict(self.data) if found is None else _bare(found)
        if self.data.get("architecture") == "random":
            data["architecture"] = f"random:{seed}"
        return validated({**data, "train": {**data["train"], "seed": seed}}, f"compare.methods.{self.name}")

    def tuned_recipe(self, section: Tune | None, trials: int, seed: int) -> Recipe:
        """The recipe of the tuning.

        Args:
            section: `tune` of the recipe.
            trials: of every method alike.
            seed: of the trainings.
        """
        update = {"trials": trials, "ranges": dict(self.ranges or {})}
        return self.recipe(seed).model_copy(update={"tune": (section or Tune()).model_copy(update=update)})


@dataclass(frozen=True)
class Plan:
    """A comparison that has not begun.

    Args:
        recipe: that it starts from, with the section `compare` in force.
        entries: the methods.
        budget: trainable numbers.
        baseline: name of the method that the others are tested against.
        seeds: of the runs of each method.
        tasks: metrics of each, by name.
        rows: fingerprint of the rows of each, as the recipe's own seed draws them.
    """

    recipe: Recipe
    entries: tuple[Entry, ...]
    budget: int
    baseline: str
    seeds: tuple[int, ...]
    tasks: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, str]

    @property
    def section(self) -> Compare:
        """`compare` of the recipe."""
        assert self.recipe.compare is not None
        return self.recipe.compare

    def entry(self, name: str) -> Entry:
        """One of the methods."""
        return next(entry for entry in self.entries if entry.name == name)


def plan(recipe: Recipe, methods: Sequence[str] | None = None, **changes: Any) -> Plan:
    """Solve the sizes and check the recipe of every job, before anything is written.

    Args:
        recipe: whose tasks and training all methods share.
        methods: names; None: those of the recipe.
        changes: other keys of the section `compare`.

    Raises:
        PemlError: naming the method and the key.
    """
    section = recipe.compare or Compare()
    wanted = list(methods) if methods else list(section.methods)
    if len(set(wanted)) < 2 or len(set(wanted)) < len(wanted):
        raise PemlError(f"a comparison needs two or more different methods, not {', '.join(wanted) or 'none'}")
    contenders = {name: section.methods.get(name) or read_contender(name, None) for name in wanted}
    changes["methods"] = contenders
    changes["baseline"] = changes.get("baseline") or section.baseline or ("lora" if "lora" in wanted else wanted[0])
    section = section.model_copy(update={key: value for key, value in changes.items() if value is not None})
    if section.baseline not in wanted:
        raise PemlError(f"the baseline {section.baseline!r} is not among the methods {', '.join(wanted)}")
    bare = {name: _data(recipe, name, own) for name, own in contenders.items()}
    reference = _reference(recipe, section, wanted)
    first = validated(_seeded(bare[reference or wanted[0]], recipe.seed), "compare")
    bench = prepare(first, training=True)
    bench.check()
    budget = section.budget
    if not isinstance(budget, int):
        assert reference is not None
        budget = trainable_parameters(_config(bench, bare[reference], reference), bench.model)
    entries = []
    for name, own in contenders.items():
        fixed = name == reference or not own.match
        entries.append(_entry(name, own, bare[name], None if fixed else budget, bench))
        if section.trials:
            keeps = own.match or name == reference
            entries[-1] = _ranged(entries[-1], own, recipe, keeps, bench)
    _check_folders(entries)
    seeds = tuple(range(recipe.seed, recipe.seed + section.seeds))
    entries = [_drawn(entry, seeds, bench) for entry in entries]
    tasks = {name: tuple(task.metrics) for name, task in bench.tasks.items()}
    rows = {name: fingerprint((*bench.train[name], *bench.eval[name])) for name in bench.tasks}
    whole = recipe.model_copy(update={"compare": section})
    return Plan(whole, tuple(entries), budget, str(section.baseline), seeds, tasks, rows)


def _reference(recipe: Recipe, section: Compare, wanted: Sequence[str]) -> str | None:
    """The method that sets the budget; None: it is a number."""
    if isinstance(section.budget, int):
        return None
    if section.budget is not None:
        if section.budget not in wanted:
            raise PemlError(f"compare.budget names {section.budget!r}, which is not among {', '.join(wanted)}")
        return section.budget
    return recipe.method if recipe.method in wanted else wanted[0]


def _bare(recipe: Recipe) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(recipe.to_yaml())
    return {key: value for key, value in data.items() if key not in ("tune", "compare")}


def _data(recipe: Recipe, name: str, own: Contender) -> dict[str, Any]:
    """The recipe of one method; what `recipe` says of adapter, prompt, regime and architecture is its own method's."""
    method, data = own.method or name, _bare(recipe)
    settings = flat(data.pop("set", {}))
    if method != recipe.method:
        data = {key: value for key, value in data.items() if key not in _OWN}
        shared = {key: value for key, value in settings.items() if key.startswith("heads.") or key in WHERE}
        settings = shared
    data |= {"method": method, "set": {**settings, **flat(own.set)}, "train": {**data["train"], **own.train}}
    data |= {key: getattr(own, key) for key in ("regime", "architecture") if getattr(own, key) is not None}
    return data


def _seeded(data: Mapping[str, Any], seed: int) -> dict[str, Any]:
    random = {"architecture": f"random:{seed}"} if data.get("architecture") == "random" else {}
    return {**data, **random}


def _config(bench: Workbench, data: Mapping[str, Any], name: str) -> PemlConfig:
    recipe = validated(_seeded(data, bench.recipe.seed), f"compare.methods.{name}")
    return dataclasses.replace(bench, recipe=recipe).config()


def _entry(name: str, own: Contender, data: dict[str, Any], budget: int | None, bench: Workbench) -> Entry:
    config = _config(bench, data, name)
    if budget is None:
        return Entry(name, data, trainable_parameters(config, bench.model), {})
    try:
        matched = match_params(config, bench.model, budget)
    except PemlError as error:
        raise PemlError(
            f"compare.methods.{name}: {error}; give it other settings, or `match: false` to compare it as it is"
        ) from None
    sized = {
        f"{axis}.{field.name}": getattr(after, field.name)
        for axis in ("adapter", "prompt")
        if (before := getattr(config, axis)) is not None and (after := getattr(matched, axis)) is not None
        for field in dataclasses.fields(before)
        if getattr(before, field.name) != getattr(after, field.name)
    }
    # Said in full even where it is the default: a default may change, a budget must not.
    size = "adapter.r" if config.adapter is not None else "prompt.num_virtual_tokens"
    axis, _, key = size.partition(".")
    sized.setdefault(size, getattr(getattr(matched, axis), key))
    data = {**data, "set": {**data["set"], **sized}}
    return Entry(name, data, trainable_parameters(matched, bench.model), sized)


def _ranged(entry: Entry, own: Contender, recipe: Recipe, keeps: bool, bench: Workbench) -> Entry:
    """With the ranges of its tuning; none of them may change what the budget has made equal."""
    section = recipe.tune or Tune()
    mine = named(own.method or entry.name) is named(recipe.method)
    given = own.tune if own.tune is not None else section.ranges if mine else {}
    try:
        check_ranges(given)
    except PemlError as error:
        raise PemlError(f"compare.methods.{entry.name}: {error}") from None
    base = entry.recipe(recipe.seed)
    asked = validated({**_bare(base), "tune": {"ranges": given}}, f"compare.methods.{entry.name}")
    ranges = {}
    for key, wanted in (with_section(asked).tune or section).ranges.items():
        changes = [] if key.startswith("train.") or not keeps else ends(wanted)
        counts = {
            trainable_parameters(
                _config(bench, {**entry.data, "set": {**entry.data["set"], key: value}}, entry.name), bench.model
            )
            for value in changes
        }
        if counts <= {entry.parameters}:
            ranges[key] = wanted
        elif key in given:
            raise PemlError(
                f"compare.methods.{entry.name}: tuning {key} would change how much is trained, and budgets would not "
                "be equal: leave it out, or say `match: false`"
            )
    return dataclasses.replace(entry, ranges=ranges)


def _drawn(entry: Entry, seeds: Sequence[int], bench: Workbench) -> Entry:
    """With the recipe of every seed tried, and the sizes of architectures that seeds draw."""
    recipes = {seed: entry.recipe(seed) for seed in seeds}
    if entry.data.get("architecture") != "random":
        return entry
    configs = {seed: dataclasses.replace(bench, recipe=recipe).config() for seed, recipe in recipes.items()}
    return dataclasses.replace(entry, drawn={s: trainable_parameters(own, bench.model) for s, own in configs.items()})


def _check_folders(entries: Sequence[Entry]) -> None:
    names: dict[str, str] = {}
    for entry in entries:
        if not entry.folder or entry.folder.lower() in names:
            other = names.get(entry.folder.lower(), "nothing")
            raise PemlError(f"compare.methods: {entry.name!r} and {other!r} would have one folder: choose other names")
        names[entry.folder.lower()] = entry.name

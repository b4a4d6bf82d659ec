"""`PemlConfig`: task names, one adapter, one prompt, and where they attach."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

from packaging.version import InvalidVersion, Version
from peft import PeftConfig, PeftType

from peml.adapters import ADAPTERS, Adapter, AdapterConfig, GroupedAdapter
from peml.errors import PemlError
from peml.groups import Partition, level_at, read_groups
from peml.heads import Heads
from peml.prompts import PROMPTS, PromptConfig

LARGE = 1e30
"""No setting is as large: what is would only overflow later."""

HEADS: Mapping[str, type[Heads]] = {"Heads": Heads}
"""Every kind of heads."""

Part = TypeVar("Part", AdapterConfig, PromptConfig, Heads)


@dataclass
class PemlConfig(PeftConfig):
    """Configuration of one multi-task adapter: a point on the axes adapter x prompt.

    Args:
        task_names: names of the tasks; ids follow their order. Saved with the adapter.
        adapter: what is added to the frozen linear layers, e.g. `peml.LoRA(r=8)`; None: nothing.
        prompt: what is put in front of attention's keys and values, e.g. `peml.PrefixNAS()`; None: nothing.
        groups: which tasks share the adapter, and how deep: lists of task names, each with an adapter of its own in
            every layer, or levels `{until: SHARE, groups: all | each | lists}` from the bottom up; None: all share it.
        heads: what an encoder answers with, e.g. `peml.Heads(num_labels=(2, 3))`; None: the model's own output.
        target_modules: linear layers to adapt: names, a regular expression, or "all-linear".
        exclude_modules: layers to leave out, by name or regular expression.
        layers_to_transform: indices of the layers to adapt; None: all.
        layers_pattern: name of the module list that these indices count, where it is not the usual one.
        modules_to_save: modules of the base that are trained and saved in full.
        fuse_mlp: compute SwiGLU feed-forward blocks in one autograd function. Training then keeps fewer of their
            activations than the frozen model does, and computes one product twice. Results are the same.

    Raises:
        PemlError: no or repeated task names, neither adapter nor prompt, an unknown setting of one of them, or groups
            in which a task is missing or there twice.
    """

    task_names: list[str] = field(default_factory=list, metadata={"help": "Names of the tasks; ids follow the order."})
    adapter: AdapterConfig | None = field(default=None, metadata={"help": "Adapter of the linear layers, or None."})
    prompt: PromptConfig | None = field(default=None, metadata={"help": "Learned keys and values, or None."})
    groups: Any = field(default=None, metadata={"help": "Groups of tasks with an adapter of their own, or None."})
    heads: Heads | None = field(default=None, metadata={"help": "A classifier or regressor per task, or None."})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Linear layers to adapt: names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Module list that indices count."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved in full."})
    fuse_mlp: bool = field(default=False, metadata={"help": "Keep fewer activations of SwiGLU blocks in training."})
    peml_version: str | None = field(default=None, metadata={"help": "Version of peml that wrote this; filled in."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # The enum's member, not its name: transformers asks for `.value` where it loads adapters by itself.
        self.peft_type = PeftType("PEML")
        if isinstance(self.task_names, str):
            raise PemlError(f"task_names must be a list of names, not the text {self.task_names!r}")
        self.task_names = list(self.task_names or ())
        if not self.task_names:
            raise PemlError("task_names is empty: name at least one task")
        wrong = [name for name in self.task_names if not isinstance(name, str) or not name.strip()]
        if wrong:
            raise PemlError(f"task_names must be texts that are not empty, not {wrong[0]!r}")
        repeated = sorted(name for name, often in Counter(self.task_names).items() if often > 1)
        if repeated:
            raise PemlError(f"task_names repeats {', '.join(repeated)}: every task needs a name of its own")
        self.adapter = part_from_dict("adapter", ADAPTERS, self.adapter)
        self.prompt = part_from_dict("prompt", PROMPTS, self.prompt)
        self.heads = part_from_dict("heads", HEADS, self.heads)
        if self.adapter is None and self.prompt is None and self.heads is None:
            raise PemlError("nothing to train: give an adapter, a prompt, or both")
        self._check_types()
        self.set_groups(self.groups)
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        # Read from a file that has the weights too: what a fresh adapter would begin at is not asked for again.
        self.stored = self.peml_version is not None
        if self.peml_version is None:
            self.peml_version = version("peml")
        _check_version(self.peml_version)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """PEFT's own look at what a file holds, before it leaves out what it does not know."""
        if kwargs.get("peml_version") is not None:
            _check_version(kwargs["peml_version"])
        return super().check_kwargs(**kwargs)  # type: ignore[no-any-return]

    def _check_types(self) -> None:
        for axis, part in (("adapter", self.adapter), ("prompt", self.prompt), ("heads", self.heads)):
            if part is not None:
                _check(axis, part, {f.name: getattr(part, f.name) for f in dataclasses.fields(part)})
        lists: tuple[tuple[str, Any, str], ...] = (
            ("modules_to_save", list[str] | None, "module names"),
            ("layers_to_transform", list[int] | int | None, "layer indices"),
        )
        if not isinstance(self.fuse_mlp, bool):
            raise PemlError(f"fuse_mlp must be true or false, not {self.fuse_mlp!r}")
        for name, hint, what in lists:
            if not _fits(getattr(self, name), hint):
                raise PemlError(f"{name} must be a list of {what}, not {getattr(self, name)!r}")

    def set_groups(self, groups: Any) -> None:
        """Read the groups, before the adapter is attached; None: there are none.

        Raises:
            PemlError: they do not fit the tasks, or the adapter has something in common for all tasks.
        """
        self.groups = None if groups is None else read_groups(groups, self.task_names)
        if groups is None:
            return
        if self.adapter is None:
            raise PemlError("groups are of tasks that share an adapter, and there is none: leave them out")
        if self.adapter.feature_loss_weight > 0:
            raise PemlError("adapter.align compares all tasks, and groups keep them apart: leave one of them out")
        if self.adapter.rank_step(1) != self.adapter.rank_step(2):
            raise PemlError(
                'adapter.rank_mode "total" shares r among all tasks, and groups have several adapters: use "active"'
            )

    @property
    def needs_task(self) -> bool:
        """Whether a forward without `tasks=` is an error."""
        return self.heads is not None or self.adapter_needs_task or (self.prompt is not None and self.prompt.needs_task)

    @property
    def adapter_needs_task(self) -> bool:
        """Whether the adapter differs by task: because of its method, or of groups."""
        grouped = any(len(level.partition(self.task_names)) > 1 for level in self.groups or ())
        return self.adapter is not None and (self.adapter.needs_task or grouped)

    def build_adapter(self, in_features: int, out_features: int, depth: float | None) -> Adapter:
        """The adapter of one linear layer.

        Args:
            in_features: I of the layer.
            out_features: O of the layer.
            depth: where the layer's block is, as a share of the depth; None: it is in no block.
        """
        assert self.adapter is not None
        groups = self.partition(depth)
        if len(groups) == 1:
            return self.adapter.build(in_features, out_features, len(self.task_names))
        members = [self.adapter.build(in_features, out_features, len(group)) for group in groups]
        return GroupedAdapter(members, groups)

    def partition(self, depth: float | None) -> Partition:
        """Groups of task ids that a layer has; one if there are no groups."""
        if self.groups is None:
            return (tuple(range(len(self.task_names))),)
        return level_at(self.groups, depth).partition(self.task_names)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; adapter and prompt carry the name of their type."""
        out: dict[str, Any] = super().to_dict()
        out["adapter"] = part_to_dict(self.adapter)
        out["prompt"] = part_to_dict(self.prompt)
        out["heads"] = part_to_dict(self.heads)
        out["groups"] = None if self.groups is None else [level.to_json() for level in self.groups]
        if isinstance(out["target_modules"], set):
            out["target_modules"] = sorted(out["target_modules"])
        return out


def part_to_dict(part: AdapterConfig | PromptConfig | Heads | None) -> dict[str, Any] | None:
    """Settings of an adapter or prompt with its type, as stored in `adapter_config.json`."""
    return None if part is None else {"type": type(part).__name__, **dataclasses.asdict(part)}


def part_from_dict(axis: str, table: Mapping[str, type[Part]], given: Part | Mapping[str, Any] | None) -> Part | None:
    """The inverse of `part_to_dict`; configured objects pass through.

    Raises:
        PemlError: an unknown type or setting.
    """
    if given is None or not isinstance(given, Mapping):
        kinds = tuple(table.values())
        if given is not None and not isinstance(given, kinds):
            raise PemlError(f"{axis} must be one of {', '.join(table)}, not {type(given).__name__}")
        return given
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    kind = settings.pop("type", None)
    if kind not in table:
        raise PemlError(f"{axis} has unknown type {kind!r}; choose from {', '.join(table)}")
    return changed(axis, table[kind](), settings)


def changed(axis: str, part: Part, settings: Mapping[str, Any]) -> Part:
    """A copy of an adapter or prompt with other settings.

    Raises:
        PemlError: an unknown setting or a value of the wrong type; the message lists what there is.
    """
    _check(axis, part, settings)
    return dataclasses.replace(part, **settings)


def _check(axis: str, part: AdapterConfig | PromptConfig | Heads, settings: Mapping[str, Any]) -> None:
    names = {f.name for f in dataclasses.fields(part)}
    hints = typing.get_type_hints(type(part))
    for key, value in settings.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            did_you_mean = f"; did you mean {near[0]}?" if near else ""
            kind = type(part).__name__
            raise PemlError(f"{axis}.{key} is not a setting of {kind} ({', '.join(sorted(names))}){did_you_mean}")
        if not _fits(value, hints[key]):
            raise PemlError(f"{axis}.{key} must be {_readable(hints[key])}, not {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML or JSON can be what the annotation says."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return value in options
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and -LARGE < value < LARGE
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if typing.get_origin(hint) is Mapping:
        return isinstance(value, Mapping)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, hint)  # type: ignore[arg-type]
    if typing.get_origin(hint) in (tuple, list):
        return isinstance(value, tuple | list) and all(_fits(v, options[0]) for v in value)
    return any(_fits(value, option) for option in options)


def _readable(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list of " + _readable(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Mapping:
        return "a mapping"
    if isinstance(hint, type):
        return {"float": "a number", "int": "a whole number", "str": "text", "bool": "true or false"}.get(
            hint.__name__, "null" if hint is type(None) else hint.__name__
        )
    return " or ".join(_readable(option) for option in typing.get_args(hint))


def _check_version(written: Any) -> None:
    """Refuse what a later peml wrote: PEFT would leave out what this one does not know, and the adapter be another.

    Raises:
        PemlError: a later minor version, or none.
    """
    try:
        later = Version(written).release[:2] > Version(version("peml")).release[:2]
    except (InvalidVersion, TypeError):
        raise PemlError(f"peml_version of the adapter's configuration is no version: {written!r}") from None
    if later:
        raise PemlError(
            f"this adapter was written by peml {written}, and this is {version('peml')}: pip install -U peml"
        )

"""What a tuner has attached to a model: its layers, its prompt, the adapter in force, and their parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peml.adapters import Adapter
from peml.adapters.ahead import cores_ahead
from peml.attention import PromptHost
from peml.bank import BankLinear
from peml.config import PemlConfig
from peml.errors import PemlError
from peml.heads import HeadHost, TaskHeads
from peml.routing import Route

HOST, HEADS, HOOKS = "prompt_host", "head_host", "_peml_hooks"
"""Where the base model keeps its prompts, its heads, and the hooks that open a forward."""

ABLATED: Mapping[str, tuple[Any, ...]] = {
    "prompt": (PromptHost,),
    "adapter": (BankLinear,),
    "both": (BankLinear, PromptHost),
}
"""What `ablated` can switch off, and the layers that it is. Heads are none of it: without them is no answer."""


class Attached(BaseTuner):
    """The part of a tuner that says what there is."""

    peft_config: dict[str, PemlConfig]
    _selected: dict[str, int]
    _bank_layers: list[BankLinear] | None

    @property
    def adapter_in_force(self) -> str | None:
        """Name of the active adapter, as the layers have it: transformers' `set_adapter` tells only them."""
        # Asked several times in every forward: not by a walk over the model.
        layers: Iterator[Any] = itertools.chain(self._banks(), (self._prompt_host(), self._head_host()))
        layer = next((layer for layer in layers if layer is not None), None)
        return layer.active_adapters[0] if layer is not None and layer.active_adapters else None

    @property
    def config_in_force(self) -> PemlConfig | None:
        """Configuration of the active adapter."""
        return self.peft_config.get(self.adapter_in_force or "")

    def _prompt_host(self) -> PromptHost | None:
        host = getattr(self.model, HOST, None)
        return host if isinstance(host, PromptHost) else None

    @property
    def prompt(self) -> Any:
        """The prompt module of the active adapter, or None."""
        host, name = self._prompt_host(), self.adapter_in_force or ""
        return None if host is None or name not in host.peml_prompt else host.peml_prompt[name]

    def _head_host(self) -> HeadHost | None:
        host = getattr(self.model, HEADS, None)
        return host if isinstance(host, HeadHost) else None

    @property
    def heads(self) -> TaskHeads | None:
        """The heads of the active adapter, or None."""
        host, name = self._head_host(), self.adapter_in_force or ""
        return None if host is None or name not in host.peml_head else host.peml_head[name]  # type: ignore[return-value]

    def _hold(self, host: PromptHost | HeadHost, held: nn.ModuleDict, adapter_name: str, part: nn.Module) -> None:
        """Put an adapter's part among those that a host holds."""
        config = self.peft_config[adapter_name]
        trained = [(parameter, parameter.requires_grad) for parameter in host.parameters()]
        held[adapter_name] = part
        host.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]
        for parameter, requires_grad in trained:
            # A further adapter, perhaps for inference only, must not freeze the one in training.
            parameter.requires_grad = requires_grad

    def _banks(self) -> list[BankLinear]:
        # Asked in every forward, and to walk a large model takes as long as a layer.
        if self._bank_layers is None:
            self._bank_layers = [module for module in self.model.modules() if isinstance(module, BankLinear)]
        return self._bank_layers

    def _cores(self, route: Route | None) -> dict[nn.Module, Tensor]:
        """Cores of all layers for these rows, as far as they can be computed together."""
        return cores_ahead([adapter for bank in self._banks() if (adapter := bank.active()) is not None], route)

    def _active_config(self) -> PemlConfig:
        config = self.config_in_force
        if config is None:
            raise PemlError("no PEML adapter is active: call set_adapter() first")
        return config

    @contextmanager
    def ablated(self, part: str) -> Iterator[None]:
        """Switch off the `adapter`, the `prompt` or `both` inside the block, to see what they contribute.

        An adapter that is merged into the weights is taken out, and merged again afterwards.

        Raises:
            PemlError: an unknown part.
        """
        if part not in ABLATED:
            raise PemlError(f"there is no part {part!r} to switch off: choose {', '.join(ABLATED)}")
        layers: list[Any] = [
            m for m in self.model.modules() if isinstance(m, ABLATED[part]) and not m._disable_adapters
        ]
        merged = [(layer, list(layer.merged_adapters)) for layer in layers if layer.merged_adapters]
        try:
            for layer, _ in merged:
                layer.unmerge()
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False
            for layer, names in merged:
                if not layer.merged_adapters:
                    layer.merge(adapter_names=names)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of the active adapter by part: adapter, prompt, architecture, heads, other (`modules_to_save`)."""
        architecture = [] if self.prompt is None else self.prompt.architecture_parameters()
        chosen = {id(p) for p in architecture}
        parts = {
            "adapter": [p for adapter in self._adapters() for p in adapter.parameters()],
            "prompt": [] if self.prompt is None else [p for p in self.prompt.parameters() if id(p) not in chosen],
            "architecture": architecture,
            "heads": [] if self.heads is None else list(self.heads.parameters()),
        }
        ours = {id(p) for part in parts.values() for p in part}
        return parts | {"other": [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours]}

    def per_task_parameters(self) -> dict[int, tuple[int, ...]]:
        """`id` of every parameter that belongs to single tasks, with the task of each of its rows, or of all."""
        config = self.config_in_force
        count = 0 if config is None else len(config.task_names)
        found = {
            id(adapter.get_parameter(key)): tasks
            for adapter in self._adapters()
            for key, tasks in adapter.task_rows(count).items()
        }
        for owner in (part for part in (self.prompt, self.heads) if part is not None):
            found |= {id(owner.get_parameter(key)): tuple(range(count)) for key in owner.task_parameters}
        return found

    def active_parameters(self) -> dict[str, int]:
        """How many numbers of the active adapter's low-rank part work for each task, by its name."""
        names = self._active_config().task_names
        return {
            name: sum(adapter.num_active(task, len(names)) for adapter in self._adapters())
            for task, name in enumerate(names)
        }

    def _adapters(self) -> list[Adapter]:
        name = self.adapter_in_force or ""
        return [bank.peml_adapter[name] for bank in self._banks() if name in bank.peml_adapter]  # type: ignore[misc]


def count(parameters: list[nn.Parameter]) -> int:
    """Numbers in a list of parameters."""
    return sum(p.numel() for p in parameters)

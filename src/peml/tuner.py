"""`PemlModel`: attaches adapter and prompt to a model, opens the route of each forward, selects a task."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peml import attention, routing, saving
from peml.attached import HOOKS, HOST
from peml.attention import PromptHost
from peml.bank import BankLinear
from peml.clusters import Clusters
from peml.config import PemlConfig
from peml.errors import PemlError
from peml.groups import depth_of
from peml.heads import HeadHost
from peml.hooks import ForwardHooks
from peml.merging import Merging
from peml.mlp import fuse_mlps
from peml.prompts import SoftPrompt, WordPromptConfig
from peml.routing import Forward, Route, Tasks
from peml.siblings import group_siblings

HEADS_OF_PEFT = ("classifier", "score", "qa_outputs")
"""What PEFT adds to `modules_to_save` for a `task_type`, whether or not the model calls its head so."""


class PemlModel(Merging, Clusters):
    """A model with PEML adapters; made by `peft.get_peft_model(model, PemlConfig(...))`.

    `model(**batch, tasks=["rte", "sst2"])` routes each row; `tasks="rte"` routes all rows. Names or ids.
    """

    prefix: str = "peml_"
    tuner_layer_cls = BankLinear | PromptHost | HeadHost
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._selected: dict[str, int] = {}
        self._bank_layers: list[BankLinear] | None = None
        self._feature_losses: list[Tensor] | None = None
        self._apart: frozenset[Any] = frozenset()
        super().__init__(*args, **kwargs)
        self._install_hooks()

    # Attaching

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add the adapter's banks and its prompt; PEFT calls this for the first adapter and for later ones."""
        config = self.peft_config[adapter_name]
        for wanted in config.modules_to_save or ():
            if wanted not in HEADS_OF_PEFT and not any(
                name == wanted or name.endswith(f".{wanted}") for name, _ in model.named_modules()
            ):
                raise PemlError(f"modules_to_save names {wanted!r}, which this model has not")
        if config.heads is not None:
            config.heads.check(config.task_names)
            self._check_headless()
        if config.adapter is None:
            config.target_modules = DUMMY_TARGET_MODULES
        host = self._prompt_host()
        fresh = None
        # Adapters that are there already want a task for the probe; any will do.
        any_task = Forward(Route.of(0, config.task_names), {}, model=model, adapter=self.adapter_in_force)
        if config.prompt is not None and host is None:
            with routing.opened(any_task):
                fresh = attention.install(model)
        try:
            # Before any layer is touched: a model that cannot take this prefix is refused whole.
            host = host or fresh
            if host is not None and config.prompt is not None:
                config.prompt.num_parameters(host.shape, len(config.task_names))
                if config.prompt.at_input:
                    with routing.opened(any_task):
                        attention.check_soft(model, host)
                if isinstance(config.prompt, WordPromptConfig) and not config.stored:
                    attention.check_words(model, config.prompt)
            super().inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        except BaseException:
            if fresh is not None:
                attention.uninstall(model, fresh)
            raise
        group_siblings(model)
        if config.fuse_mlp and not fuse_mlps(model):
            warnings.warn(
                "fuse_mlp has no effect: no SwiGLU block of this model has all its layers adapted", stacklevel=2
            )
        self._bank_layers = None
        if fresh is not None:
            setattr(model, HOST, fresh)
        if host is not None and config.prompt is not None:
            self._add_prompt(host, adapter_name, low_cpu_mem_usage)
        if config.heads is not None:
            self._add_heads(adapter_name, low_cpu_mem_usage)

    def _create_and_replace(
        self,
        peft_config: PemlConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, BankLinear):
            layer = target
        elif isinstance(target, nn.Linear | Conv1D) or (hasattr(target, "in_features") and hasattr(target, "weight")):
            layer = BankLinear(target, current_key)
            self._replace_module(parent, target_name, layer, target)
        else:
            raise PemlError(f"target_modules matches {current_key}, a {type(target).__name__}: only linear layers fit")
        if peft_config.adapter_needs_task and ".experts." in f".{current_key}.":
            raise PemlError(
                f"{current_key} is an expert, which gets tokens picked from several rows: an adapter that differs by "
                f'task cannot follow them. Leave experts out with exclude_modules=r".*\\.experts\\..*"'
            )
        adapter = peft_config.build_adapter(layer.in_features, layer.out_features, depth_of(self.model, current_key))
        weight = layer.base_layer.weight
        if weight.device.type != "meta" and next(adapter.parameters()).device.type != "meta":
            # Weights stay fp32 whatever the base's dtype: they are cast where they are used.
            adapter.to(weight.device)
        layer.update_layer(adapter_name, adapter, tuple(peft_config.task_names))
        if adapter_name not in self.active_adapters:
            adapter.requires_grad_(False)

    @staticmethod
    def _check_target_module_exists(peft_config: PemlConfig, key: str) -> Any:
        # PEFT expands "all-linear" to full names, and does not look at layer indices for those.
        found = BaseTuner._check_target_module_exists(peft_config, key)
        # Heads read the states, not what BERT's own pooler makes of them: it would get no gradient.
        found = found and not (peft_config.heads is not None and key.split(".")[0] == "pooler")
        wanted = peft_config.layers_to_transform
        if not found or wanted is None:
            return found
        patterns = peft_config.layers_pattern or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        index = next((m.group(1) for p in patterns if (m := re.match(rf"(?:.*?\.)?{p}\.(\d+)\.", key))), None)
        return index is not None and int(index) in ([wanted] if isinstance(wanted, int) else wanted)

    def _prepare_adapter_config(self, peft_config: PemlConfig, model_config: dict[str, Any]) -> PemlConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active.

        Raises:
            PemlError: several adapters; they have tasks of their own, so a batch can be routed through one only.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise PemlError(f"one PEML adapter can be active at a time, not {', '.join(adapter_name)}")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; another one, if there is any, becomes active."""
        inactive = adapter_name not in self.active_adapters
        super().delete_adapter(adapter_name)
        self._selected.pop(adapter_name, None)
        self._only = {name: tasks for name, tasks in self._only.items() if name != adapter_name}
        if self.peft_config and not inactive:
            # Each layer has chosen from the adapters that it hosts itself, which need not be the same everywhere.
            self.set_adapter(min(self.peft_config))

    # Routing

    def select_task(self, task: str | int | None) -> None:
        """Choose the task that `merge_adapter` and `merge_and_unload` fold in, and that calls without `tasks=` mean.

        Raises:
            PemlError: an unknown task, or a change while another task is merged.
        """
        config, name = self._active_config(), self.adapter_in_force
        assert name is not None
        route = None if task is None else Route.of(task, config.task_names)
        layers = self._banks()
        if any(layer.merged for layer in layers):
            raise PemlError("a task is merged into the weights: call unmerge_adapter() before selecting another")
        for selected in (self._selected, *(layer.selected_task for layer in layers)):
            selected.pop(name, None)
            if route is not None:
                selected[name] = route.present[0]

    @contextmanager
    def routed(self, tasks: Tasks) -> Iterator[None]:
        """Route every forward in the block: for callers that cannot pass `tasks=`."""
        with routing.opened(Forward(self._route(tasks), model=self.model, adapter=self.adapter_in_force)):
            yield

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's, which drops `adapter_names` afterwards: rows would go through the active adapter without a word."""
        if kwargs.get("adapter_names") is not None:
            raise PemlError(
                "adapter_names= routes no PEML adapter: tasks= tells rows apart within one, and set_adapter() chooses "
                "among several"
            )
        yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model; `tasks=` as in `forward`."""
        return self.model.generate(*args, **kwargs)

    def _route(self, tasks: Tasks | None, rows: int | None = None) -> Route | None:
        """Tasks given here, or by a block around the call, or selected for good."""
        config, name = self.config_in_force, self.adapter_in_force
        if config is None or name is None:
            return None
        around = routing.surrounding(self.model, name)
        if tasks is not None:
            route: Route | None = Route.of(tasks, config.task_names)
        elif around is not None and around.route is not None:
            route = around.route
        else:
            route = Route.of(self._selected[name], config.task_names) if name in self._selected else None
        if route is None:
            if self._head() is not None:
                raise PemlError(
                    f"this adapter has a head per task: pass tasks= with one of {', '.join(config.task_names)} per row"
                )
            return None
        given = route.ids.shape[0]
        if rows is not None and given not in (1, rows):
            raise PemlError(f"`tasks=` has {given} entries but the batch has {rows} rows: give one task per row")
        if name in self._selected and route.present != (self._selected[name],) and self._merged(config):
            merged = config.task_names[self._selected[name]]
            raise PemlError(f"task {merged!r} is merged into the weights: call unmerge_adapter() to route other tasks")
        return route

    def _merged(self, config: PemlConfig) -> bool:
        return config.adapter_needs_task and any(bank.merged for bank in self._banks())

    def open_forward(
        self,
        tasks: Tasks | None,
        rows: int | None,
        mask: Tensor | None = None,
        text: tuple[Tensor, Tensor | None] | None = None,
    ) -> Forward:
        """Resolve the route of a batch, and compute its cores and its prefix."""
        route, name, kept = self._route(tasks, rows), self.adapter_in_force, self._kept
        ready = kept is not None and kept.every is not None and kept.adapter == name and not torch.is_grad_enabled()
        forward = Forward(
            route,
            model=self.model,
            adapter=name,
            rows=rows,
            cores={} if ready else self._cores(route),
            prepared=kept.prepared if ready and kept is not None else None,
            every=kept.every if ready and kept is not None else None,
            mask=mask,
            losses=self._open_losses(route),
            apart=self._apart,
        )
        return self.with_prefix(forward, text)

    def close_forward(self, forward: Forward) -> None:
        """Groups of which a layer was called with another input than the first, or before it, are groups no more.

        From the next forward on: this one may still be computed again by gradient checkpointing, in the same way.
        """
        self._apart |= set(forward.handed)
        forward.handed.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Without the losses of the last forward: their graph cannot be copied."""
        return self.__dict__ | {"_feature_losses": None}

    def _open_losses(self, route: Route | None) -> list[Tensor] | None:
        """The list that layers put losses on their features into, if this forward wants any."""
        config = self.config_in_force
        adapter = None if config is None else config.adapter
        wanted = adapter is not None and adapter.feature_loss_weight > 0 and self.training and torch.is_grad_enabled()
        wanted = wanted and any(bank.active() for bank in self._banks())
        self._feature_losses = [] if wanted else None
        if wanted and route is None:
            raise PemlError("training with adapter.align compares tasks: pass tasks= with one task per row")
        return self._feature_losses

    def penalties(self) -> dict[str, Tensor]:
        """Terms to add to the loss of the last forward, weighted, by name: of the prompt, and of the features."""
        terms = {} if self.prompt is None else dict(self.prompt.penalties())
        if self._feature_losses:
            adapter, first = self._active_config().adapter, self._feature_losses[0]
            assert adapter is not None
            mean = torch.stack([loss.to(first.device) for loss in self._feature_losses]).mean()
            terms["align"] = adapter.feature_loss_weight * mean
        return terms

    def counts_positions(self) -> bool:
        """Whether the model counts positions from the left, as decoders do."""
        host = self._prompt_host()
        return host is not None and host.causal

    def reads_input(self) -> bool:
        """Whether every row has a prompt of its own, made from its text."""
        host = self._prompt_host()
        prompt = None if host is None else host.active()
        return isinstance(prompt, SoftPrompt) and prompt.reads_input

    def _install_hooks(self) -> None:
        if HOOKS not in self.model.__dict__:
            # In the model's own dict: the hooks are no module of it, but go where it goes, deep copies included.
            self.model.__dict__[HOOKS] = ForwardHooks(self, self.model)

    # Saving and loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return saving.without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PemlConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        renamed: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        saving.check_fit(model, adapter_name, renamed)
        return renamed

"""From an adapter to plain weights: fold one task, merge it, take everything out of the model again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peml import attention
from peml.attached import HEADS, HOOKS, HOST, Attached
from peml.bank import BankLinear
from peml.errors import PemlError
from peml.mlp import separate_mlps
from peml.routing import Route


class Merging(Attached):
    """The part of a tuner that turns an adapter into weights."""

    def fold(self, task: str | int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Every layer's plain low-rank pair for one task: `down [R', I]` and `up [R', O]` by module path, scale 1.

            W x + up' down x

        It is a LoRA of `config.adapter.folded_rank` with lora_A = down and lora_B = up'; a prefix is not part of it.

        Args:
            task: name or id; None: the selected one, or none where the adapter needs none.

        Raises:
            PemlError: an unknown task, none given where one is needed, or an adapter that is routed by its input.
        """
        config, name = self._active_config(), self.adapter_in_force
        assert name is not None
        chosen = None if task is None else Route.of(task, config.task_names).present[0]
        return {
            path: module.fold(name, chosen)
            for path, module in self.model.named_modules()
            if isinstance(module, BankLinear) and name in module.peml_adapter
        }

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold the selected task into the base weights and return the plain base model.

        Raises:
            PemlError: the adapter has a prompt, or needs a task and none is selected.
        """
        if self._active_config().prompt is not None:
            raise PemlError(
                "a learned prefix cannot be folded into weights: keep the adapter, or call merge_adapter(), "
                "which folds the low-rank part and leaves the prefix in place"
            )
        if self.heads is not None:
            raise PemlError(
                "heads cannot be folded into weights: keep the adapter, or call merge_adapter(), which folds the "
                "low-rank part and leaves the heads in place"
            )
        if not any(bank.merged for bank in self._banks()):
            self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        return self._unload(progressbar)

    def unload(self) -> nn.Module:
        """Return the plain base model with its own weights, whether or not a task is merged into them."""
        for bank in self._banks():
            if bank.merged:
                bank.unmerge()
        return self._unload()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Fold the selected task's low-rank update into the weights; a prefix stays as it is."""
        self._check_selected()
        merged = [bank for bank in self._banks() if bank.merged]
        self._check_own_weights()
        try:
            super().merge_adapter(*args, **kwargs)
        except BaseException:
            # All or nothing: a layer that refuses must not leave those before it merged.
            for bank in self._banks():
                if bank.merged and bank not in merged:
                    bank.unmerge()
            raise

    def _check_own_weights(self) -> None:
        """Refuse layers that share one weight: it cannot take the updates of both."""
        owners: dict[int, str] = {}
        for bank in self._banks():
            weight = getattr(bank.base_layer, "weight", None)
            if weight is not None and owners.setdefault(id(weight), bank.label) != bank.label:
                other = owners[id(weight)]
                raise PemlError(f"{bank.label} and {other} share one weight, which cannot take the updates of both")

    def _check_selected(self) -> None:
        config = self._active_config()
        foldable = config.adapter is None or config.adapter.foldable
        if config.adapter_needs_task and foldable and self.adapter_in_force not in self._selected:
            names = ", ".join(config.task_names)
            raise PemlError(f"merging needs one task: call select_task() with one of {names} first")

    def _unload(self, progressbar: bool = False) -> nn.Module:
        """Take everything of ours out of the model, and leave its weights as they are now."""
        host = self._prompt_host()
        if host is not None:
            delattr(self.model, HOST)
            attention.uninstall(self.model, host)
        if self._head_host() is not None:
            delattr(self.model, HEADS)
        separate_mlps(self.model)
        self._remove_hooks()
        return self._unload_and_optionally_merge(merge=False, progressbar=progressbar)  # type: ignore[no-any-return]

    def _remove_hooks(self) -> None:
        hooks = self.model.__dict__.pop(HOOKS, None)
        if hooks is not None:
            hooks.remove()

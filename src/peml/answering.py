"""The part of a tuner that gives an encoder its heads, and every output its logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft.utils.integrations import init_empty_weights
from torch import Tensor

from peml.attached import HEADS, Attached
from peml.errors import PemlError
from peml.heads import HeadHost, Heads, TaskHeads, answered, apart
from peml.routing import Forward, Route, Tasks


class Answering(Attached):
    """Adds heads, and lets them answer."""

    def _route(self, tasks: Tasks | None, rows: int | None = None) -> Route | None:
        raise NotImplementedError

    def _check_headless(self) -> None:
        """Refuse a model that answers by itself, or reads a text twice.

        Raises:
            PemlError: it has a head of its own, or is an encoder-decoder.
        """
        name = type(self.model).__name__
        if getattr(self.model, "base_model", self.model) is not self.model:
            raise PemlError(
                f"{name} has a head of its own: load the bare model, AutoModel.from_pretrained(...), for heads"
            )
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise PemlError(
                f"{name} is an encoder-decoder, which answers in words: leave heads out, or load its encoder"
            )

    def _add_heads(self, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        config = self.peft_config[adapter_name]
        assert config.heads is not None
        self._check_layers(config.heads)
        host = self._head_host()
        if host is None:
            host = HeadHost()
            setattr(self.model, HEADS, host)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            heads = config.heads.build(self._width())
        device = next(p for name, p in self.model.named_parameters() if not name.startswith(HEADS)).device
        if "meta" not in (device.type, heads.weight.device.type):
            heads.to(device)
        self._hold(host, host.peml_head, adapter_name, heads)

    def _check_layers(self, heads: Heads) -> None:
        settings: Any = getattr(self.model, "config", None)
        last: Any = getattr(settings, "num_hidden_layers", None)
        wrong = [layer for layer in heads.layers or () if last is not None and not -last - 1 <= layer <= last]
        if wrong:
            raise PemlError(
                f"heads.layers names layer {wrong[0]}, but {type(self.model).__name__} has 0 to {last}, and "
                f"-{last + 1} to -1"
            )

    def _width(self) -> int:
        """Of the states that the model gives out."""
        config: Any = getattr(self.model, "config", None)
        for key in ("hidden_size", "d_model", "dim", "n_embd"):
            if isinstance(width := getattr(config, key, None), int):
                return width
        raise PemlError(f"{type(self.model).__name__} does not say how wide its states are: it cannot have heads")

    def _head(self) -> TaskHeads | None:
        """The heads in force, which `disable_adapter()` switches off."""
        host = self._head_host()
        return None if host is None else host.active()

    def answer(self, forward: Forward, output: Any, mask: Tensor | None) -> Any:
        """A model's output, with the logits of the heads if there are any."""
        heads = self._head()
        if heads is None or forward.route is None:
            return output
        _check_per_row(forward.route)
        rows = output[0].shape[0]
        return answered(heads, output, mask, forward.route.rows(rows, output[0].device), forward.second)

    def reads_apart(self) -> bool:
        """Whether the texts of a pair are to be read apart."""
        heads = self._head()
        return heads is not None and heads.config.pairs == "apart"

    def reads_states(self) -> bool:
        """Whether heads read other layers than the last."""
        heads = self._head()
        return heads is not None and heads.config.layers is not None

    def split_pairs(self, call: dict[str, Any], tasks: Tasks | None) -> tuple[dict[str, Any], Tasks | None, Tensor]:
        """A call and its tasks with the second text of every pair in a row of its own.

        Returns:
            The call, its tasks, and the rows that are pairs.
        """
        ids = call.get("input_ids")
        route = self._route(tasks, None if ids is None else ids.shape[0])
        if route is not None:
            _check_per_row(route)
        call, pairs = apart(call)
        if route is not None and route.ids.shape[0] > 1:
            ids = route.ids.tolist()
            tasks = ids + [ids[row] for row in pairs.tolist()]
        return call, tasks, pairs

    def _grow_heads(self, num_labels: int, scale: tuple[float, float]) -> None:
        """One more head, behind the others."""
        host, config, old = self._head_host(), self._active_config(), self.heads
        assert host is not None and old is not None and config.heads is not None and self.adapter_in_force is not None
        config.heads = config.heads.grown(num_labels, *scale)
        grown = config.heads.build(self._width()).to(old.weight.device, old.weight.dtype).train(old.training)
        tasks, classes = old.bias.shape
        with torch.no_grad():
            for name, parameter in old.named_parameters():
                new = grown.get_parameter(name)
                (new[:tasks, :classes] if name in ("weight", "bias") else new[:tasks]).copy_(parameter)
                new.requires_grad = parameter.requires_grad
        host.peml_head[self.adapter_in_force] = grown

    def _shrink_heads(self, kept: Sequence[int]) -> None:
        """Some of the heads, in their order."""
        host, config, old = self._head_host(), self._active_config(), self.heads
        assert host is not None and old is not None and config.heads is not None and self.adapter_in_force is not None
        config.heads = config.heads.among(kept)
        fewer = config.heads.build(self._width()).to(old.weight.device, old.weight.dtype).train(old.training)
        with torch.no_grad():
            for name, parameter in fewer.named_parameters():
                rows = old.get_parameter(name)[list(kept)]
                parameter.copy_(rows[:, : parameter.shape[1]] if name in ("weight", "bias") else rows)
                parameter.requires_grad = old.get_parameter(name).requires_grad
        host.peml_head[self.adapter_in_force] = fewer


def _check_per_row(route: Route) -> None:
    if route.per_token:
        raise PemlError("a head answers for a whole row: give one task per row, not one per token")

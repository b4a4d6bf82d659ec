"""The part of a tuner that gives a model its prompt, and every forward its prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft.utils.integrations import init_empty_weights
from torch import Tensor

from peml.attached import Attached
from peml.attention import PromptHost, evaluating, soft
from peml.bank import BankLinear, device_of, stands_alone
from peml.errors import PemlError
from peml.prompts import (
    LayerPrefix,
    Prefix,
    PrefixGenerator,
    ProjectedPrefix,
    Prompt,
    SoftPrompt,
    Texts,
    WordPromptConfig,
)
from peml.routing import Forward, Route


class Prompting(Attached):
    """Adds prompts, and computes their keys and values."""

    _kept: Forward | None = None
    _last: tuple[Any, dict[int, LayerPrefix]] | None = None

    def _add_prompt(self, host: PromptHost, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        config = self.peft_config[adapter_name]
        assert config.prompt is not None
        config.prompt = config.prompt.fitted(host.shape)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            prompt = config.prompt.build(host.shape, len(config.task_names))
        device = next(p for p in self.model.parameters()).device
        if "meta" not in (device.type, next(prompt.parameters()).device.type):
            prompt.to(device)
            if isinstance(config.prompt, WordPromptConfig) and not config.stored:
                self._begin_at_words(prompt, config.prompt)
        self._hold(host, host.peml_prompt, adapter_name, prompt)

    @torch.no_grad()
    def _begin_at_words(self, prompt: Any, config: WordPromptConfig) -> None:
        """Set a prompt to words of the vocabulary, or to the keys and values that the model has for them."""
        lengths = config.num_virtual_tokens
        ids = soft.word_ids(self.model, config, lengths if isinstance(lengths, int) else max(lengths))
        if ids is None:
            return
        embeddings = self.model.get_input_embeddings()
        words = embeddings(ids.to(embeddings.weight.device))
        if isinstance(prompt, SoftPrompt):
            prompt.start_from(words)
        else:
            with evaluating(self.model), self.ablated("adapter"):
                found = soft.run(self.model, words[None], Forward(model=self.model))
            prompt.fill([found[slot] for slot in range(len(found))])

    def with_prefix(self, forward: Forward, text: tuple[Tensor, Tensor | None] | None) -> Forward:
        """The forward of a batch, with keys and values of the active prompt, computed once.

        Args:
            forward: with its route.
            text: ids or embeddings of the batch and which of them a prompt may read; None: not known.

        Raises:
            PemlError: the prompt wants tasks, or a text, that the call has not given.
        """
        host = self._prompt_host()
        prompt = None if host is None else host.active()
        if prompt is None:
            return forward
        route, config = forward.route, self._active_config()
        kept = self._kept if prompt is self.prompt else None
        if kept is not None and kept.prefix is not None and kept.adapter == forward.adapter:
            return self._from_kept(forward, kept)
        if prompt.needs_task and route is None:
            raise self._no_task()
        assert host is not None
        present = None if route is None else route.present
        if isinstance(prompt, Prefix):
            prefix = {slot: layer for slot, layer in enumerate(prompt(present)) if layer is not None}
            return replace(forward, prefix=prefix, generated=prompt.generated)
        assert isinstance(prompt, SoftPrompt)
        tokens = prompt(present, self._texts(text, route) if prompt.reads_input else None)
        if soft.sees_ahead(self.model, host):
            if route is not None and route.per_token:
                raise PemlError(
                    "a prompt at the input cannot serve rows that pack several tasks: give one task per row"
                )
            # There they see the text, so that nothing can be computed before it.
            if prompt.needs_task and not prompt.reads_input and route is not None and forward.rows is not None:
                tokens = tokens[route.groups(forward.rows, tokens.device)]
            return replace(forward, prefix={}, front=tokens)
        own = route if prompt.reads_input else None
        if config.needs_task and not prompt.reads_input and route is not None:
            # What a shared prompt becomes differs by task where the adapter does.
            tokens, own = tokens.expand(len(route.present), -1, -1), Route.of_ids(route.present)
        inside = replace(forward, route=own, cores=self._cores(own))
        prefix = soft.run(self.model, tokens, inside)
        offset = soft.position_offset(self.model, tokens.shape[1])
        return replace(forward, prefix=prefix, generated=True, by_row=prompt.reads_input, offset=offset)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What no text changes is computed once, for all forwards inside the block, in all threads.

        Keys and values of every task, and what layers need of their banks and cores. For serving: the weights are not
        to change inside the block. A prompt that is made from the text, or goes through an encoder with it, is
        computed as ever, and so are layers whose bank is put together from the tasks present.
        """
        config, layers = self._active_config(), self._banks()
        all_tasks = Route.of_ids(range(len(config.task_names)))
        every = all_tasks if config.needs_task else None
        prompt, host = self.prompt, self._prompt_host()
        reads = isinstance(prompt, SoftPrompt) and (
            prompt.reads_input or (host is not None and soft.sees_ahead(self.model, host))
        )
        with torch.no_grad():
            forward = Forward(every, model=self.model, adapter=self.adapter_in_force, cores=self._cores(every))
            if prompt is not None and not reads:
                with evaluating(self.model):
                    forward = self.with_prefix(forward, None)
            ready = _lasting(layers, all_tasks)
        self._kept = replace(forward, prepared={} if ready else None, every=all_tasks if ready else None)
        try:
            yield
        finally:
            self._kept = self._last = None

    def _no_task(self) -> PemlError:
        names = ", ".join(self._active_config().task_names)
        return PemlError(f"this adapter has a prompt per task: pass tasks= with one of {names} per row")

    def _from_kept(self, forward: Forward, kept: Forward) -> Forward:
        """A forward with its tasks' keys and values out of those of all."""
        assert kept.prefix is not None
        route, prefix = forward.route, kept.prefix
        if kept.route is None:
            return replace(forward, prefix=prefix, offset=kept.offset)
        if route is None:
            raise self._no_task()
        asked, last = (route.present, route.per_token), self._last
        if last is None or last[0] != asked:
            # The tasks of a batch seldom change from step to step.
            last = self._last = asked, {slot: _chosen(layer, *asked) for slot, layer in prefix.items()}
        return replace(forward, prefix=last[1], offset=kept.offset)

    @contextmanager
    def prompted_by(self, prompt: Prompt) -> Iterator[None]:
        """Another prompt in place of the active adapter inside the block, as if it were trained alone."""
        host = self._prompt_host()
        if host is None:
            raise PemlError("this model has not been given a prompt")
        with self.ablated("adapter"), host.standing_in(prompt):
            yield

    def _texts(self, text: tuple[Tensor, Tensor | None] | None, route: Route | None) -> Texts:
        """What a prompt reads of a batch."""
        assert route is not None
        if text is None:
            raise PemlError("this adapter's prompt is made from the text: call the model with input_ids=")
        given, mask = text
        if mask is None:
            raise PemlError(
                "this adapter's prompt is made from the text, which in training holds the answer too: pass input_mask= "
                "(rows x tokens), 1 on the tokens that may be read"
            )
        embeddings = self.model.get_input_embeddings()
        embedded = given if given.is_floating_point() else embeddings(given.to(embeddings.weight.device))
        if mask.shape != embedded.shape[:2] or not bool(mask.any(1).all()):
            raise PemlError(
                f"input_mask= is {list(mask.shape)} for texts of {list(embedded.shape[:2])}: it needs their shape, and "
                "some token to read in every row"
            )
        group = route.groups(len(embedded), embedded.device).expand(len(embedded))
        return Texts(embedded, mask.to(embedded.device).bool(), group)

    def collapse_prompt(self) -> None:
        """Replace a generated prefix by the table of keys and values that it has become.

        The generator is thrown away: the adapter gets smaller and faster, and cannot be searched further.
        """
        config, prompt = self._active_config(), self.prompt
        if not isinstance(prompt, PrefixGenerator | ProjectedPrefix):
            raise PemlError("there is no generated prefix to collapse")
        if isinstance(prompt, PrefixGenerator) and prompt.searching:
            prompt.derive()
        trained = next(prompt.parameters()).requires_grad
        host = self._prompt_host()
        assert host is not None
        config.prompt, table = prompt.collapse()
        table.requires_grad_(trained)
        assert self.adapter_in_force is not None
        host.peml_prompt[self.adapter_in_force] = table


def _chosen(layer: LayerPrefix, tasks: Sequence[int], per_token: bool) -> LayerPrefix:
    """The prefixes of some tasks out of those of all; side by side for rows that pack several."""
    if layer.keys.shape[0] == 1:
        return layer
    keys, values = layer.keys[list(tasks)], layer.values[list(tasks)]
    layer = layer._replace(keys=keys, values=values)
    return layer.side_by_side() if per_token and len(tasks) > 1 else layer


def _lasting(layers: Sequence[BankLinear], every: Route) -> bool:
    """Whether what layers need for a batch can be computed ahead for all tasks, whichever it has.

    Not where the core reads the input, or the bank holds the rows of the tasks present alone: all of them at once
    would cost every batch what the tasks cost together.
    """
    for layer in layers:
        adapter = layer.active()
        if adapter is None:
            continue
        if adapter.reads_input or not stands_alone(layer):
            return False
        if adapter.needs_task:
            one, all_ = (route.to(device_of(layer.base_layer)) for route in (Route.of_ids([0]), every))
            if any(a.shape != b.shape for a, b in zip(adapter.bank(one), adapter.bank(all_), strict=True)):
                return False
    return True

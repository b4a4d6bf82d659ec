"""Architecture steps on rows that the weights never see: first order, and looking one step of the weights ahead.

First order (DARTS, arXiv:1806.09055, section 2.3 with xi = 0) takes `grad_a L_val(w, a)`. Second order takes the
gradient of `L_val(w - xi grad_w L_tr(w, a), a)`, where a product with a Hessian is a difference of two gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peml.balance import CoBa
from peml.errors import PemlError
from peml.mixing import InTurn, MixtureSampler, split_off
from peml.training.regime import Bilevel, Unrolled
from peml.training.search import searching, steps_of_search
from peml.training.streaming import StreamedRows

if TYPE_CHECKING:
    from peml.training.trainer import MultiTaskTrainer

STATE = "architecture.safetensors"
"""File of a checkpoint that holds what the architecture's optimiser remembers."""

Gradient = Callable[[Sequence[nn.Parameter]], list[Tensor]]
"""Of a loss, at the present values of all parameters, for those given."""


@torch.no_grad()
def unrolled_gradient(
    train: Gradient,
    held_out: Gradient,
    weights: Sequence[nn.Parameter],
    rates: Sequence[float],
    architecture: Sequence[nn.Parameter],
    epsilon: float = 0.01,
) -> list[Tensor]:
    """Gradient of the held-out loss after one step of the weights, with respect to the architecture.

        w' = w - xi grad_w L_tr(w, a)       v = xi grad_w' L_val(w', a)       eps = epsilon / |v|
        grad_a L_val(w', a) - [grad_a L_tr(w + eps v, a) - grad_a L_tr(w - eps v, a)] / (2 eps)

    Paper: DARTS, arXiv:1806.09055, section 2.3, eq. 7 and 8, and its eps = 0.01 / |grad_w' L_val|, which this is where
    all weights have one xi: xi is inside v, because ours have a rate for each group. The weights end as they began, bit
    for bit. About four passes.

    Args:
        train: gradient of L_tr.
        held_out: gradient of L_val.
        weights: w.
        rates: xi of each of them.
        architecture: a.
        epsilon: how far the weights are moved for the difference, as a norm.
    """
    start = [w.detach().clone() for w in weights]
    count = len(architecture)
    try:
        for w, slope, rate in zip(weights, train(weights), rates, strict=True):
            w.sub_(rate * slope)
        both = held_out([*architecture, *weights])
        ahead = [rate * slope for rate, slope in zip(rates, both[count:], strict=True)]
        length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in ahead]))
        if length == 0:
            return both[:count]
        sides = []
        for eps in (epsilon / length, -epsilon / length):
            for w, old, v in zip(weights, start, ahead, strict=True):
                w.copy_(old + eps * v)
            sides.append(train(architecture))
        scale = length / (2 * epsilon)
        return [
            slope - scale * (plus - minus) for slope, plus, minus in zip(both[:count], sides[0], sides[1], strict=True)
        ]
    finally:
        for w, old in zip(weights, start, strict=True):
            w.copy_(old)


class ArchitectureSteps(TrainerCallback):
    """Before each step of the weights, one of the architecture, on rows set apart for it.

    The architecture is frozen but for these steps, so that the weights' optimiser, its clipping and DDP never see it;
    the weights are frozen in them. The rows of a step follow from its number, so that a resumed run has the same.

    Args:
        trainer: whose architecture is searched.
        settings: the regime.
        learning_rate: of Adam.
        finetune_fraction: share of the steps after the search.

    Raises:
        PemlError: there is no architecture to search, or something that it does not go with.
    """

    def __init__(
        self,
        trainer: MultiTaskTrainer,
        settings: Bilevel,
        learning_rate: float,
        finetune_fraction: float,
    ) -> None:
        self.trainer, self.settings = trainer, settings
        self._check()
        rows = trainer.train_dataset
        self.parameters: list[nn.Parameter] = trainer.tuner.parts()["architecture"]
        self.held_out = split_off(rows.row_tasks, trainer.task_names, settings.held_out, trainer.args.seed)
        self.steps = steps_of_search(trainer.args.max_steps, finetune_fraction)
        # Another seed than the weights' rows have: the two would come in the same order of tasks.
        self.order = list(self._sampler(self.steps, set(range(len(rows))) - set(self.held_out), trainer.args.seed + 1))
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def _check(self) -> None:
        trainer, name = self.trainer, self.settings.name  # type: ignore[attr-defined]
        args, balance = trainer.args, trainer.balance
        against = {
            f"{name} needs an architecture to search, and this adapter has none: use PrefixNAS, or the regime joint": (
                not trainer.tuner.parts()["architecture"]
            ),
            f"{name} needs train.max_steps, because each phase of it has rows of its own": args.max_steps <= 0,
            f"{name} sets rows of every task apart, which cannot be done with streaming: true": isinstance(
                trainer.train_dataset, StreamedRows
            ),
            f"{name} and balance: coba both set rows apart: use another balance": isinstance(balance, CoBa),
            f"{name} does not go with mixing.epochs, which counts the rows of a whole training": (
                trainer.mixing.epochs is not None
            ),
            f"{name} takes gradients that fp16 would have to scale: use bf16": args.fp16,
            f"{name} needs whole gradients, which no device has under FSDP or DeepSpeed: use DDP": (
                trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            ),
            f"{name} looks a plain step of the weights ahead, and this balance makes another one of their gradients: "
            "use the regime alternate, or another balance": (
                isinstance(self.settings, Unrolled) and balance.needs_gradients
            ),
        }
        for message, holds in against.items():
            if holds:
                raise PemlError(f"regime {message}")

    def _sampler(self, steps: int, without: set[int], seed: int) -> MixtureSampler:
        trainer, rows = self.trainer, self.trainer.train_dataset.row_tasks
        size, samples = trainer.args.train_batch_size, steps * trainer.step_rows
        return MixtureSampler(rows, trainer.mixing, seed, size, samples, trainer.task_names, without)

    def weight_rows(self) -> InTurn:
        """Rows of the weights: their own while the search goes on, then all.

        Our choice: a fine-tuned end should have seen what a joint training has seen; nothing is left to be chosen by
        the rows that were held out.
        """
        seed, rest = self.trainer.args.seed, self.trainer.args.max_steps - self.steps
        phases = [self._sampler(self.steps, set(self.held_out), seed)]
        return InTurn(*phases, *([self._sampler(rest, set(), seed + 2)] if rest > 0 else []))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step, unless the architecture rests or has been derived."""
        prompt = self.trainer.tuner.prompt
        if not searching(prompt) or self.trainer.schedule.progress < prompt.config.warmup_fraction:
            return
        gradient = self.gradient(state.global_step)
        with only(self.trainer.model, self.parameters):
            for parameter, slope in zip(self.parameters, gradient, strict=True):
                parameter.grad = slope
            if self.settings.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The architecture was trained: it counts among what was."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def gradient(self, step: int) -> list[Tensor]:
        """Gradient of the architecture before step number `step` of the weights."""
        held_out, trainer = self._batches(step), self.trainer
        if not isinstance(self.settings, Unrolled):
            return self._gradient(held_out, self.parameters)
        groups: Sequence[Mapping[str, Any]] = trainer.optimizer.param_groups
        weights = [p for group in groups for p in group["params"]]
        rates = [float(group["lr"]) for group in groups for _ in group["params"]]
        noise = _Noise(trainer.args.device)

        def train(wanted: Sequence[nn.Parameter]) -> list[Tensor]:
            # Dropout and draws of one and the same step, or their difference would drown that of the weights.
            with noise.again():
                return self._gradient(trainer.coming, wanted)

        return unrolled_gradient(
            train,
            lambda wanted: self._gradient(held_out, wanted),
            weights,
            rates,
            self.parameters,
            self.settings.epsilon,
        )

    def _batches(self, step: int) -> list[dict[str, Any]]:
        """As many rows as a step of the weights has, on this device."""
        trainer, args = self.trainer, self.trainer.args
        parts, size = args.gradient_accumulation_steps, args.train_batch_size
        batches = []
        for part in range(parts):
            begin = ((step * parts + part) * args.world_size + args.process_index) * size
            batches.append(trainer.data_collator([trainer.train_dataset[i] for i in self.order[begin : begin + size]]))
        return batches

    @torch.enable_grad()
    def _gradient(self, batches: Sequence[dict[str, Any]], wanted: Sequence[nn.Parameter]) -> list[Tensor]:
        """Of the loss over batches, over all devices."""
        trainer = self.trainer
        trainer.model.train()
        whole = trainer._get_num_items_in_batch(list(batches), trainer.args.device)
        assert whole is not None
        total = [torch.zeros_like(p) for p in wanted]
        with only(trainer.model, wanted):
            for batch in batches:
                inputs = trainer._prepare_inputs(batch)
                with trainer.compute_loss_context_manager():
                    loss = trainer.objective(inputs, whole, len(batches))
                for sum_, slope in zip(total, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
                    if slope is not None:
                        sum_ += slope
        return [trainer.accelerator.reduce(slope, "sum") for slope in total]

    def save(self, folder: str | Path) -> None:
        """Write what the optimiser remembers into a checkpoint."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{i}.{key}": value.contiguous() for i, own in state.items() for key, value in own.items()}
        save_file(tensors, Path(folder) / STATE)

    def load(self, folder: str | Path) -> None:
        """Take it from there.

        Raises:
            PemlError: it is missing or damaged.
        """
        path, state = Path(folder) / STATE, cast("dict[int, dict[str, Tensor]]", {})
        try:
            for key, value in load_file(path).items():
                number, _, name = key.partition(".")
                state.setdefault(int(number), {})[name] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise PemlError(f"{path} cannot be read ({error}): train from the start") from None


@contextmanager
def only(model: nn.Module, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """Freeze everything but these parameters inside the block."""
    kept = {id(p) for p in wanted}
    changed = [p for p in model.parameters() if p.requires_grad != (id(p) in kept)]
    try:
        for p in changed:
            p.requires_grad_(not p.requires_grad)
        yield
    finally:
        for p in changed:
            p.requires_grad_(not p.requires_grad)


class _Noise:
    """The random numbers from here on, as often as they are wanted.

    Args:
        device: that draws, beside the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(own) for own in self.devices)]
        # What comes between must not draw the same numbers.
        for own in (torch.device("cpu"), *self.devices):
            torch.rand(1, device=own)

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.states[0])
            for own, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, own)
            yield

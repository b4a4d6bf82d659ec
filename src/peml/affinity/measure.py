"""How much tasks want the same of what they share: cosines of their gradients, and what a step for one does to another.

    cosine      z_ij = g_i . g_j / (|g_i| |g_j|),  g_i the mean over batches of the gradient of L_i
    look-ahead  z_ij = mean over batches of  1 - L_j(w - eta g_i) / L_j(w)
    agreement   a_i = cosine of g_i over every other batch and g_i over the rest

Paper: gradient similarity decides what is shared in Progressive Task-specific Adaptation, arXiv:2509.19602; look-ahead
is inter-task affinity, TAG, arXiv:2109.04617, section 3. Our choice: gradients of the up-projections alone, because
behind a short warm-up those of the random down-projections come through factors that are all but zero; cosines of mean
gradients, because those of single batches are drawn towards zero by what is peculiar to their rows; the step of
look-ahead is along a batch's g_i in all of the adapter, as long as `step` times its weights, in place of TAG's
optimiser step, so that tasks with large losses do not look further. Agreement, our choice too, is what a task's cosine
with itself comes to on half of the rows: where it is small, cosines with others are chance.

Letters: `T` tasks, `K` batches, `L` blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from peml.bank import BankLinear
from peml.errors import PemlError
from peml.groups import depth_of, stack_of
from peml.training.data import TaskRows
from peml.training.trainer import MultiTaskTrainer


@dataclass(frozen=True)
class Measured:
    """What was measured, on the CPU in fp64.

    Args:
        cosines: `[T, T]`.
        spread: standard deviation over the batches of the cosines of each by itself, `[T, T]`.
        blocks: cosines by block, `[T, T]`, from the bottom up; of layers in no stack under their own path.
        depths: middle of each of these blocks as a share of its stack's depth; of layers in no stack None.
        lookahead: mean over the batches, `[T, T]`, row i what a step for task i does to all; None: not asked for.
        agreement: `[T]`; None: there was but one batch.
    """

    cosines: Tensor
    spread: Tensor
    blocks: dict[str, Tensor]
    depths: dict[str, float | None]
    lookahead: Tensor | None
    agreement: Tensor | None


def measure(
    trainer: MultiTaskTrainer, rows: TaskRows, *, batches: int, batch_rows: int, step: float | None = None
) -> Measured:
    """Gradients of every task on batches of its own rows, with the model as it is.

    Args:
        trainer: whose model has a plain LoRA, warmed up.
        rows: training rows.
        batches: K.
        batch_rows: rows of each task in each batch; a task that has fewer gives all of them.
        step: of look-ahead, as a share of the norm of the weights; None: no look-ahead.
    """
    depths, places, ups, whole = _parameters(trainer)
    single, ahead = [], []
    halves: list[list[list[Tensor]]] = [[], []]
    was = trainer.model.training
    trainer.model.eval()
    for number, picked in enumerate(_draws(rows, batches, batch_rows, trainer.args.seed)):
        given = [trainer._prepare_inputs(trainer.data_collator([rows[i] for i in own])) for own in picked]
        gradients = [_gradient(trainer, batch, whole) for batch in given]
        own = [[found[up] for up in ups] for found in gradients]
        single.append(_normalised(sum(_gramians(places, own).values(), torch.zeros(()))))
        halves[number % 2] = _added(halves[number % 2], own)
        if step is not None:
            ahead.append(_look_ahead(trainer, given, gradients, whole, step))
    trainer.model.train(was)
    gramians = _gramians(places, _added(*halves))
    return Measured(
        _normalised(sum(gramians.values(), torch.zeros(()))),
        torch.stack(single).std(0, correction=0),
        {place: _normalised(gramian) for place, gramian in gramians.items()},
        depths,
        torch.stack(ahead).mean(0) if ahead else None,
        None if batches == 1 else _agreement(*halves),
    )


def _added(left: list[list[Tensor]], right: list[list[Tensor]]) -> list[list[Tensor]]:
    """Sums of two tasks' gradients each; of none and some, these."""
    if not left or not right:
        return left or right
    return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(left, right, strict=True)]


def _agreement(left: Sequence[Sequence[Tensor]], right: Sequence[Sequence[Tensor]]) -> Tensor:
    """Cosine of each task's gradient in one half with that in the other."""
    found = []
    for task in zip(left, right, strict=True):
        pair = torch.stack([torch.cat([g.flatten() for g in own]).double() for own in task])
        found.append(_normalised(pair @ pair.T)[0, 1].cpu())
    return torch.stack(found)


def _gramians(places: Sequence[str], gradients: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Inner products of the tasks' gradients by block, `[T, T]`, in fp64 on the CPU."""
    out: dict[str, Tensor] = {}
    for place, layer in zip(places, zip(*gradients, strict=True), strict=True):
        rows = torch.stack([own.flatten() for own in layer]).double()
        out[place] = out.get(place, torch.zeros(())) + (rows @ rows.T).cpu()
    return out


def _parameters(
    trainer: MultiTaskTrainer,
) -> tuple[dict[str, float | None], list[str], list[int], list[nn.Parameter]]:
    """Depth by block; block of each up-projection, its place among all parameters of the adapter, and these."""
    tuner, name = trainer.tuner, trainer.tuner.adapter_in_force or ""
    depths: dict[str, float | None] = {}
    places: list[str] = []
    ups: list[int] = []
    whole: list[nn.Parameter] = []
    for path, module in tuner.model.named_modules():
        if isinstance(module, BankLinear) and name in module.peml_adapter:
            stack = stack_of(tuner.model, path)
            for key, parameter in module.peml_adapter[name].named_parameters():
                if key == "up":
                    places.append(path if stack is None else f"{stack[0]}.{stack[1]}")
                    depths[places[-1]] = depth_of(tuner.model, path)
                    ups.append(len(whole))
                whole.append(parameter)
    if not ups:
        raise PemlError("affinity is measured on a shared LoRA, and this model has none")
    return depths, places, ups, whole


def _draws(rows: TaskRows, batches: int, size: int, seed: int) -> Iterator[list[list[int]]]:
    """Rows of each task for each batch; a task goes through all of its rows before one comes again."""
    own = [[i for i, task in enumerate(rows.row_tasks) if task == t] for t in range(len(rows.task_names))]
    draws = [_in_turn(indices, Random(f"{seed} {task}")) for task, indices in enumerate(own)]
    sizes = [min(size, len(indices)) for indices in own]
    for _ in range(batches):
        yield [[next(draw) for _ in range(count)] for draw, count in zip(draws, sizes, strict=True)]


def _in_turn(indices: Sequence[int], rng: Random) -> Iterator[int]:
    while True:
        yield from rng.sample(indices, len(indices))


def _loss(trainer: MultiTaskTrainer, batch: dict[str, Any]) -> Tensor:
    """Mean loss of a batch of one task."""
    with trainer.compute_loss_context_manager():
        logits = trainer.model(**trainer.call(batch)).logits
        sums, counts = trainer.sums_by_task(logits, batch)
    task = batch["tasks"][0]
    mean: Tensor = sums[task] / counts[task].clamp_min(1)
    return mean


def _gradient(trainer: MultiTaskTrainer, batch: dict[str, Any], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(_loss(trainer, batch), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _normalised(gramian: Tensor) -> Tensor:
    """Cosines from inner products; a task without any gradient is at right angles to all others."""
    norms = gramian.diagonal().sqrt()
    cosines = gramian / (norms[:, None] * norms).clamp_min(torch.finfo(torch.float64).tiny)
    return cosines.fill_diagonal_(1.0).clamp(-1, 1)


@torch.no_grad()
def _look_ahead(
    trainer: MultiTaskTrainer,
    batches: Sequence[dict[str, Any]],
    gradients: Sequence[Sequence[Tensor]],
    parameters: Sequence[nn.Parameter],
    step: float,
) -> Tensor:
    """`1 - L_j(w - eta g_i) / L_j(w)`, `[T, T]`."""
    before = torch.stack([_loss(trainer, batch) for batch in batches]).double().cpu()
    kept = [p.detach().clone() for p in parameters]
    length = step * _norm(kept)
    out = []
    try:
        for own in gradients:
            eta = length / _norm(own).clamp_min(torch.finfo(torch.float32).tiny)
            for p, start, g in zip(parameters, kept, own, strict=True):
                p.copy_(start - eta * g)
            after = torch.stack([_loss(trainer, batch) for batch in batches]).double().cpu()
            out.append(1 - after / before.clamp_min(torch.finfo(torch.float64).tiny))
    finally:
        for p, start in zip(parameters, kept, strict=True):
            p.copy_(start)
    return torch.stack(out)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.stack([t.norm() for t in tensors]).norm()
    return norm

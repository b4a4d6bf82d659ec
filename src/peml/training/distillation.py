"""What a student learns from a teacher's prompts, beside the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peml.prompts import Prompt
from peml.tasks.encode import IGNORED
from peml.tuner import PemlModel


class Distillation:
    """Output distribution and hidden states of a teacher, as two more terms of the loss.

        kappa KL(p_teacher || p_student) + kappa |h_teacher - h_student|^2

    Paper: MPT, arXiv:2303.02861, section 3.2. Averages, our choice: the divergence over answer tokens, the square over
    all numbers of the states of tokens that are no padding, so that neither grows with the model or the text.

    Args:
        tuner: of the student.
        teacher: a prompt of which task t belongs to the student's task t; it is frozen.
        weight: kappa.
        hidden_layers: "all", "last", or every k-th layer from the last; the embeddings are none.
    """

    def __init__(
        self, tuner: PemlModel, teacher: Prompt, weight: float, hidden_layers: Literal["all", "last"] | int
    ) -> None:
        self.tuner = tuner
        self.teacher = teacher.requires_grad_(False)
        self.weight = weight
        self.step = {"all": 1, "last": None}[hidden_layers] if isinstance(hidden_layers, str) else hidden_layers

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, student: Any) -> dict[str, Tensor]:
        """Both terms, weighted, by name.

        Args:
            model: as the trainer calls it.
            inputs: what the student was called with.
            labels: `[B, S]`.
            student: its outputs, with hidden states.
        """
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.tuner.prompted_by(self.teacher):
                teacher = model(**inputs)
        finally:
            model.train(training)
        # Of an encoder-decoder, what the decoder says of the answer.
        writes = "decoder_input_ids" in inputs
        mask = labels.ne(IGNORED) if writes else inputs["attention_mask"].bool()
        return {
            "distil_logits": self.weight * divergence(teacher.logits, student.logits, labels, int(not writes)),
            "distil_hidden": self.weight * distance(self._kept(teacher), self._kept(student), mask),
        }

    def _kept(self, outputs: Any) -> Sequence[Tensor]:
        name = "decoder_hidden_states" if "decoder_hidden_states" in outputs else "hidden_states"
        layers: Sequence[Tensor] = outputs[name]
        layers = layers[1:]
        return layers[-1:] if self.step is None else layers[:: -self.step]


def divergence(teacher: Tensor, student: Tensor, labels: Tensor, shift: int = 1) -> Tensor:
    """KL(teacher || student) in nats, mean over the answer tokens.

    Shapes:
        teacher and student `[B, S, V]`, labels `[B, S]` (not shifted); a place predicts the next one, or with `shift`
        0 itself.
    """
    row, column = labels[:, shift:].ne(IGNORED).nonzero(as_tuple=True)
    wanted, found = (F.log_softmax(logits[row, column].float(), dim=-1) for logits in (teacher, student))
    return F.kl_div(found, wanted, reduction="sum", log_target=True) / max(len(row), 1)


def distance(teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean squared difference of hidden states.

    Shapes:
        teacher and student: per layer `[B, S, d]`; mask `[B, S]`, false on padding.
    """
    pairs = zip(teacher, student, strict=True)
    return torch.stack([F.mse_loss(found[mask].float(), wanted[mask].float()) for wanted, found in pairs]).mean()

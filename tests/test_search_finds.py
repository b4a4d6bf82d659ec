"""What a search finds where the best architecture is known."""

import pytest
import torch
from torch import Tensor

import peml
from models import adapt, tiny, tokens

STEPS = 120
SPACE = peml.PrefixNAS(
    num_virtual_tokens=4, num_cells=1, width=8, embedding_dim=8, head_rank=8, budget_tokens=2.0, gate_init=-1.0
)


def searched(prompt: peml.PrefixNAS, teacher_lengths: tuple[int, int], seed: int) -> peml.prompts.Architecture:
    """Search for a prefix that makes the frozen model answer as one with a given prefix does."""
    torch.manual_seed(seed)
    base = tiny()
    teacher = adapt(base, prompt=peml.PrefixTuning(teacher_lengths), shaken=False)
    with torch.no_grad():
        for parameter in teacher.base_model.prompt.parameters():
            parameter.copy_(3 * torch.randn_like(parameter))
    batch = tokens(rows=6)
    with torch.no_grad():
        wanted = teacher(input_ids=batch).logits
    model = adapt(teacher.unload(), prompt=prompt, shaken=False)
    own: peml.prompts.PrefixGenerator = model.base_model.prompt
    architecture = own.architecture_parameters()
    ids = {id(p) for p in architecture}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    optimizer = torch.optim.Adam([{"params": weights, "lr": 0.02}, {"params": architecture, "lr": 0.05}])

    def distance(found: Tensor) -> Tensor:
        return (found.log_softmax(-1) - wanted.log_softmax(-1)).square().mean()

    for step in range(STEPS):
        own.set_progress(step / STEPS)
        loss = distance(model(input_ids=batch).logits) + 1e-3 * sum(own.penalties().values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    own.derive()
    return own.architecture()


@pytest.mark.parametrize("needed", [0, 1])
def test_tokens_go_to_the_layer_that_needs_them(needed: int) -> None:
    """The teacher has tokens in one layer, the budget pays for those of one layer."""
    lengths = searched(SPACE, (4, 0) if needed == 0 else (0, 4), 0).lengths
    assert lengths[needed] > lengths[1 - needed]


@pytest.mark.slow
def test_the_layer_is_found_with_nearly_every_seed() -> None:
    """Nine of ten, as the reconstruction demands."""
    found = [searched(SPACE, (0, 4), seed).lengths for seed in range(10)]
    assert sum(lengths[1] > lengths[0] for lengths in found) >= 9

r"""How tasks share an epoch and a batch.

    p_t ~ min(n_t, cap)^(1/tau)        for n_t rows of task t

tau = 1 is `proportional`, tau = infinity is `equal`; tau = 2 is the default; `weights` gives p_t as it stands.
`fixed_ratio` has p_t of every batch, not only of an epoch. `subset` draws k ~ U{2..T} tasks for every batch, which
share it equally (multitask prompt tuning, arXiv:2303.02861). The rows of an epoch are a function of (seed, epoch)
alone, never of what was drawn before, so a resumed run sees the rows that an uninterrupted one sees, whatever number of
workers loads them.
"""

from peml.mixing.aside import held_out, split_off
from peml.mixing.rule import Batches, By, Mixing
from peml.mixing.sampler import Integers, InTurn, MixtureSampler, Onward

__all__ = [
    "Batches",
    "By",
    "InTurn",
    "Integers",
    "Mixing",
    "MixtureSampler",
    "Onward",
    "held_out",
    "split_off",
]

"""How tasks share epochs and batches: probabilities, passes without repetition, resumption."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from peml.errors import PemlError
from peml.mixing import Mixing, MixtureSampler, held_out

SIZES = (50, 8, 3)
ROW_TASKS = list(np.random.default_rng(0).permutation(np.repeat(range(3), SIZES)))


def sampler(mixing: Mixing, seed: int = 0, batch_size: int = 4, num_samples: int | None = None) -> MixtureSampler:
    return MixtureSampler(ROW_TASKS, mixing, seed, batch_size, num_samples)


def epoch(source: MixtureSampler, number: int) -> list[int]:
    source.set_epoch(number)
    return list(source)


def task_counts(rows: list[int]) -> list[int]:
    counts = Counter(int(ROW_TASKS[row]) for row in rows)
    return [counts[task] for task in range(3)]


def test_probabilities_follow_the_equation() -> None:
    counts = {"a": 100, "b": 25}
    assert Mixing(by="proportional").task_probabilities(counts) == pytest.approx({"a": 0.8, "b": 0.2})
    assert Mixing(by="equal").task_probabilities(counts) == pytest.approx({"a": 0.5, "b": 0.5})
    assert Mixing().task_probabilities(counts) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert Mixing(cap=25).task_probabilities(counts) == pytest.approx({"a": 0.5, "b": 0.5})
    assert Mixing(by="proportional", cap=75).task_probabilities(counts) == pytest.approx({"a": 0.75, "b": 0.25})
    assert Mixing(temperature=1).task_probabilities(counts) == pytest.approx({"a": 0.8, "b": 0.2})
    assert Mixing(temperature=float("inf")).task_probabilities(counts) == pytest.approx({"a": 0.5, "b": 0.5})
    assert Mixing(temperature=1e-4).task_probabilities(counts) == pytest.approx({"a": 1.0, "b": 0.0})


def test_proportional_is_a_plain_shuffled_pass() -> None:
    drawn = sampler(Mixing(by="proportional"))
    for number in range(5):
        rows = epoch(drawn, number)
        assert sorted(rows) == list(range(len(ROW_TASKS)))
        assert rows != sorted(rows)


@pytest.mark.parametrize("batches", ["mixed", "homogeneous"])
def test_draws_depend_on_seed_and_epoch_alone(batches: str) -> None:
    mixing = Mixing(batches=batches)  # type: ignore[arg-type]
    first = sampler(mixing, seed=7)
    uninterrupted = [epoch(first, number) for number in range(6)]
    assert epoch(sampler(mixing, seed=7), 5) == uninterrupted[5]  # a restart that never saw epochs 0 to 4
    assert epoch(first, 2) == uninterrupted[2]
    assert len({tuple(rows) for rows in uninterrupted}) == 6
    assert epoch(sampler(mixing, seed=8), 0) != uninterrupted[0]


@pytest.mark.parametrize("batches", ["mixed", "homogeneous"])
@pytest.mark.parametrize("by", ["proportional", "temperature", "equal"])
def test_rows_of_a_task_are_not_repeated_before_all_were_seen(by: str, batches: str) -> None:
    mixing = Mixing(by=by, batches=batches)  # type: ignore[arg-type]
    drawn = sampler(mixing)
    rows = list(chain.from_iterable(epoch(drawn, number) for number in range(7)))
    for task in range(3):
        seen = Counter(row for row in rows if ROW_TASKS[row] == task)
        # Within an epoch the order of a pass is mixed again, so counts tell passes apart, not positions.
        assert len(seen) == SIZES[task] or max(seen.values()) == 1
        assert max(seen.values()) - min(seen.values()) <= 1


def test_shares_are_exact_up_to_rounding_and_on_average() -> None:
    mixing = Mixing(temperature=3)
    drawn = sampler(mixing, num_samples=100)
    shares = mixing.task_probabilities({str(task): size for task, size in enumerate(SIZES)})
    wanted = 100 * np.array(list(shares.values()))
    counts = np.array([task_counts(epoch(drawn, number)) for number in range(80)])
    assert (counts.sum(1) == 100).all()
    assert (np.abs(counts - wanted) < 1).all()
    assert np.abs(counts.mean(0) - wanted).max() < 0.25


def test_an_epoch_shorter_than_the_number_of_tasks_reaches_all_of_them_in_time() -> None:
    drawn = sampler(Mixing(by="equal"), num_samples=1)
    assert set(chain.from_iterable(np.flatnonzero(task_counts(epoch(drawn, n))) for n in range(40))) == {
        0,
        1,
        2,
    }


@pytest.mark.parametrize("by", ["proportional", "temperature", "equal"])
def test_homogeneous_batches_hold_one_task_each(by: str) -> None:
    drawn = sampler(Mixing(by=by, batches="homogeneous"), batch_size=4)  # type: ignore[arg-type]
    rows = epoch(drawn, 3)
    assert len(rows) == len(drawn) == 64  # 61 rows, rounded up to whole batches
    blocks = [rows[start : start + 4] for start in range(0, len(rows), 4)]
    assert all(len({ROW_TASKS[row] for row in block}) == 1 for block in blocks)
    assert len({ROW_TASKS[block[0]] for block in blocks}) > 1


def test_mixed_batches_mix() -> None:
    rows = epoch(sampler(Mixing(by="equal"), num_samples=600), 0)
    halves = [task_counts(rows[:300]), task_counts(rows[300:])]
    assert all(60 < count < 140 for half in halves for count in half)


def test_any_task_ids_and_one_task_alone_will_do() -> None:
    assert sorted(MixtureSampler([5, 5, 9], Mixing(by="proportional"), 0, 2)) == [0, 1, 2]
    assert sorted(MixtureSampler([4, 4], Mixing(), 0, 2)) == [0, 1]


def test_a_large_mixture_is_drawn_quickly() -> None:
    rows = list(MixtureSampler(np.arange(400_000) % 7, Mixing(), 0, 8))  # type: ignore[arg-type]
    assert len(rows) == 400_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"by": "size"},
            "`by` must be one of proportional, temperature, equal, weights, fixed_ratio, subset, not 'size'",
        ),
        ({"batches": "one"}, "`batches` must be one of mixed, homogeneous, not 'one'"),
        ({"temperature": 0.0}, "`temperature` must be above 0, not 0.0"),
        ({"temperature": float("nan")}, "`temperature` must be above 0"),
        ({"cap": 0}, "`cap` must be at least 1, not 0"),
    ],
)
def test_bad_mixings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(PemlError, match=message):
        Mixing(**fields)  # type: ignore[arg-type]


def test_bad_rows_are_refused() -> None:
    with pytest.raises(PemlError, match="task 'b' has no rows"):
        Mixing().task_probabilities({"a": 1, "b": 0})
    with pytest.raises(PemlError, match="no task to draw from"):
        Mixing().task_probabilities({})
    with pytest.raises(PemlError, match="no rows to draw from"):
        MixtureSampler([], Mixing(), 0, 1)
    for seed, batch_size, samples in ((-1, 1, 1), (0, 0, 1), (0, 1, 0)):
        with pytest.raises(PemlError, match=f"they are {seed}, {batch_size} and {samples}"):
            MixtureSampler([0], Mixing(), seed, batch_size, samples)


def test_every_batch_has_a_subset_of_the_tasks() -> None:
    source = sampler(Mixing(by="subset"), batch_size=6, num_samples=600)
    drawn = epoch(source, 0)
    kinds, shares = Counter(), Counter()
    for begin in range(0, len(drawn), 6):
        counts = Counter(int(ROW_TASKS[row]) for row in drawn[begin : begin + 6])
        kinds[len(counts)] += 1
        shares.update(counts.keys())
        assert set(counts.values()) == {6 // len(counts)}
    assert set(kinds) == {2, 3} and 30 < kinds[2] < 70  # k ~ U{2, 3}
    assert min(shares.values()) > 70 and len(drawn) == 600


def test_subsets_depend_on_seed_and_epoch_alone_and_go_through_all_rows() -> None:
    mixing = Mixing(by="subset")
    first = sampler(mixing, seed=7)
    uninterrupted = [epoch(first, number) for number in range(8)]
    assert epoch(sampler(mixing, seed=7), 5) == uninterrupted[5]
    assert epoch(sampler(mixing, seed=8), 5) != uninterrupted[5]
    rows = [row for part in uninterrupted for row in part]
    for task in range(3):
        own = Counter(row for row in rows if ROW_TASKS[row] == task)
        assert len(own) == SIZES[task] and max(own.values()) - min(own.values()) <= 1  # in passes, over the epochs


def test_subsets_take_no_other_setting() -> None:
    for wrong in ({"batches": "homogeneous"}, {"cap": 3}):
        with pytest.raises(PemlError, match="by: subset"):
            Mixing(by="subset", **wrong)


NAMES = ["large", "middle", "small"]


def named(mixing: Mixing, **others: object) -> MixtureSampler:
    return MixtureSampler(ROW_TASKS, mixing, 0, 4, task_names=NAMES, **others)  # type: ignore[arg-type]


def test_weights_are_the_shares() -> None:
    mixing = Mixing(by="weights", weights={"small": 1, "large": 1, "middle": 2})
    drawn = named(mixing, num_samples=40)
    assert drawn.probabilities.tolist() == [0.25, 0.5, 0.25]
    assert task_counts(epoch(drawn, 0)) == [10, 20, 10]


def test_every_batch_has_a_fixed_ratio() -> None:
    exact = named(Mixing(by="fixed_ratio", weights={"large": 2, "middle": 1, "small": 1}), num_samples=400)
    rows = epoch(exact, 0)
    assert all(task_counts(rows[at : at + 4]) == [2, 1, 1] for at in range(0, 400, 4))
    # Rows of a task come in passes here too.
    small = Counter(row for row in rows if ROW_TASKS[row] == 2)
    assert len(small) == 3 and max(small.values()) - min(small.values()) <= 1
    uneven = named(Mixing(by="fixed_ratio"), num_samples=8000)
    counts = np.array([task_counts(rows[at : at + 4]) for rows in [epoch(uneven, 1)] for at in range(0, 8000, 4)])
    assert set(np.unique(counts)) == {1, 2} and (counts.sum(1) == 4).all()
    assert np.abs(counts.mean(0) - 4 / 3).max() < 0.05, "exact on average"


def test_a_cap_may_be_that_of_one_task() -> None:
    counts = {"large": 50, "middle": 8, "small": 3}
    shares = Mixing(by="proportional", cap={"large": 9}).task_probabilities(counts)
    assert shares == pytest.approx({"large": 9 / 20, "middle": 8 / 20, "small": 3 / 20})


@pytest.mark.parametrize("batches", ["mixed", "homogeneous"])
def test_a_task_gives_no_more_than_its_epochs(batches: str) -> None:
    mixing = Mixing(by="equal", epochs={"small": 4, "middle": 2.5}, batches=batches)  # type: ignore[arg-type]
    drawn = named(mixing)
    epochs = [epoch(drawn, number) for number in range(5)]
    counts = np.array([task_counts(rows) for rows in epochs])
    assert (counts.sum(1) == len(drawn)).all(), "what one no longer gives, the others do"
    assert counts.sum(0)[1:].tolist() == [20, 12]
    assert (counts[-1] == [len(drawn), 0, 0]).all()
    seen = Counter(row for rows in epochs for row in rows)
    assert max(seen[row] for row in seen if ROW_TASKS[row] == 2) == 4
    again = named(mixing)
    assert [epoch(again, number) for number in (4, 0, 2)] == [epochs[4], epochs[0], epochs[2]]


@pytest.mark.parametrize(("most", "length"), [(0.5, 31), (1.5, 45), (2, 61), (7.2, 55)])
def test_epochs_are_an_even_part_of_what_there_is(most: float, length: int) -> None:
    drawn = named(Mixing(epochs=most))
    assert len(drawn) == length
    whole = sum(round(most * size) for size in SIZES) // length
    drawn.check(whole * length)
    seen = Counter(row for number in range(whole) for row in epoch(drawn, number))
    assert max(seen.values()) <= np.ceil(most)


def test_a_training_that_needs_more_than_the_tasks_may_give_is_refused() -> None:
    drawn = named(Mixing(epochs=2))
    drawn.check(122)
    with pytest.raises(PemlError, match=r"epochs lets the tasks give 122 rows in all, and the training draws 183"):
        drawn.check(123)
    epoch(drawn, 1)
    with pytest.raises(PemlError, match="leaves no task that may give rows"):
        epoch(drawn, 2)
    with pytest.raises(PemlError, match="lets task 'small' give less than a batch"):
        named(Mixing(epochs={"small": 1}, batches="homogeneous"))


def test_rows_set_aside_are_never_drawn() -> None:
    aside = held_out(ROW_TASKS, NAMES, 4, seed=1)
    assert task_counts(list(aside)) == [4, 1, 1]
    assert aside == held_out(ROW_TASKS, NAMES, 4, seed=1) != held_out(ROW_TASKS, NAMES, 4, seed=2)
    drawn = named(Mixing(by="proportional"), without=aside)
    assert sorted(epoch(drawn, 0)) == sorted(set(range(61)) - set(aside))
    with pytest.raises(PemlError, match="task 'b' has too few training rows to hold one out"):
        held_out([0, 0, 1], ["a", "b"], 4, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"by": "weights"}, "needs `weights`"),
        ({"weights": {"a": 1}}, "`weights` goes with `by: weights`"),
        ({"by": "weights", "weights": {"a": 0}}, "the weight of task 'a' must be above 0, not 0"),
        ({"by": "fixed_ratio", "epochs": 2}, "`by: fixed_ratio` says what each batch holds: `epochs` does not go"),
        ({"cap": {"a": 0}}, "cap of task 'a' must be at least 1, not 0"),
        ({"epochs": 0}, "`epochs` must be above 0, not 0"),
        ({"epochs": {"a": -1.0}}, "epochs of task 'a' must be above 0"),
    ],
)
def test_limits_and_weights_without_meaning_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(PemlError, match=message):
        Mixing(**fields)  # type: ignore[arg-type]


def test_tasks_that_are_not_there_are_named() -> None:
    with pytest.raises(PemlError, match="mixing.cap names 'smal', which is no task here; there are large, middle"):
        Mixing(cap={"smal": 3}).check(NAMES)
    with pytest.raises(PemlError, match="mixing.weights has no weight for task 'small'"):
        Mixing(by="weights", weights={"large": 1, "middle": 2}).check(NAMES)

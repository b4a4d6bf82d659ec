"""Routes and their lifetime, without a model."""

import pytest
import torch
from torch import nn

from peml import PemlError, routing
from peml.routing import Forward, Route

NAMES = ["a", "b", "c"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tasks", "ids", "present"),
    [
        ("b", [1], (1,)),
        (2, [2], (2,)),
        (["c", "a", "c"], [2, 0, 2], (0, 2)),
        ((1, 0), [1, 0], (0, 1)),
        (torch.tensor([2, 2]), [2, 2], (2,)),
        (torch.tensor(1), [1], (1,)),
        ([["a", "b"], ["b", "b"]], [[0, 1], [1, 1]], (0, 1)),
        (torch.tensor([[0, 2]]), [[0, 2]], (0, 2)),
    ],
)
def test_names_and_ids(tasks, ids: list, present: tuple[int, ...]) -> None:
    route = Route.of(tasks, NAMES)
    assert route.ids.tolist() == ids and route.present == present
    assert route.ids.dtype == torch.int64
    assert route.per_token == isinstance(ids[0], list)


def test_rows_expand_like_beams() -> None:
    route = Route.of(["c", "a"], NAMES)
    assert route.rows(2, CPU).tolist() == [2, 0]
    assert route.rows(6, CPU).tolist() == [2, 2, 2, 0, 0, 0]
    assert route.groups(4, CPU).tolist() == [1, 1, 0, 0]
    assert Route.of("c", NAMES).rows(5, CPU).tolist() == [2]
    assert Route.of("c", NAMES).groups(5, CPU).tolist() == [0]
    for rows in (3, 1):
        with pytest.raises(PemlError, match=f"2 entries but the batch has {rows} rows"):
            route.rows(rows, CPU)
    with pytest.raises(PemlError, match="2 entries but the batch has 4 rows"):
        Route.of([["a"], ["b"]], NAMES).rows(4, CPU)


def test_frames_nest_and_close() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    with routing.opened(Forward(Route.of("a", NAMES), model=one, adapter="x")):
        outer = routing.current()
        routing.enter(Forward(Route.of("b", NAMES), model=one, adapter="x"))
        assert routing.current().route.present == (1,)
        routing.enter(Forward(None, model=two))
        assert routing.surrounding(one, "x") is outer, "the block, not the forward inside it"
        assert routing.surrounding(one, "y") is None, "ids mean nothing to another adapter"
        assert routing.surrounding(two, "x") is None
        routing.leave(two)
        assert routing.current().route.present == (1,)
        routing.leave(two)
        assert routing.current().route.present == (1,), "nothing of this model is open"
        routing.leave(one)
        assert routing.current() is outer
        routing.leave(one)
        assert routing.current() is outer, "hooks do not close blocks"
    assert routing.current() is None


def test_what_an_interrupt_left_open_is_dropped_at_the_next_entry() -> None:
    model = nn.Linear(1, 1)
    routing.enter(Forward(Route.of("a", NAMES), model=model))
    routing.enter(Forward(None, model=model))
    assert routing.current().route is None
    routing.leave(model)
    assert routing.current() is None


def test_binding_is_idempotent_and_follows_the_function() -> None:
    class Layer(nn.Module):
        pass

    def checkpoint(layer, *args, use_reentrant: bool = False):
        return layer(*args)

    layer = Layer()
    layer._gradient_checkpointing_func = checkpoint
    for _ in range(2):
        routing.bind_checkpointing(layer)
        assert layer._gradient_checkpointing_func.checkpoint is checkpoint
    assert layer._gradient_checkpointing_func(lambda x: (x, routing.current()), 3) == (3, None)
    with routing.opened(Forward(Route.of("a", NAMES))):
        inside = routing.current()
        x, seen = layer._gradient_checkpointing_func(lambda x: (x, routing.current()), 3)
    assert x == 3 and seen.route is inside.route

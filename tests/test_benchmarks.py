"""The benchmarks count and calculate correctly, and every run works on tiny shapes. No test looks at a real clock."""

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed with the package

from benchmarks import __main__ as command_line  # noqa: E402
from benchmarks import command, naive, peers, prefix, record  # noqa: E402
from benchmarks import tasks as growth  # noqa: E402
from benchmarks.harness import FLOOR, TWIN, Case, Ratio, Variant, interleave, measure  # noqa: E402
from benchmarks.memory import peak_bytes, saved_bytes  # noqa: E402
from benchmarks.sites import Site, Stack, layer_site  # noqa: E402

from peml import adapters  # noqa: E402

FLOAT = 4


class FakeClock:
    """Time passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def lasting(self, *seconds: float):
        """A step that takes these times in turn, over and over."""
        calls = 0

        def step() -> None:
            nonlocal calls
            self.now += seconds[calls % len(seconds)]
            calls += 1

        return step


def fake_case(clock: FakeClock, train: bool = False, floor: float = 1.0) -> Case:
    variants = [
        Variant(FLOOR, clock.lasting(floor), "floor"),
        Variant(TWIN, clock.lasting(0.9 * floor, 1.1 * floor), "floor"),
        Variant("peer", clock.lasting(3 * floor), "peer"),
        Variant("like the floor", clock.lasting(1.05 * floor), "peer"),
        Variant("ours", clock.lasting(1.5 * floor), "peml", against="peer"),
    ]
    return Case("fake", variants, train, unit_bytes=8, settings={"d": 4})


# Statistics


def test_every_round_times_every_step_once_in_an_order_of_its_own():
    clock, orders = FakeClock(), []
    lasting = {"a": 1.0, "b": 2.0, "c": 5.0}
    steps = {name: clock.lasting(seconds) for name, seconds in lasting.items()}

    def before(name: str) -> None:
        orders.append(name)
        clock.now += 100  # must not be seen

    readings = interleave(steps, 20, random.Random(0), before, clock)
    assert readings == {name: [pytest.approx(seconds)] * 20 for name, seconds in lasting.items()}
    rounds = [tuple(orders[i : i + 3]) for i in range(0, 60, 3)]
    assert all(Counter(order) == Counter("abc") for order in rounds)
    assert len(set(rounds)) > 3


def test_ratios_are_taken_round_by_round():
    ratio = Ratio.of([2.0, 20.0, 6.0, 4.0, 50.0], [1.0, 10.0, 2.0, 4.0, 10.0])  # ratios 2, 2, 3, 1, 5
    assert (ratio.q1, ratio.median, ratio.q3) == (2, 2, 3)
    assert ratio.minima == 2
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5, 1.5)


@pytest.mark.parametrize(("median", "inside"), [(1.0, True), (1.05, True), (0.95, True), (1.2, False), (0.8, False)])
def test_a_difference_counts_only_outside_the_spread(median: float, inside: bool):
    pair = Ratio(median=1.01, q1=0.98, q3=1.06, minima=1)
    assert pair.spread == pytest.approx(0.06)
    assert Ratio(median, 0, 2, 1).within(pair.spread) is inside


def test_measure_compares_with_floor_and_peer():
    clock = FakeClock()
    result = measure(fake_case(clock), seed=0, clock=clock)
    ratios = {row.variant.name: row.ratio.median for row in result.rows}
    assert ratios["ours"] == pytest.approx(1.5)
    assert ratios["peer"] == pytest.approx(3)
    assert result.rows[-1].versus.median == pytest.approx(0.5)
    assert result.spread == pytest.approx(0.1)
    assert result.rows[3].ratio.within(result.spread)
    assert result.rows[3].versus is None


@pytest.mark.parametrize(("floor", "asked", "rounds"), [(1.0, None, 15), (1e-3, None, 31), (1.0, 4, 4)])
def test_short_steps_are_read_more_often(floor: float, asked: int | None, rounds: int):
    clock = FakeClock()
    result = measure(fake_case(clock, floor=floor), seed=0, rounds=asked, clock=clock)
    assert result.rounds == rounds
    assert {len(row.seconds) for row in result.rows} == {rounds}


def test_gradients_are_cleared_before_every_step():
    weight = torch.ones(3, requires_grad=True)
    found = []

    def forward() -> torch.Tensor:
        found.append(weight.grad)
        return weight * weight

    variants = [Variant(name, forward, "floor", leaves=(weight,)) for name in (FLOOR, TWIN)]
    measure(Case("gradients", variants, True, 12), seed=0, rounds=3)
    assert len(found) > 6
    assert all(gradient is None for gradient in found)


def test_a_case_without_a_floor_and_its_twin_is_refused():
    with pytest.raises(AssertionError):
        Case("no twin", [Variant(FLOOR, lambda: None, "floor")], False, 1)


# Memory


def test_saved_bytes_leave_parameters_out():
    layer, x = torch.nn.Linear(16, 24), torch.randn(10, 16, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 10 * 16 * FLOAT
    assert saved_bytes(lambda: layer(x), ()) == (10 * 16 + 16 * 24) * FLOAT
    layer.requires_grad_(False)  # the weight alone is kept, for the gradient of x
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 0


def test_saved_bytes_count_a_storage_once_and_whole():
    x = torch.randn(10, 16, requires_grad=True)

    def forward() -> torch.Tensor:
        y = torch.sigmoid(x)  # keeps its output
        return (y[:5] * y[5:]).sum() + (y * y).sum()  # keep views of it, and it again

    assert saved_bytes(forward, ()) == 10 * 16 * FLOAT


def test_saved_bytes_see_what_an_autograd_function_keeps():
    x = torch.randn(10, 16, requires_grad=True)
    weight = torch.randn(24, 16, requires_grad=True)
    assert saved_bytes(lambda: torch.tanh(F.linear(x, weight)), [weight]) == (10 * 16 + 10 * 24) * FLOAT


def test_peak_bytes_follow_allocation_and_release():
    x = torch.randn(1000)

    def chain() -> torch.Tensor:
        y = torch.neg(x)
        z = torch.neg(y)  # two alive
        del y
        w = torch.neg(z)  # two again
        del z
        return torch.neg(w)

    assert peak_bytes(chain) == 2 * 1000 * FLOAT
    assert peak_bytes(lambda: None) == 0


def test_peak_bytes_include_backward():
    x = torch.randn(1000, requires_grad=True)

    def step() -> None:
        torch.exp(x).backward(gradient)

    gradient = torch.ones(1000)
    assert peak_bytes(step) == 2 * 1000 * FLOAT  # the output, which is kept, and the gradient of x


# Peers


def double_site() -> Site:
    x = torch.randn(8, 3, 12, dtype=torch.float64)
    return Site(Stack(12, 20).double(), ["proj"], [3, 0, 2, 2, 0, 1, 3, 0], 5, False, args=(x,))


@pytest.mark.parametrize("method", [*growth.NAIVE, "MultiLoRA"])
def test_peers_do_the_same_work_as_the_adapters(method: str):
    site = double_site()
    adapter = growth.ADAPTERS.get(method, adapters.MultiLoRA(r=8, num_parallel=3))
    if hasattr(adapter, "lora_alpha"):
        adapter = replace(adapter, lora_alpha=naive.ALPHA)
    peer = naive.naive_model(site, growth.NAIVE.get(method, naive.MultiLoRA)).eval()
    ours = site.attach(adapter).double().eval()
    theirs, host = peer.blocks[0]["proj"], ours.base_model.model.blocks[0]["proj"]
    weights = {name: p for name, p in theirs.named_parameters() if not name.startswith("base.")}
    found = dict(host.peml_adapter["default"].named_parameters())
    assert found.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(weights[name].view_as(parameter))
        expected, update = peer(*site.args), peer(*site.args) - site.base(*site.args)
        torch.testing.assert_close(ours(*site.args, tasks=site.ids), expected, rtol=1e-9, atol=1e-10)
    assert update.abs().min() > 0


def test_peft_is_taken_at_its_best():
    site = layer_site(16, 16, 32, "bf16", ids=[0, 1, 2, 3], num_tasks=4, train=False)
    for variant in (peers.peft_lora(site), peers.peft_mixed(site), peers.peft_poly(site)):
        assert {tensor.dtype for tensor in variant.held} == {torch.bfloat16}, variant.name
        assert variant.forward().shape == (4, 8, 16)


def test_variants_have_weights_of_their_own():
    site = layer_site(16, 16, 32, "fp32", ids=[0, 1, 2, 3], num_tasks=4, train=True)
    variants = [*site.floors(), peers.peft_lora(site), site.peml("ours", adapters.LoRA())]
    addresses = [tensor.data_ptr() for variant in variants for tensor in variant.held]
    assert len(set(addresses)) == len(addresses)
    assert all(site.args[0] is variant.leaves[-1] for variant in variants)


@pytest.mark.parametrize("part", ["attention", "decode-attention"])
def test_a_prefix_in_the_cache_is_the_same_prefix(part: str):
    options = command_line.parser().parse_args(["prefix", "--quick", "--part", part])
    (case,) = prefix.cases(options)
    # Those of several tasks have tables of their own.
    read = {v.name: v.forward() for v in case.variants if "tasks" not in v.name}
    found = {name: torch.stack([*y]).detach() for name, y in read.items()}
    ours, plain = found.pop("peml PrefixTuning"), found.pop(FLOOR)
    assert not torch.allclose(ours, plain, atol=1e-3)
    peers = {name: output for name, output in found.items() if name != TWIN}
    assert len(peers) == (1 if part == "attention" else 2)
    for output in peers.values():
        torch.testing.assert_close(output, ours)


# Records


def check_record(data: dict) -> None:
    """What a reader of a record may rely on."""
    assert data["format"] == "peml-benchmark"
    assert {"name", "version", "date", "command", "seed", "machine", "versions", "cases"} <= data.keys()
    assert {"python", "torch", "transformers", "peft", "peml"} <= data["versions"].keys()
    assert {"cpu", "cores", "threads", "vector_units", "bf16"} == data["machine"].keys()
    assert data["cases"]
    for case in data["cases"]:
        names = [row["name"] for row in case["rows"]]
        assert names[:2] == [FLOOR, TWIN]
        assert any(row["kind"] == "peml" for row in case["rows"])
        assert case["rows"][0]["ratio"]["median"] == 1
        for row in case["rows"]:
            assert len(row["seconds"]) == case["rounds"]
            assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
            assert (row["versus"] is None) == (row["against"] is None)
            assert row["against"] in (None, *names)
            assert (row["saved_bytes"] is not None) == case["train"]
            assert row["peak_bytes"] >= 0


def test_a_record_is_written_whole_and_says_how_to_repeat_it(tmp_path: Path):
    clock = FakeClock()
    result = measure(fake_case(clock), seed=3, rounds=5, clock=clock)
    data = record.record("fake", "python -m benchmarks fake --seed 3", 3, 1, [record.case_of(result)])
    paths = record.write(data, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["fake.json", "fake.md"]
    assert json.loads(paths[0].read_text()) == data
    check_record(data)
    text = paths[1].read_text()
    assert "A/A spread 0.100" in text
    assert "| **ours** | 1.50 |" in text
    assert "0.50 of peer |" in text
    assert "| like the floor | 1.05 (within A/A) |" in text
    assert "`python -m benchmarks fake --seed 3`" in text


def test_a_write_that_fails_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = FakeClock()
    case = record.case_of(measure(fake_case(clock), seed=0, rounds=2, clock=clock))
    data = record.record("fake", "", 0, 1, [case])
    path, _ = record.write(data, tmp_path)
    before = path.read_text()

    def fail(self: Path, text: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        record.write({**data, "seed": 1}, tmp_path)
    assert path.read_text() == before


@pytest.mark.parametrize("given", [["--out", "/somewhere/else"], ["--out=/somewhere/else"]])
def test_the_recorded_command_names_no_folder(given: list[str]):
    typed = command.recorded(["benchmarks", "layers", *given, "--seed", "1"])
    assert typed == "python -m benchmarks layers --seed 1"


@pytest.mark.parametrize(
    ("flags", "units"), [("avx2 fma", "emulated"), ("avx512_bf16", "avx512_bf16"), ("amx_bf16 avx512_bf16", "amx_bf16")]
)
def test_bf16_units_are_named(flags: str, units: str):
    assert record.bf16_support(flags.split()) == units


# Runs


def quick(run: str, *more: str, folder: Path) -> dict:
    threads = torch.get_num_threads()
    try:
        assert command_line.main([run, "--quick", "--rounds", "2", "--out", str(folder), *more]) == 0
    finally:
        torch.set_num_threads(threads)
    data = json.loads((folder / f"{run}.json").read_text())
    check_record(data)
    assert str(folder) not in (folder / f"{run}.json").read_text() + (folder / f"{run}.md").read_text()
    return data


def test_a_quick_run_writes_a_record_where_it_is_told(tmp_path: Path):
    data = quick("groups", "--shape", "qkv-512-fp32", folder=tmp_path)
    rows = {row["name"]: row for row in data["cases"][0]["rows"]}
    assert rows["peml LoRA"]["against"] == "PEFT LoRA"
    assert rows["floor"]["saved_bytes"] == 0


def test_a_quick_run_writes_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert command_line.main(["tasks", "--quick", "--rounds", "1", "--method", "MTLLoRA"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("run", list(command_line.RUNS))
def test_every_run_works(run: str, tmp_path: Path):
    quick(run, folder=tmp_path)

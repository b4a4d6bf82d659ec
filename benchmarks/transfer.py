"""Does an architecture transfer? `python -m benchmarks.transfer toy`, or `... encoder --data FOLDER --model FOLDER`.

The tasks are halved, every other one. On each half: PEML that searches there, the architecture that it found trained
anew, the one that was found on the other half, a random one of the same space, and LoRA of as many numbers. Learning
rates are those of the suite for all.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.record import spread
from benchmarks.search import SUITES, WAYS, Comparison, suite_parser, write_table
from peml.training import Recipe, RunFolder

HERE, ELSEWHERE = "PEML's architecture, trained anew", "the other half's architecture"
ROWS = ["LoRA, rank-matched", "PEML", HERE, ELSEWHERE, "random architecture"]


def halves(suite: dict[str, Any]) -> list[dict[str, Any]]:
    """The suite with every other task, and with the rest."""
    names = [
        task.name for task in Recipe.model_validate({"model": suite["model"], "tasks": suite["tasks"]}).every_task()
    ]
    return [suite | {"tasks": [entry | {"include": names[k::2]} for entry in suite["tasks"]]} for k in (0, 1)]


def scores(work: Path, suite: dict[str, Any], seeds: range, trials: int) -> list[dict[str, list[float]]]:
    """Of each half the average score of every row, in per cent, by seed."""
    ways = [way for way in ROWS if way in WAYS]
    parts = [Comparison(half, ways, work / f"half-{k}", trials) for k, half in enumerate(halves(suite))]
    found: list[dict[str, list[float]]] = [{way: [] for way in ROWS} for _ in parts]
    for seed in seeds:
        for part, own in zip(parts, found, strict=True):
            for way in ways:
                own[way].append(100 * part.run(way, seed)["average"]["after"])
        for k, own in enumerate(found):
            other = RunFolder(parts[1 - k].folder("PEML", str(seed))).architecture
            own[ELSEWHERE].append(100 * parts[k].run(HERE, seed, other)["average"]["after"])
    return found


def main() -> None:
    parser = suite_parser("transfer", __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", type=int, default=0, metavar="N", help="trials of each row's learning rates")
    options = parser.parse_args()
    suite = SUITES[options.suite](options)
    found = scores(Path(options.work) / options.suite, suite, range(options.seeds), options.tune)
    lines = ["| | first half | second half | both |", "|---|---|---|---|"]
    for way in ROWS:
        both = [statistics.mean(pair) for pair in zip(*(half[way] for half in found), strict=True)]
        lines.append(f"| {way} | {' | '.join(spread(values) for values in (*(half[way] for half in found), both))} |")
    text = "\n".join(lines)
    steps = suite["train"]["max_steps"]
    head = f"{steps} steps, {options.seeds} seeds.\n\n"
    record = {"steps": steps, "seeds": options.seeds, "halves": found}
    title = f"Transfer of an architecture, {options.suite} tasks"
    write_table(f"transfer-{options.suite}", title, f"{head}{text}", record)
    print(text)


if __name__ == "__main__":
    main()

"""What a search adds to the bill: `python -m benchmarks.bill toy`, or `... encoder --data FOLDER --model FOLDER`.

Whole trainings in turn, in rounds: PEML that searches, with scores measured around the end of the search and without,
and the architecture that it found, trained alone. Each is over the mean of the two trainings of the latter in its
round, whose own ratio shows how far the speed of the machine moved meanwhile.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.search import SUITES, Comparison, suite_parser, write_table

ALONE = "PEML's architecture, trained anew"
NAMES = {"searched": "search + training", "silent": "the same, `measure_gap: false`", "again": "alone, again (A/A)"}


def main() -> None:
    parser = suite_parser("bill", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    suite = SUITES[options.suite](options)
    quiet = suite | {"train": {**suite["train"], "measure_gap": False}}
    seconds: dict[str, list[float]] = {"searched": [], "alone": [], "silent": [], "again": []}
    for k in range(options.rounds):
        work = Path(options.work) / options.suite / str(k)
        whole = Comparison(suite, ["PEML", ALONE], work)
        silent, again = Comparison(quiet, ["PEML"], work / "silent"), Comparison(suite, [ALONE], work / "again")
        seconds["searched"].append(whole.run("PEML", 0)["train_seconds"])
        seconds["alone"].append(whole.run(ALONE, 0)["train_seconds"])
        seconds["silent"].append(silent.run("PEML", 0)["train_seconds"])
        found = whole.folder("PEML", "0") / "architecture.json"
        seconds["again"].append(again.run(ALONE, 0, found)["train_seconds"])
    alone = [statistics.mean(pair) for pair in zip(seconds["alone"], seconds["again"], strict=True)]
    lines = ["| | over its architecture trained alone | by round |", "|---|---|---|"]
    for key, name in NAMES.items():
        below = seconds["alone"] if key == "again" else alone
        ratios = [a / b for a, b in zip(seconds[key], below, strict=True)]
        lines.append(f"| {name} | {statistics.median(ratios):.3f} | {', '.join(f'{ratio:.3f}' for ratio in ratios)} |")
    steps, text = suite["train"]["max_steps"], "\n".join(lines)
    head = f"Seconds of {steps} steps, {options.rounds} rounds.\n\n"
    record = {"steps": steps, "seconds": seconds}
    write_table(f"bill-{options.suite}", f"The bill of a search, {options.suite} tasks", f"{head}{text}", record)
    print(text)


if __name__ == "__main__":
    main()

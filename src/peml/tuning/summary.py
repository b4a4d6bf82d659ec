"""`trials.json`: every trial with its values, its measurements and its cost, whether it ended well or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peml.training.ranges import Tune
from peml.tuning.folder import devices, optuna
from peml.tuning.space import values_of

ENOUGH = 10
"""Trials that came to their end, below which importances would be noise: our choice."""


def summary_of(study: Any, section: Tune, lost_seconds: float, importances: bool = False) -> dict[str, Any]:
    """The record of a tuning.

    Args:
        study: Optuna's.
        section: what was asked for.
        lost_seconds: in trials that were killed, as far as their logs say.
        importances: whether to work out what each key explains of the differences.
    """
    trials = [_trial(trial, section) for trial in study.trials if trial.state.is_finished()]
    ended = [trial for trial in trials if trial["state"] == "complete"]
    counted = devices()
    seconds = sum(trial["seconds"] for trial in trials) + lost_seconds
    hours = sum(trial["device_hours"] for trial in trials) + lost_seconds * counted["count"] / 3600
    return {
        "format": "peml-tune",
        "version": 1,
        "metric": section.metric,
        "direction": study.direction.name.lower(),
        "held_out": section.held_out,
        "seed": section.seed,
        "pruner": section.pruner,
        "bill": {
            "trials": len(trials),
            "wall_seconds": round(seconds, 3),
            "lost_seconds": round(lost_seconds, 3),
            "device_hours": round(hours, 6),
            "devices": counted,
        },
        "best": study.best_trial.number if ended else None,
        "importances": _importances(study, section) if importances and len(ended) >= ENOUGH else None,
        "trials": trials,
    }


def _trial(trial: Any, section: Tune) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value,
        "values": values_of(trial.params, section.ranges),
        "measured": [value for _, value in sorted(trial.intermediate_values.items())],
        "seconds": trial.user_attrs["seconds"],
        "device_hours": trial.user_attrs["device_hours"],
        "error": trial.user_attrs.get("error"),
    }


def _importances(study: Any, section: Tune) -> dict[str, float] | None:
    """Shares of the variance that each key explains, by a forest (fANOVA, Hutter et al. 2014)."""
    if len(section.ranges) < 2:
        return None
    library = optuna()
    try:
        found = library.importance.get_param_importances(
            study, evaluator=library.importance.FanovaImportanceEvaluator(seed=section.seed)
        )
    except (RuntimeError, ValueError):  # every trial scored the same: there is nothing to explain
        return None
    return {key: round(float(share), 4) for key, share in found.items()}


def bill_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe that was found carries of the bill: `Tuned`'s keys."""
    return {key: summary["bill"][key] for key in ("trials", "wall_seconds", "device_hours")}

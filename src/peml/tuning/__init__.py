"""Tuning: trials of a recipe with other values, chosen by Optuna, on rows held out of the training rows."""

from peml.tuning.folder import TuneFolder
from peml.tuning.space import default_ranges
from peml.tuning.trials import tune

__all__ = ["TuneFolder", "default_ranges", "tune"]

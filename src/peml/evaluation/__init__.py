"""Evaluation: option scoring, generation and the metrics of every task."""

from peml.evaluation.evaluate import average, evaluate_tasks, measure, suite_averages
from peml.evaluation.scoring import generate_answers, score_choices

__all__ = ["average", "evaluate_tasks", "generate_answers", "measure", "score_choices", "suite_averages"]

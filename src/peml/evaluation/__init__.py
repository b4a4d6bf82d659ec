"""Evaluation: option scoring, generation and the metrics of every task."""

from peml.evaluation.ablation import ablate, ablation_record, parts_there, read_parts
from peml.evaluation.evaluate import average, evaluate_tasks, measure, suite_averages
from peml.evaluation.scoring import generate_answers, score_choices

__all__ = [
    "ablate",
    "ablation_record",
    "average",
    "evaluate_tasks",
    "generate_answers",
    "measure",
    "parts_there",
    "read_parts",
    "score_choices",
    "suite_averages",
]

"""Tasks: from raw rows to prompts, answers and token ids."""

from peml.tasks.encode import IGNORED, Encoded, Form, encode, encode_all, encode_choices, encode_prompts
from peml.tasks.example import Example
from peml.tasks.metrics import METRICS, Answers, Metric, compute
from peml.tasks.source import FileSource, HubSource, Source, Split, ToySource
from peml.tasks.suites import SUITES, Suite, SuiteSource, suite_tasks
from peml.tasks.task import Kind, Task

__all__ = [
    "IGNORED",
    "METRICS",
    "SUITES",
    "Answers",
    "Encoded",
    "Example",
    "FileSource",
    "Form",
    "HubSource",
    "Kind",
    "Metric",
    "Source",
    "Split",
    "Suite",
    "SuiteSource",
    "Task",
    "ToySource",
    "compute",
    "encode",
    "encode_all",
    "encode_choices",
    "encode_prompts",
    "suite_tasks",
]

"""What a run works on: the base model, its tokeniser, and the rows of the recipe's tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from peft import PeftModel
from rich.progress import Progress
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from peml.config import PemlConfig
from peml.errors import PemlError
from peml.evaluation import evaluate_tasks, measure
from peml.evaluation.scoring import pad_id
from peml.heads import Heads
from peml.tasks import Example, FileSource, Form, Task, encode_choices, encode_prompts
from peml.tasks.encode_heads import check_heads, encode_heads
from peml.tasks.encode_seq2seq import encode_seq2seq
from peml.tasks.metrics import Answers
from peml.training.arguments import one_line
from peml.training.recipe import Recipe

SAMPLE = 1000
"""Rows of a stream that are looked at before the training, for heads and the fingerprint of the data: our choice."""

TOY_MODEL = "toy"
"""Name of the small model that lies in the package."""


@dataclasses.dataclass(frozen=True)
class Workbench:
    """A base model with its tokeniser, and the rows of a recipe's tasks.

    Args:
        train, eval: examples by task; of a stream, the first training rows.
        watch: told the results of every evaluation; it may raise, to stop a training.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    tasks: dict[str, Task]
    train: dict[str, list[Example]]
    eval: dict[str, list[Example]]
    watch: Callable[[Mapping[str, Mapping[str, float]]], None] | None = None

    @property
    def max_length(self) -> int:
        """Most tokens of a row: what the recipe allows, and what the model has positions for."""
        return longest_row(self.recipe, self.model.config, self.tokenizer, self.form)

    @property
    def form(self) -> Form:
        """How the model answers."""
        return form_of(self.model)

    def rows_held(self, name: str) -> int | None:
        """How many training rows of a task there are; None: they are streamed."""
        return None if self.tasks[name].source.streaming else len(self.train.get(name, ()))

    @property
    def pad_token_id(self) -> int:
        """What fills rows."""
        return pad_id(self.tokenizer)

    def config(self) -> PemlConfig:
        """The adapter's configuration: the recipe's, with a head per task if the model is an encoder.

        Raises:
            PemlError: the recipe sets heads for a model that answers in words, or wants texts apart that its tokenizer
                does not tell apart.
        """
        config = self.recipe.config()
        if self.form != "heads":
            if config.heads is not None:
                raise PemlError(f"set.heads is for encoders, and {self.recipe.model} answers in words: leave it out")
            config.task_type = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}[self.form]
            return config
        config.task_type = "FEATURE_EXTRACTION"
        scales = [_scale(self.train.get(name, [])) for name in self.tasks]
        heads = config.heads or Heads()
        config.heads = dataclasses.replace(
            heads,
            layers=heads.layers or thirds(self.model.config),
            num_labels=tuple(len(task.choices or ("a number",)) for task in self.tasks.values()),
            means=tuple(mean for mean, _ in scales),
            scales=tuple(scale for _, scale in scales),
        )
        if config.heads.pairs == "apart" and not any(self.tokenizer("a", "a").get("token_type_ids", ())):
            raise PemlError(
                f"set.heads.pairs cannot be apart: the tokenizer of {self.recipe.model} does not tell the two texts of "
                "a pair apart by token_type_ids; use joined"
            )
        return config

    def check(self) -> dict[str, int]:
        """Find now what evaluation would stumble over after the training.

        Returns:
            How many evaluation prompts of each task lose their beginning.

        Raises:
            PemlError: an answer that cannot fit, or a metric that cannot measure a task's answers.
        """
        shortened = {}
        for name, task in self.tasks.items():
            if self.form == "heads":
                encoded = encode_heads(self.tokenizer, self.eval[name], self.max_length)
            elif self.form == "seq2seq":
                encoded = encode_seq2seq(self.tokenizer, self.eval[name], self.max_length)
            elif task.kind in ("choose", "classify"):
                encoded = [group[0] for group in encode_choices(self.tokenizer, self.eval[name], self.max_length)]
            else:
                encoded = encode_prompts(self.tokenizer, self.eval[name], self.max_length, task.max_new_tokens)
            shortened[name] = sum(row.truncated for row in encoded)
            self._check_groups(task)
            measure(task, [e.answer if e.value is None else repr(e.value) for e in self.eval[name]], self.eval[name])
        return shortened

    def _check_groups(self, task: Task) -> None:
        """Refuse a metric of a group that a file of the user's own has not; suites may be there in part.

        Raises:
            PemlError: naming it, and the groups that there are.
        """
        if not isinstance(task.source, FileSource) or task.source.held_out is not None:
            return
        there = sorted({row.group for row in (*self.train.get(task.name, ()), *self.eval[task.name]) if row.group})
        for metric in task.metrics:
            group = metric.partition("/")[2]
            if group and group not in there:
                raise PemlError(
                    f"task {task.name!r}: no row belongs to the group of its metric {metric!r}; the groups of its rows "
                    f"are {', '.join(there) or 'none'}"
                )

    def evaluate(
        self,
        model: torch.nn.Module,
        progress: Progress | None = None,
        answers: MutableMapping[str, Answers] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Metrics of every task; works for the bare base model too. `answers` is filled, if given."""
        results = evaluate_tasks(
            model,
            self.tokenizer,
            self.eval,
            self.tasks,
            form=self.form,
            max_length=self.max_length,
            batch_size=self.recipe.setting("per_device_eval_batch_size"),
            tasks_kwarg=isinstance(model, PeftModel),
            progress=progress,
            answers=answers,
        )
        if self.watch is not None:
            self.watch(results)
        return results


def model_path(name: str) -> str:
    """Folder or Hub id of a model; "toy" is the one in the package."""
    if name == TOY_MODEL:
        return str(files("peml") / "assets" / "toy-llama")
    local = Path(name).expanduser()
    # Absolute, so that the adapter's configuration names its base wherever it is read from.
    return str(local.resolve()) if local.exists() else str(local) if name.startswith("~") else name


def prepare(
    recipe: Recipe,
    *,
    training: bool = True,
    trained: Sequence[str] | None = None,
    base: tuple[PreTrainedTokenizerBase, PreTrainedModel] | None = None,
) -> Workbench:
    """Read the rows, then load tokeniser and model, unless they are there.

    Args:
        recipe: of the run.
        training: whether training rows are wanted at all.
        trained: tasks whose training rows are; None: all.
        base: tokeniser and model, if they are loaded already.

    Raises:
        PemlError: a bad row, an empty task, or a model that cannot be loaded.
    """
    tasks = {task.name: task for task in recipe.build_tasks()}
    # Rows first: a typing error in a file should not wait for gigabytes of weights.
    wanted = (tasks if trained is None else trained) if training else ()
    train = {name: _training(tasks[name]) for name in wanted}
    held_out = {name: task.examples("eval") for name, task in tasks.items()}
    tokenizer, model = load_base(recipe) if base is None else base
    if form_of(model) == "heads":
        for task in tasks.values():
            check_heads(task)
    if not held_out or not all(held_out.values()):
        empty = next((name for name, rows in held_out.items() if not rows), "?")
        raise PemlError(f"task {empty!r} has no rows to evaluate on: give it some or leave it out")
    return Workbench(recipe, tokenizer, model, tasks, train, held_out)


def _training(task: Task) -> list[Example]:
    """All rows, or the first of a stream."""
    return list(islice(task.stream("train"), SAMPLE)) if task.source.streaming else task.examples("train")


def load_base(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokeniser and model that a recipe names.

    Raises:
        PemlError: the folder or Hub id does not give a language model or an encoder.
    """
    path = model_path(recipe.model)
    if (path.startswith((".", "/", "~")) or not path or Path(path).exists()) and not (
        Path(path) / "config.json"
    ).is_file():
        raise PemlError(f"model: {recipe.model} is not a model folder (there is no config.json in it)")
    dtype = recipe.setting("dtype")
    # Half-precision weights on a CPU are slow and gain nothing on models that fit there.
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    shared: dict[str, Any] = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    attention = recipe.train.get("attn_implementation")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **shared)
        kind = model_class(AutoConfig.from_pretrained(path, **shared))
        model, report = kind.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, output_loading_info=True, **shared
        )
    except Exception as error:  # hub, network, tokenizer and model classes fail in their own ways
        raise PemlError(
            f"model: {recipe.model} could not be loaded ({type(error).__name__}: {one_line(error)}); "
            "give a Hub id or a local folder with a language model or an encoder"
        ) from error
    # transformers fills what is missing with random numbers, and only warns.
    # BERT's own pooler is not there in many checkpoints, and heads do not read it.
    lacking = [
        key for key in (*report["missing_keys"], *report.get("mismatched_keys", ())) if "pooler." not in str(key)
    ]
    if lacking:
        raise PemlError(
            f"model: {recipe.model} lacks the weights of {lacking[0]} ({len(lacking)} in all): copy it again"
        )
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise PemlError(
            f"model: {recipe.model} has no tokenizer: put tokenizer.json and its configuration beside the model"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise PemlError(
            f"model: the tokenizer of {recipe.model} has more tokens than the model: they do not belong together"
        )
    if form_of(model) == "causal" and not _is_causal(model):
        raise PemlError(f"model: {recipe.model} is no causal language model: a token sees those after it")
    return tokenizer, model


def longest_row(recipe: Recipe, config: Any, tokenizer: PreTrainedTokenizerBase, form: Form) -> int:
    """Most tokens of a row: what the recipe allows, and what the model has positions for."""
    limits = [int(recipe.setting("max_length"))]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 1:
        limits.append(positions)
    if form == "heads":
        # Of RoBERTa's kin, whose positions begin behind the padding token's number, only the tokeniser knows.
        limits.append(tokenizer.model_max_length)
    return min(limits)


def form_for(config: Any) -> Form:
    """How a model with this configuration answers."""
    forms: dict[Any, Form] = {AutoModelForSeq2SeqLM: "seq2seq", AutoModel: "heads", AutoModelForCausalLM: "causal"}
    return forms[model_class(config)]


def form_of(model: PreTrainedModel) -> Form:
    """How a model answers: an encoder-decoder writes, a bare model has heads, any other goes on with its prompt."""
    if model.config.is_encoder_decoder:
        return "seq2seq"
    return "heads" if model.base_model is model else "causal"


def model_class(config: Any) -> Any:
    """The class that loads a checkpoint: encoders are those that were trained to fill in masked words."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    says_causal = any("CausalLM" in name or "LMHead" in name for name in config.architectures or ())
    fills_in = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return AutoModel if fills_in and not says_causal else AutoModelForCausalLM


def thirds(config: Any) -> tuple[int, ...] | None:
    """Layers at the ends of the three thirds of an encoder's depth, the last one last; None if it is not known."""
    depth = getattr(config, "num_hidden_layers", None)
    return None if depth is None else tuple(sorted({-(-depth * i // 3) for i in (1, 2, 3)}))


def _scale(examples: list[Example]) -> tuple[float, float]:
    """Mean and standard deviation of the values of a task; of values that are all the same, 1; of classes, 0, 1."""
    values = [example.value for example in examples if example.value is not None]
    return (fmean(values), pstdev(values) or 1.0) if values else (0.0, 1.0)


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether the first position ignores the second; an encoder loaded as a decoder would see its own answers."""
    ids = torch.tensor([[3, 4], [3, 5]], device=model.device)
    training = model.training
    logits = model.eval()(input_ids=ids).logits[:, 0].float()
    model.train(training)
    return torch.allclose(logits[0], logits[1], atol=1e-3)

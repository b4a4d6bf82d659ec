"""`peml export`: a run folder in a format that others load, whole, checked and described, or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoConfig, PreTrainedTokenizerBase

from peml.errors import PemlError
from peml.export.card import card
from peml.export.check import TOLERANCE, Checked, Order, answers, check_fresh
from peml.export.formats import adapted, write_kv, write_lora, write_merged, write_prefix
from peml.export.lint import lint
from peml.export.stock import check_new, new_folder
from peml.training import RunFolder, open_adapter
from peml.training.arguments import one_line
from peml.training.folder import write_text
from peml.training.recipe import Recipe
from peml.training.workbench import form_of, model_path

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of a checkpoint's weights; auto: as the base model's lie on disk."""

Say = Callable[[str], object]


class Exported(NamedTuple):
    """What was written.

    Args:
        folder: where.
        tasks: exported, by name; one None where nothing differs by task.
        checks: by task, if they were asked for.
    """

    folder: Path
    tasks: list[str | None]
    checks: dict[str | None, Checked]


def export_run(
    run: str | Path,
    form: str,
    tasks: Sequence[str] = (),
    output: str | Path | None = None,
    *,
    dtype: str = "auto",
    check: bool = False,
    say: Say = lambda _: None,
) -> Exported:
    """Write a run's adapter in a format that needs no peml.

    Args:
        run: its folder.
        form: a key of `FORMATS`.
        tasks: which to write, where they differ; none: all.
        output: a new folder; default `export/FORM` in the run's.
        dtype: of a checkpoint's weights, see `DTYPES`.
        check: load it in a fresh process without peml and compare logits and greedy answers.
        say: told what to mind, a sentence at a time.

    Raises:
        PemlError: the lint refuses, or the check finds another model; nothing is left then.
    """
    if dtype not in DTYPES:
        raise PemlError(f"--dtype {dtype} is unknown: choose {', '.join(DTYPES)}")
    one = f"{form}-{folder_name(tasks[0])}" if len(tasks) == 1 else form
    output = check_new(output or RunFolder(run).exports / one)
    # In single precision: what is folded in is rounded once, where it is written.
    opened = partial(open_adapter, run, dtype="float32", attn_implementation=None)
    recipe, tokenizer, model = opened()
    tuner = adapted(model)
    findings = lint(tuner, form)
    if any(finding.stops for finding in findings):
        reasons = "; ".join(finding.text for finding in findings)
        raise PemlError(f"{run} cannot be exported to {form}: {reasons}")
    limits = [finding.text for finding in findings]
    for limit in limits:
        say(limit)
    config = tuner.config_in_force
    assert config is not None
    config.revision = recipe.revision  # what is loaded by the base's name must be the same base
    wanted = _wanted(config.task_names, config.needs_task, tasks)
    bare, auto = tuner.model, {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
    stored = getattr(torch, dtype) if dtype != "auto" else _stored_dtype(recipe)
    orders: list[Order] = []
    checks: dict[str | None, Checked] = {}
    own_base = False
    with new_folder(output) as temporary:
        for number, task in enumerate(wanted):
            if model is None:
                _, tokenizer, model = opened()  # the one before is used up
            place = Path() if task is None or len(tasks) == 1 else Path(folder_name(task))
            (temporary / place).mkdir(exist_ok=True)
            expected = answers(model, task) if check else None
            written = _write(form, model, tokenizer, temporary / place, output / place, task, stored)
            if form == "kv" and not number:
                shutil.copyfile(Path(__file__).with_name("load_kv.py"), temporary / "load_kv.py")
            own_base = own_base or (form == "prefix" and written is not None)
            if expected is not None:
                if written is not None and form == "merged" and stored != torch.float32:
                    expected = answers(written, None)  # what rounding has made of it is no fault of the export
                where = temporary / place / ("prefix" if form == "prefix" else "")
                base = str(temporary / place / "base") if own_base else model_path(recipe.model)
                pinned = None if own_base else recipe.revision
                orders.append(Order(form, where, base, expected, auto[form_of(bare)], recipe.trust_remote_code, pinned))
            if written is not None:
                model = None
        if check:
            checks = dict(zip(wanted, check_fresh(orders), strict=True))
            for task, found in checks.items():
                _pass(found, task, rounded=form == "prefix" and own_base and stored != torch.float32)
        names = [task for task in wanted if task is not None] or list(config.task_names)
        metrics = RunFolder(run).read_metrics()
        own = [folder_name(task) for task in names] if wanted != [None] and len(tasks) != 1 else []
        stored_as, loader = str(stored).removeprefix("torch."), auto[form_of(bare)]
        text = card(form, recipe, metrics, names, own, own_base, limits, stored_as, loader)
        write_text(temporary / "README.md", text)
    return Exported(output, wanted, checks)


def push(folder: Path, repo: str, *, public: bool = False) -> str:
    """Put an export on the Hub, as one commit.

    Args:
        folder: of the export.
        repo: `user/name`, made if it is not there.
        public: whether a new one is seen by everybody.

    Returns:
        Its address.

    Raises:
        PemlError: the Hub refuses.
    """
    try:
        api = HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Export of peml"))
    except Exception as error:  # hub and network fail in their own ways
        raise PemlError(
            f"{repo}: the Hub did not take it ({type(error).__name__}: {one_line(error)}); the export is in {folder}"
        ) from error


def folder_name(task: str) -> str:
    """A task's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "_", task).strip(".") or "task"


def _stored_dtype(recipe: Recipe) -> torch.dtype:
    """Of the base model's weights on disk, as its configuration says."""
    path, remote = model_path(recipe.model), recipe.trust_remote_code
    found = AutoConfig.from_pretrained(path, revision=recipe.revision, trust_remote_code=remote).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _wanted(task_names: Sequence[str], by_task: bool, given: Sequence[str]) -> list[str | None]:
    unknown = [task for task in given if task not in task_names]
    if unknown:
        raise PemlError(f"--task {unknown[0]}: the run has the tasks {', '.join(task_names)}")
    if not by_task:
        return [None]
    wanted = list(dict.fromkeys(given)) or list(task_names)
    if len({folder_name(task) for task in wanted}) < len(wanted):
        raise PemlError("two tasks would get the same folder: export them one by one with --task")
    return list(wanted)


def _write(
    form: str,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    final: Path,
    task: str | None,
    dtype: torch.dtype,
) -> Any:
    """The files of one task; the model that was used up by it, as it is written, or None."""
    tuner = adapted(model)
    if form == "merged":
        return write_merged(tuner, tokenizer, folder, task, dtype)
    if form == "prefix":
        return write_prefix(tuner, tokenizer, folder, final, task, dtype)
    (write_lora if form == "lora" else write_kv)(tuner, folder, task)
    return None


def _pass(found: Checked, task: str | None, rounded: bool) -> None:
    if found.passed or rounded:
        return
    whose = "" if task is None else f" of task {task!r}"
    what = "its logits differ" if found.same_tokens else "its greedy answers differ"
    raise PemlError(
        f"the export{whose} is not the model that it was made from: {what} (logits by {found.difference:.1e}, allowed "
        f"{TOLERANCE:.0e}); nothing was written"
    )

"""Where heads begin: fitted to what the encoder says before it is trained.

Heads that begin at random pull the encoder about before they know anything; a linear probe first, then the training of
all, keeps what the encoder was pre-trained for (arXiv:2202.10054, section 4).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from peml.attention import evaluating
from peml.heads import TaskHeads
from peml.tasks.encode_heads import encode_heads
from peml.training.data import Collator, TaskRows
from peml.training.workbench import Workbench
from peml.tuner import PemlModel

INVERSE_STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""scikit-learn's C of the logistic regressions, on standardised features, and 1 / alpha of the ridge: a fifth of the
rows, or leaving out each row, chooses one for each task. Our choice: one for all fits some tasks by heart."""


def probe_heads(model: PeftModel, bench: Workbench, tasks: Iterable[str], without: Collection[int] = ()) -> None:
    """Fit heads to the features of the model as it is: logistic regression for classes, ridge for values.

    At most `train.probe_rows` rows of each task are looked at. A task whose rows are all of one class keeps its random
    head, and so does every task with `heads.hidden`.

    Args:
        model: with heads.
        bench: with the training rows, and the recipe.
        tasks: whose heads are fitted.
        without: training rows, counted over all tasks, that weights must not have seen.
    """
    tuner, most = cast("PemlModel", model.base_model), bench.recipe.setting("probe_rows")
    config, heads = tuner.config_in_force, tuner.heads
    assert config is not None and heads is not None
    if not most or heads.config.hidden:
        return
    begins = dict(zip(bench.train, accumulate(map(len, bench.train.values()), initial=0), strict=False))
    apart = set(without)
    for name in tasks:
        given = [row for at, row in enumerate(bench.train[name], begins[name]) if at not in apart]
        order = np.random.default_rng([bench.recipe.seed, 4]).permutation(len(given))[:most]
        rows = TaskRows({name: encode_heads(bench.tokenizer, [given[i] for i in order], bench.max_length)}, "heads")
        if len(rows) > 1:
            size = bench.recipe.setting("per_device_eval_batch_size")
            _fit(
                heads,
                config.task_names.index(name),
                *_features(model, rows, Collator(bench.pad_token_id, "heads"), size),
            )


def _features(
    model: PeftModel, rows: TaskRows, collate: Collator, batch_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows.rows[i].input_ids))
    features, targets = [], []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch: dict[str, Any] = collate([rows[i] for i in order[start : start + batch_size]])
            targets.append(batch.pop("labels"))
            tensors = {key: value.to(device) for key, value in batch.items() if key != "tasks"}
            features.append(model(**tensors, tasks=rows.task_names[0]).features.double().cpu())
    return torch.cat(features).numpy(), torch.cat(targets).double().numpy()


@torch.no_grad()
def _fit(heads: TaskHeads, task: int, features: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    inputs, classes = scaler.transform(features), heads.config.num_labels[task]
    if classes == 1:
        mean, scale = heads.config.scale_of(task)
        fitted: Any = RidgeCV(alphas=[1 / strength for strength in INVERSE_STRENGTHS])
        fitted.fit(inputs, (targets - mean) / scale)
        weight, bias, seen = fitted.coef_[None], np.array([fitted.intercept_]), np.array([0])
    elif len(set(targets.tolist())) < 2:
        return
    else:
        fitted = _regression(targets).fit(inputs, targets)
        fitted = getattr(fitted, "best_estimator_", fitted)
        weight, bias, seen = fitted.coef_, fitted.intercept_, fitted.classes_.astype(int)
        if len(weight) == 1:  # two classes have one set of weights: half of it for each
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    # The head reads features as they are: the scaling goes into its weights.
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    heads.weight[task] = 0
    # A class that no row has is as unlikely as can be told from so many rows.
    heads.bias[task] = float(bias.min()) - float(np.log(len(targets))) if classes > 1 else 0.0
    heads.weight[task, seen] = torch.from_numpy(weight).to(heads.weight)
    heads.bias[task, seen] = torch.from_numpy(bias).to(heads.bias)


def _regression(targets: NDArray[np.float64]) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit

    kind = LogisticRegression(max_iter=200)
    if np.unique(targets, return_counts=True)[1].min() < 5:  # a fifth of so few rows chooses nothing
        return kind.set_params(C=1e-3)
    fifth = StratifiedShuffleSplit(1, test_size=0.2, random_state=0)
    return GridSearchCV(kind, {"C": INVERSE_STRENGTHS}, cv=fifth, scoring="neg_log_loss")

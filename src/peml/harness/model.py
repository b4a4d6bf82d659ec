"""The model class of lm-eval: its own for transformers, with every request under the route of its task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel

from peml.errors import PemlError
from peml.harness.routes import Given, Routes, read_routes
from peml.training import open_adapter
from peml.training.workbench import form_of

Found = TypeVar("Found")


class PemlLM(HFLM):
    """A run of `peml train`, as `model="peml"` of lm-eval.

    Tokens, batches, scoring and decoding are those of lm-eval's own class: this one loads the run, and answers the
    requests of one task after those of another. Sorted by task they lose no more than a batch that is not full, and
    lm-eval computes rows with the same context once, which would be wrong where their tasks differ.

    Args:
        run: folder of the run.
        route: `HARNESS_TASK=TASK;...`, where names differ.
        device: default: a GPU, if there is one.
        dtype: of the weights; default: as the run was trained.
        batch_size: rows of a batch, or `auto`.
        max_batch_size: that `auto` begins with.
        max_length: longest row in tokens; default: the model's own limit, not the recipe's, because examples in the
            prompt need room.
        options: further ones of `HFLM` for a model that is loaded already, as `add_bos_token`.

    Raises:
        PemlError: no finished run, an encoder with heads, or a route to an unknown task.
    """

    def __init__(
        self,
        run: str,
        route: Given = "",
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        if wrong := {"pretrained", "peft", "tokenizer"} & set(options):
            raise PemlError(f"model peml takes run=FOLDER, which knows its base model, not {', '.join(sorted(wrong))}")
        given = read_routes(route)
        recipe, tokenizer, model = open_adapter(str(run), **({} if dtype is None else {"dtype": dtype}))
        if form_of(model.base_model.model) == "heads":
            raise PemlError(f"{run} is an encoder with heads, which gives words no probability: use `peml evaluate`")
        config: Any = model.base_model.config_in_force
        self.routes = Routes(given, tuple(config.task_names))
        self.run, self.peml_model = str(run), model
        super().__init__(
            pretrained=model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            **options,
        )
        # From here on lm-eval wants the name of what it was given.
        self.pretrained, self.revision = str(recipe.model), recipe.revision or "main"

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one.

        Raises:
            PemlError: a task without a route, or a prompt that is made from the text.
        """
        tuner: Any = self.peml_model.base_model
        if tuner.reads_input():
            raise PemlError(
                f"the prompt of {self.run} is made from the text, without the answers that it is to rank, and lm-eval "
                "does not tell them apart: use `peml evaluate`"
            )
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts.

        Raises:
            PemlError: a task without a route.
        """
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the adapted model writes.

        Raises:
            PemlError: a task without a route.
        """
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse lm-eval's store of answers, which asks for the text alone: tasks would get each other's."""
        raise PemlError("model peml does not go with use_cache: what it stores does not say which task an answer is of")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's record says of the model; nothing is asked of the Hub."""
        parameters = sum(parameter.numel() for parameter in self.peml_model.parameters())
        return {
            "model_num_parameters": parameters,
            "model_dtype": str(next(self.peml_model.parameters()).dtype),
            "model_revision": self.revision,
            "model_sha": "",
            "model_name": self.pretrained,
            "peml_run": self.run,
            "peml_tasks": list(self.routes.task_names),
            "peml_routes": dict(self.routes.given),
        }

    def _by_task(self, answer: Callable[..., list[Found]], requests: Sequence[Any], disable_tqdm: bool) -> list[Found]:
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(self.routes.task_of(request.task_name), []).append(place)
        found: dict[int, Found] = {}
        model: PeftModel = self.peml_model
        tuner: Any = model.base_model
        for task, own in places.items():
            with tuner.routed(task):
                answers = answer([requests[place] for place in own], disable_tqdm=disable_tqdm)
            found.update(zip(own, answers, strict=True))
        return [found[place] for place in range(len(requests))]

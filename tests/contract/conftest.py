"""A prompt that is made from the text reads all of it here, as if every call said so."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peml.hooks import ForwardHooks


@pytest.fixture(autouse=True)
def _texts_without_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ForwardHooks._text

    def text(self: ForwardHooks, args: Any, kwargs: Any, input_mask: Tensor | None) -> Any:
        found = told(self, args, kwargs, input_mask)
        if found is None or found[1] is not None:
            return found
        mask = self._argument("attention_mask", args, kwargs)
        return found[0], torch.ones(found[0].shape[:2]) if mask is None else mask

    monkeypatch.setattr(ForwardHooks, "_text", text)

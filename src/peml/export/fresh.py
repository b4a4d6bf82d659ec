"""Load an export with stock libraries alone and say what it answers; `peml.export.check` runs this text by itself.

Reads a JSON list of orders on standard input, and writes logits and tokens of each to the file that it names.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file


def load(order: dict[str, Any]) -> Any:
    """The exported model, as its card says."""
    folder, shared = Path(order["folder"]), {"dtype": torch.float32, "trust_remote_code": order["remote"]}
    named = shared | {"revision": order["revision"]}
    auto = getattr(transformers, order["auto"])
    if order["format"] == "merged":
        return auto.from_pretrained(str(folder), **shared)
    if order["format"] == "kv":
        spec = importlib.util.spec_from_file_location("load_kv", order["loader"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.load(order["base"], folder, **named)
    base = auto.from_pretrained(order["base"], **named)
    return PeftModel.from_pretrained(base, str(folder))


def answer(order: dict[str, Any]) -> None:
    """Load one export and write down what it says."""
    model = load(order).eval()
    ids = torch.tensor(order["input_ids"])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole = inputs | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        # What stands in front of the text has no logits of ours.
        logits = model(**whole).logits[:, -ids.shape[1] :].contiguous()
        tokens = model.generate(**inputs, **order["settings"])[:, -order["settings"]["max_new_tokens"] :].contiguous()
    save_file({"logits": logits, "tokens": tokens}, order["answers"])


def main() -> None:
    """Answer all orders, and see that nothing of ours was needed."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for order in json.load(sys.stdin):
        try:
            answer(order)
        except Exception as error:  # whatever a library says of a folder is what there is to know
            sys.exit(f"{order['folder']}: {type(error).__name__}: {error}")
    ours = sorted(name for name in sys.modules if name.partition(".")[0] == "peml")
    if ours:
        sys.exit(f"{ours[0]} was imported: this is no check of stock libraries")


if __name__ == "__main__":
    main()

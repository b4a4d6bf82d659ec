"""The table family x feature: what works, what is refused and why; and the page of the documentation that shows it."""

from typing import NamedTuple

from families import ENCODER_DECODERS, ENCODERS, FAMILIES

ATTENTIONS = ("sdpa", "eager")

FEATURES = {
    "forward": "logits",
    "gradients": "gradients of the prefix",
    "checkpointing": "non-reentrant gradient checkpointing",
    "left padding": "rows padded on the left",
    "right padding": "rows padded on the right",
    "greedy": "`generate`, greedy, through the cache",
    "sampling": "`generate(do_sample=True)`, through the cache",
    "beams": "`generate(num_beams=3)`, through the cache",
    "return sequences": "`num_return_sequences=2`, with beams and sampled",
    "static cache": '`cache_implementation="static"`',
    "prompt lookup": "`prompt_lookup_num_tokens`, speculative decoding",
    "packing": "texts in one row, positions start again, `use_cache=False`",
    "continuous batching": "`generate_batch`",
}
GENERATION = ("greedy", "sampling", "beams", "return sequences", "static cache", "prompt lookup", "continuous batching")


class Cell(NamedTuple):
    """What a cell of the table is if it does not simply work."""

    mark: str
    why: str
    refusal: str | None = None  # what the error says; None: the model itself has not got it


NO_SDPA = Cell("–", "transformers has no SDPA for this family: its scores are soft-capped, or have sinks")
NO_TEXT = Cell("–", "an encoder does not generate")
NO_LEFT = Cell("–", "positions count from the left edge, padding included: such a model is padded on the right")
NO_PACKING = Cell(
    "refused",
    "the model does not tell packed texts apart: give each a row of its own, or a 4D mask",
    "does not keep texts apart that are packed into one row",
)
NO_POSITIONS = Cell(
    "refused",
    "the model reads no position ids, so that nothing would keep packed texts apart: give each a row of its own",
    NO_PACKING.refusal,
)
NO_REQUESTS = Cell(
    "refused",
    "transformers' continuous batching is made for decoders alone",
    "continuous batching serves no encoder-decoder models",
)

CELLS: dict[tuple[str, str, str], Cell] = {}
for _feature in FEATURES:
    for _family in ("gemma2", "gpt_oss"):
        CELLS[_family, "sdpa", _feature] = NO_SDPA
for _attention in ATTENTIONS:
    for _family in ENCODERS:
        CELLS[_family, _attention, "packing"] = NO_PACKING
        for _feature in GENERATION:
            CELLS[_family, _attention, _feature] = NO_TEXT
    CELLS["opt", _attention, "packing"] = NO_PACKING
CELLS["gpt_oss", "eager", "packing"] = NO_PACKING
for _attention in ATTENTIONS:
    for _family in ("bert", "minilm"):
        CELLS[_family, _attention, "left padding"] = NO_LEFT
for _attention in ATTENTIONS:
    for _family in ("bart", "mbart", "marian"):
        CELLS[_family, _attention, "left padding"] = NO_LEFT
    for _family in ENCODER_DECODERS:
        CELLS[_family, _attention, "packing"] = NO_POSITIONS
        CELLS[_family, _attention, "continuous batching"] = NO_REQUESTS


def page() -> str:
    """`docs/families.md`."""
    lines = [
        "# Prefixes on every family of models",
        "",
        "<!-- Written by tests/test_families.py, from the parameters of its tests. -->",
        "",
        "Each cell is a test on a tiny random model: the result with a learned prefix, shared and per task, with gates",
        "and without, equals a slow reference that knows no cache, no padding and no packing; or the call is refused",
        "with a sentence that says why. Cells name the attention implementations that work.",
        "",
        f"| | {' | '.join(FEATURES)} |",
        f"|---|{'---|' * len(FEATURES)}",
    ]
    notes: dict[str, int] = {}
    for name, family in FAMILIES.items():
        row = []
        for feature in FEATURES:
            absent = {a: CELLS[name, a, feature] for a in ATTENTIONS if (name, a, feature) in CELLS}
            works = [a for a in ATTENTIONS if a not in absent]
            cell = max(absent.values(), key=lambda cell: cell.refusal is not None, default=None)
            number = "" if cell is None else f" [{notes.setdefault(cell.why, len(notes) + 1)}]"
            row.append((", ".join(works) or cell.mark) + number)
        lines.append(f"| {family.title} | {' | '.join(row)} |")
    lines += ["", "What the columns are:", "", *(f"- **{name}**: {what}." for name, what in FEATURES.items())]
    lines += ["", "Where a cell does not simply work:", "", *(f"{number}. {note}." for note, number in notes.items())]
    return "\n".join([*lines, *LIMITS]) + "\n"


LIMITS = [
    "",
    "Also:",
    "",
    "- Packed rows need `use_cache=False` (Trainer's setting): with a cache, transformers itself does not tell the texts",
    "  apart. Rows that pack several tasks are refused where there is a prefix per task.",
    "- Continuous batching serves the task of `select_task`, and shares no blocks between requests, because another task's",
    "  are others; `generate_batch(tasks=...)` is refused.",
    '- `set_attn_implementation("sdpa")` or `"eager"` may be called at any time; any other implementation is refused at',
    "  the next call, because the prefix would be lost in it.",
]

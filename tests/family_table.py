"""The table family x feature: what works, what is refused and why; and the page of the documentation that shows it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from zoo import ENCODER_DECODERS, ENCODERS, FAMILIES

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

SHORT = {"flex_attention": "flex", "flash_attention_2": "flash"}
BACKENDS = ("flex_attention", "flash_attention_2")
BACKEND_FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gpt2", "bert", "t5", "bart")

NO_WINDOW = Cell("refused", "flash attention would hide the prefix behind a sliding window: use sdpa", "window")
NO_ROWS = Cell("refused", "flash attention would give the prefix to the first text of a row alone: use sdpa", "packed")
NO_CROSS = Cell("refused", "flash attention mistakes the encoder's padding for the decoder's: use sdpa", "cross")
NO_PAGES = Cell("refused", "continuous batching makes masks of another kind: switch to sdpa or eager", "pages")
NO_BIAS = Cell("–", "transformers has no flash attention for this family: positions are added to its scores")
NO_STATIC = Cell("–", "transformers itself fails to prepare the masks of flex attention for a static cache")
UNTRIED = Cell("GPU", "torch has no backward pass of flex attention on a CPU: compared with SDPA on a GPU, for Llama")


def backend_cell(family: str, backend: str, feature: str) -> Cell | None:
    """What a cell of the second table is if it does not simply work."""
    is_flash = backend == "flash_attention_2"
    if is_flash and family == "t5":
        return NO_BIAS
    if is_flash and family == "bart":
        return NO_CROSS
    if is_flash and family in ("mistral", "gemma2"):
        return NO_WINDOW
    if feature == "continuous batching" and family not in ENCODERS and not FAMILIES[family].encoder:
        return NO_PAGES
    if feature in ("gradients", "checkpointing") and not is_flash:
        return UNTRIED
    if feature == "static cache" and not is_flash and family not in ENCODERS:
        return NO_STATIC
    if feature == "packing" and is_flash and FAMILIES[family].decoder:
        return NO_ROWS
    own = CELLS.get((family, "eager", feature))
    return None if own is NO_SDPA else own


def backend_cells(feature: str) -> list[tuple[str, str]]:
    """Families and implementations of the second table where a feature works."""
    return [(f, b) for f in BACKEND_FAMILIES for b in BACKENDS if backend_cell(f, b, feature) is None]


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

    def note(cell: Cell) -> str:
        return f"[{notes.setdefault(cell.why, len(notes) + 1)}]"

    def row(title: str, implementations: Sequence[str], cell_of: Callable[[str, str], Cell | None], features) -> str:
        cells = []
        for feature in features:
            found = {SHORT.get(a, a): cell_of(a, feature) for a in implementations}
            works = [name for name, cell in found.items() if cell is None]
            absent = {name: cell for name, cell in found.items() if cell is not None}
            if not works and len(set(absent.values())) == 1:
                only = absent.popitem()[1]
                cells.append(f"{only.mark} {note(only)}")
            else:
                cells.append(", ".join(works + [f"{name} {cell.mark} {note(cell)}" for name, cell in absent.items()]))
        return f"| {title} | {' | '.join(cells)} |"

    for name, family in FAMILIES.items():
        lines.append(
            row(family.title, ATTENTIONS, lambda a, feature, name=name: CELLS.get((name, a, feature)), FEATURES)
        )
    features = [feature for feature in FEATURES if feature not in ("sampling", "return sequences")]
    lines += [
        "",
        "The same in flex attention (uncompiled, in double precision) and in flash attention 2 (a slow double of it that",
        "takes what transformers gives to its kernels). Compiled, and with gradients, flex attention is tested on a GPU,",
        "flash attention with its kernels on a GPU where `flash_attn` is installed.",
        "",
        f"| | {' | '.join(features)} |",
        f"|---|{'---|' * len(features)}",
    ]
    for name in BACKEND_FAMILIES:
        cell_of = partial(backend_cell, name)
        lines.append(row(FAMILIES[name].title, BACKENDS, cell_of, features))
    lines += ["", "What the columns are:", "", *(f"- **{name}**: {what}." for name, what in FEATURES.items())]
    lines += ["", "Where a cell does not simply work:", "", *(f"{number}. {note}." for note, number in notes.items())]
    return "\n".join([*lines, *LIMITS]) + "\n"


LIMITS = [
    "",
    "Also:",
    "",
    "- Packed rows need `use_cache=False` (Trainer's setting), and are refused without: with a cache, transformers itself",
    "  does not tell the texts apart. Rows that pack several tasks, where there is a prefix per task, are for sdpa and",
    "  eager; other implementations refuse them.",
    "- Continuous batching serves the task of `select_task`, or each request's own by `tasks_of=` of",
    "  `init_continuous_batching`, and shares no blocks between requests, because another task's are others;",
    "  `generate_batch(tasks=...)` is refused.",
    "- `set_attn_implementation` may be called at any time with `sdpa`, `eager`, `flex_attention` or `flash_attention_2`;",
    "  any other implementation is refused at the next call, because the prefix would be lost in it.",
    "- Flash attention adds nothing to scores, so that gates are refused: `PrefixTuning` works, `PrefixNAS` and its table",
    "  need another implementation. A sliding window is refused once it does not hold the prefix and all of the text.",
    "- In encoder-decoders every attention layer is a slot with a prefix of its own, in this order: the encoder's layers,",
    "  then for each layer of the decoder its self-attention and its cross-attention. `num_virtual_tokens` as a tuple gives",
    "  their lengths (0: none). Position biases (T5) are those of the text; a prefix has none.",
    "- The encoder of an encoder-decoder cannot be called by itself, where its prefix would be lost: `generate` may.",
    "- Prompts at the input (`PromptTuning`, `MultitaskPrompt`, `Attempt`) are tested on the same families, with the same",
    "  kinds of padding and generation. Refused: rotary positions that change with the length of the text (`dynamic`,",
    "  `longrope`), encoders that do not read embeddings as they read tokens, and rows of an encoder padded on the left.",
    "  In layers with a sliding window they stay in sight, where a prepended prompt would not.",
    "  A prompt that is made from the text (`Attempt`) serves no packed rows and no cache other than that of `generate`.",
]

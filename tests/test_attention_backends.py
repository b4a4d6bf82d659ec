"""A prefix in flex attention and in flash attention 2, as far as a CPU can tell; the rest is for a GPU."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import families
import peml
import zoo
from backend_kit import FLASH, WARNINGS, without_a_compiler_or_a_kernel  # noqa: F401
from families import NEW, PROMPTS, TABLES, asked, asked_padded, made, prefix_of, targets, texts
from family_table import BACKEND_FAMILIES, BACKENDS, NO_PACKING, backend_cells
from models import adapt, assert_same, gradients, probe_loss
from peml import PemlError
from test_families import close, expected_greedy, expected_logits, generated, new_tokens

ROW_TASKS = ["cola", "rte"]


pytestmark = WARNINGS


def cells(feature: str):
    return pytest.mark.parametrize(("family", "backend"), backend_cells(feature))


prompts = pytest.mark.parametrize("prompt", ["shared", "per task"])


def gates(backend: str, prompt: str) -> str:
    """Gates as well, where there can be any."""
    return prompt if backend == FLASH else {"shared": "gated", "per task": "per task, gated"}[prompt]


@cells("forward")
@pytest.mark.parametrize("prompt", TABLES)
@torch.no_grad()
def test_forward(family: str, backend: str, prompt: str) -> None:
    if backend == FLASH and "gated" in prompt:
        pytest.skip("refused, and tested below")
    model = made(family, backend, prompt)
    for i, (row, target, task) in enumerate(zip(texts(), targets(family), ROW_TASKS, strict=True)):
        found = model(**asked(family, row, target), tasks=task)[0][0]
        close(found, expected_logits(family, prompt, i, task), "sdpa")


@cells("left padding")
@prompts
@torch.no_grad()
def test_left_padding(family: str, backend: str, prompt: str) -> None:
    check_padding(family, backend, gates(backend, prompt), "left")


@cells("right padding")
@prompts
@torch.no_grad()
def test_right_padding(family: str, backend: str, prompt: str) -> None:
    check_padding(family, backend, gates(backend, prompt), "right")


def check_padding(family: str, backend: str, prompt: str, side: str) -> None:
    call, mask = asked_padded(family, side)
    logits = made(family, backend, prompt)(**call, tasks=ROW_TASKS)[0]
    for i, task in enumerate(ROW_TASKS):
        close(logits[i][mask[i]], expected_logits(family, prompt, i, task), "sdpa")


@cells("packing")
@torch.no_grad()
def test_packing(family: str, backend: str) -> None:
    model, rows = made(family, backend, "gated"), texts()
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    found = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, tasks="cola").logits[0]
    close(found, torch.cat([expected_logits(family, "gated", i, "cola") for i in range(2)]), "sdpa")


@cells("greedy")
@prompts
def test_greedy(family: str, backend: str, prompt: str) -> None:
    prompt = gates(backend, prompt)
    assert torch.equal(generated(made(family, backend, prompt)), expected_greedy(family, prompt))


@cells("static cache")
def test_static_cache(family: str, backend: str) -> None:
    """Padded, and one text alone, of which `generate` drops the mask."""
    model = made(family, backend, "per task")
    settings = {"cache_implementation": "static", "disable_compile": True}
    wanted = expected_greedy(family, "per task")
    assert torch.equal(generated(model, **settings), wanted)
    call = {"max_new_tokens": NEW, "do_sample": False, "tasks": ROW_TASKS[0]} | settings
    assert torch.equal(new_tokens(model, texts()[0][None], **call)[0], wanted[0])


@pytest.mark.parametrize("family", [f for f in BACKEND_FAMILIES if f not in zoo.ENCODERS])
def test_transformers_has_no_static_cache_for_flex_attention(family: str) -> None:
    """The plain model fails where masks are prepared for compiled steps."""
    with pytest.raises(AttributeError, match="BlockMask"):
        families.build(family, "flex_attention").generate(
            texts()[0][None], cache_implementation="static", disable_compile=True, max_new_tokens=3
        )


@cells("gradients")
def test_gradients(family: str, backend: str) -> None:
    check_gradients(family, backend)


@cells("checkpointing")
def test_checkpointing(family: str, backend: str) -> None:
    check_gradients(family, backend, checkpointing=True)


def check_gradients(family: str, backend: str, checkpointing: bool = False) -> None:
    call, mask = asked_padded(family, "right")
    found = []
    for attention in (backend, "sdpa"):
        model = made(family, attention, "per task").train()
        if checkpointing and attention == backend:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        probe_loss(model(**call, tasks=ROW_TASKS)[0][mask]).backward()
        found.append(gradients(model))
    assert_same(*found)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_prompts_at_the_input(family: str, backend: str) -> None:
    """Soft tokens are run through the same attention, and are no packed text."""
    model, row = adapt(families.build(family, "sdpa"), prompt=peml.PromptTuning(3, per_task=True)), texts()[1]
    wanted = model(input_ids=row[None], tasks="rte").logits
    model.base_model.model.set_attn_implementation(backend)
    close(model(input_ids=row[None], tasks="rte").logits, wanted, "sdpa")


def test_flex_attention_has_no_gradients_on_a_cpu() -> None:
    """Torch's own word, about the plain model."""
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        families.build("llama", "flex_attention")(input_ids=texts()[0][None])


@pytest.mark.parametrize("feature", ["sampling", "return sequences"])
@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_ways_to_generate(family: str, backend: str, feature: str) -> None:
    found = []
    for attention in (backend, "sdpa"):
        torch.manual_seed(3)
        settings = {"do_sample": True, "num_return_sequences": 1 + (feature == "return sequences")}
        found.append(generated(made(family, attention, "per task"), **settings))
    assert torch.equal(*found)


@cells("beams")
def test_beams(family: str, backend: str) -> None:
    model, other = made(family, backend, "per task"), made(family, "eager", "per task")
    assert torch.equal(generated(model, num_beams=3), generated(other, num_beams=3))


@cells("prompt lookup")
def test_prompt_lookup(family: str, backend: str) -> None:
    model, row = made(family, backend, "shared"), texts()[0][:3].repeat(3)
    call = {"max_new_tokens": NEW, "do_sample": False, "tasks": "cola", "prompt_lookup_num_tokens": 2}
    wanted = families.greedy(family, row, prefix_of(model, "cola"), NEW)
    assert torch.equal(new_tokens(model, row[None], **call)[0], wanted)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@torch.no_grad()
def test_a_mask_that_flex_attention_is_given_ready_made(kind: str) -> None:
    model, row = made("llama", "flex_attention", "gated"), texts()[1]
    mask = torch.ones(1, 1, 6, 6).tril().bool()
    given = mask if kind == "bool" else torch.zeros(1, 1, 6, 6).double().masked_fill(~mask, -1e9)
    found = model(input_ids=row[None], attention_mask=given).logits[0]
    close(found, families.logits("llama", row, prefix_of(model, "cola")), "sdpa")


def test_layers_share_the_masks_of_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is made per length of the prefix, not one per layer."""
    from peml.attention import flex

    made_masks = []
    create = flex._create()
    monkeypatch.setattr(flex, "_create", lambda: lambda *args, **kw: made_masks.append(args) or create(*args, **kw))
    with torch.no_grad():
        made("llama", "flex_attention", "shared")(input_ids=texts()[0][None])
        assert len(made_masks) == 1
        made("llama", "flex_attention", "gated")(input_ids=texts()[0][None])
    assert len(made_masks) == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_continuous_batching_is_refused(family: str, backend: str) -> None:
    if (family, backend) == ("t5", FLASH):
        pytest.skip("transformers has no flash attention for T5")
    model, why = made(family, backend, "shared"), f"with a prefix does not go through '{backend}'"
    with pytest.raises(PemlError, match="serves no encoder-decoder models" if family == "t5" else why):
        families.batched(model)


@pytest.mark.parametrize(
    ("family", "backend"), [("bert", FLASH), *((f, "flex_attention") for f in ("bert", "t5", "bart"))]
)
def test_packing_is_refused(family: str, backend: str) -> None:
    model, row = made(family, backend, "shared"), texts()[1]
    with pytest.raises(PemlError, match=NO_PACKING.refusal), torch.no_grad():
        model(**asked(family, row, targets(family)[0]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


@torch.no_grad()
def test_every_implementation_may_be_switched_to() -> None:
    model, row = made("llama", "sdpa", "shared"), texts()[0]
    wanted = families.logits("llama", row, prefix_of(model, "cola"))
    base = model.base_model.model
    for name in (FLASH, "flex_attention", "eager", FLASH, "peml_fa2", "sdpa"):
        base.set_attn_implementation(name)
        close(model(input_ids=row[None]).logits[0], wanted, "eager")
        assert base.prompt_host.implementation == (FLASH if name == "peml_fa2" else name)
    base.set_attn_implementation(FLASH)
    model(input_ids=row[None])
    assert model.unload().config._attn_implementation == FLASH


# With a compiler, and on a GPU.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler has its own
@torch.no_grad()
def test_flex_attention_compiled() -> None:
    model, (call, mask) = made("llama", "flex_attention", "per task, gated").float(), asked_padded("llama", "left")
    logits = model(**call, tasks=ROW_TASKS).logits
    for i, task in enumerate(ROW_TASKS):
        wanted = expected_logits("llama", "per task, gated", i, task)
        torch.testing.assert_close(logits[i][mask[i]].double(), wanted, rtol=1e-4, atol=1e-4)


def on_gpu(backend: str, prompt, dtype: torch.dtype) -> tuple:
    """A model whose heads are of a size that the kernels have, and the same with SDPA."""
    models = []
    for attention in (backend, "sdpa"):
        torch.manual_seed(0)
        base = zoo.FAMILIES["llama"].model._from_config(
            type(zoo.FAMILIES["llama"].config())(**zoo.LLAMA | {"hidden_size": 64, "head_dim": 16}),
            attn_implementation=attention,
        )
        models.append(adapt(base.to("cuda", dtype).eval(), prompt=prompt))
    return tuple(models)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prompt", ["shared", "gated", "per task, gated", "searched"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flex_attention_on_a_gpu(prompt: str, checkpointing: bool) -> None:
    """Logits and gradients, those of gates that are searched among them."""
    config = peml.PrefixNAS(num_virtual_tokens=3, num_cells=1, width=8) if prompt == "searched" else PROMPTS[prompt]
    call, mask = asked_padded("llama", "left")
    models = on_gpu("flex_attention", config, torch.float32)
    if checkpointing:
        models[0].base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    found = [run(model.train(), call, mask) for model in models]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-3)
    assert_near(found[0][1], found[1][1], 2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash_attn is not installed")
@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_attention_on_a_gpu(side: str) -> None:
    call, mask = asked_padded("llama", side)
    found = [run(model, call, mask) for model in on_gpu(FLASH, PROMPTS["per task"], torch.bfloat16)]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=5e-2, atol=5e-2)
    assert_near(found[0][1], found[1][1], 5e-2)
    model, other = on_gpu(FLASH, PROMPTS["per task"], torch.bfloat16)
    settings = {"max_new_tokens": 4, "do_sample": False, "tasks": ROW_TASKS, "output_logits": True}
    settings["return_dict_in_generate"] = True
    ids, kept = (call[name].cuda() for name in ("input_ids", "attention_mask"))
    if side == "left":
        first, second = (m.generate(ids, attention_mask=kept, **settings).logits[0] for m in (model, other))
        torch.testing.assert_close(first, second, rtol=5e-2, atol=5e-2)


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Gradients, by the largest of them all."""
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name in wanted:
        torch.testing.assert_close(found[name] / largest, wanted[name] / largest, rtol=tolerance, atol=tolerance)


def run(model, call: dict, mask: Tensor) -> tuple[Tensor, dict]:
    logits = model(**{name: tensor.cuda() for name, tensor in call.items()}, tasks=ROW_TASKS).logits.float()
    logits = logits[mask.cuda()]
    probe_loss(logits).backward()
    return logits.detach(), gradients(model)

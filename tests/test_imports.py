"""Imports flow one way: a room of the package knows only the rooms below it.

The rules are read off the syntax tree: nothing needs to be importable, and an import inside a function
counts like any other. Imports for type checkers only (`if TYPE_CHECKING:`) are free.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted(path.relative_to(SOURCE) for path in (SOURCE / "peml").rglob("*.py"))

# From the ground up: each room may know those above it in this list.
ROOMS = [
    "errors",
    "routing",
    "adapters",
    "prompts",
    "kernel",
    "bank",
    "siblings",
    "mlp",
    "attention",
    "batching",
    "hooks",
    "heads",
    "saving",
    "picture",
    "groups",
    "config",
    "attached",
    "merging",
    "prompting",
    "answering",
    "growth",
    "clusters",
    "tuner",
    "_peft",
    "methods",
    "tasks",
    "mixing",
    "evaluation",
    "balance",
    "training",
    "planning",
    "affinity",
    "regimes",
    "tuning",
    "compare",
    "report",
    "export",
    "inspection",
    "serving",
    "generate",
    "harness",
    "demo",
    "cli_report",
    "cli_tasks",
    "cli_use",
    "cli_affinity",
    "cli_evaluate",
    "cli_plan",
    "cli",
    "__init__",
    "__main__",
]

# The rooms of pure mathematics.
PURE = {"adapters", "prompts"}
PURE_MAY_KNOW = {"errors", "routing"}
PURE_MUST_NOT_KNOW = {"transformers", "peft"}

# PEFT promises nothing about these, nor about names with a leading underscore.
PEFT_INTERNALS = ("peft.mapping", "peft.utils.peft_types", "peft.peft_model")


def room_of(module: str) -> str:
    """The room of a dotted module name: its part after `peml`, or `__init__` for the package itself."""
    return [*module.split("."), "__init__"][1]


def module_of(path: Path) -> str:
    """The dotted name of a file, with `__init__` left on, because it decides what a leading dot means."""
    return ".".join(path.with_suffix("").parts)


def imported_names(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Every imported name, dotted and absolute, with its line."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children: list[ast.AST] = [*tree.orelse]
    else:
        children = [*ast.iter_child_nodes(tree)]
    if isinstance(tree, ast.Import):
        for alias in tree.names:
            yield tree.lineno, alias.name
    elif isinstance(tree, ast.ImportFrom):
        package = module.split(".")[: -tree.level] if tree.level else []
        origin = ".".join([*package, *([tree.module] if tree.module else [])])
        for alias in tree.names:
            yield tree.lineno, f"{origin}.{alias.name}"
    elif isinstance(tree, ast.Attribute) and ast.unparse(tree).startswith("peft."):
        yield tree.lineno, ast.unparse(tree)  # `import peft`, then `peft.mapping.x`
    for child in children:
        yield from imported_names(child, module)


def is_peft_internal(name: str) -> bool:
    """Whether a dotted name lies in the parts of PEFT that may change without notice."""
    parts = name.split(".")
    private = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return parts[0] == "peft" and (private or any(f"{name}.".startswith(f"{i}.") for i in PEFT_INTERNALS))


def violations(source: str, module: str) -> list[str]:
    """One sentence per import of `source`, the text of `module`, that breaks a rule."""
    room = room_of(module)
    if room not in ROOMS:
        return [f"{module}: `{room}` is a new room; place it in ROOMS of tests/test_imports.py"]
    found = []
    for line, name in imported_names(ast.parse(source), module):
        where = f"{module}, line {line}: `{name}`"
        library = name.split(".")[0]
        if library == "peml":
            found += [f"{where} {fault}" for fault in faults_within(room, name)]
        elif room in PURE and library in PURE_MUST_NOT_KNOW:
            found.append(f"{where}: {room} must not know {library}")
        if room != "_peft" and is_peft_internal(name):
            found.append(f"{where} is internal to PEFT; only _peft.py may touch it")
    return found


def faults_within(room: str, name: str) -> Iterator[str]:
    """What is wrong with `room` importing `name` of this package."""
    target = room_of(name)
    if target == room:
        return
    if target not in ROOMS:
        if (SOURCE / "peml" / target).exists() or (SOURCE / "peml" / f"{target}.py").exists():
            yield f"is in a new room; place `{target}` in ROOMS of tests/test_imports.py"
            return
        target = "__init__"  # `from peml import x`, where x is no room, is a name of the package itself
    if ROOMS.index(target) > ROOMS.index(room):
        yield f"goes up: {room} is below {target}"
    elif room in PURE and target not in PURE_MAY_KNOW:
        yield f"is not for {room}, which may know only {', '.join(sorted(PURE_MAY_KNOW))}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_flow_one_way(path: Path) -> None:
    found = violations((SOURCE / path).read_text(encoding="utf-8"), module_of(path))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("peml.bank", "from peml.tuner import PemlModel", "goes up: bank is below tuner"),
        ("peml.bank", "def f():\n    import peml.cli", "line 2: `peml.cli` goes up"),
        ("peml.bank", "from peml import tuner", "goes up"),
        ("peml.cli", "from peml import train", "cli is below __init__"),
        ("peml.cli", "import peml", "cli is below __init__"),
        ("peml.tasks.glue", "from ..training import Recipe", "tasks is below training"),
        ("peml.tasks.__init__", "from ..training import Recipe", "tasks is below training"),
        ("peml.bank", "if TYPE_CHECKING:\n    pass\nelse:\n    import peml.cli", "goes up"),
        ("peml.adapters.lora", "from peml.bank import BankLinear", "adapters is below bank"),
        ("peml.prompts.mpt", "from peml.adapters.lora import LoRA", "is not for prompts"),
        ("peml.adapters.lora", "import transformers.models", "adapters must not know transformers"),
        ("peml.prompts.nas", "from peft import LoraConfig", "prompts must not know peft"),
        ("peml.tuner", "from peft.utils.peft_types import PeftType", "only _peft.py may touch it"),
        ("peml.tuner", "from peft import peft_model", "only _peft.py may touch it"),
        ("peml.tuner", "from peft.tuners.tuners_utils import _find", "only _peft.py may touch it"),
        ("peml.tuner", "import peft\npeft.mapping.x = 1", "line 2: `peft.mapping.x` is internal to PEFT"),
        ("peml.attic", "", "`attic` is a new room; place it in ROOMS"),
    ],
)
def test_a_bad_import_is_found(module: str, source: str, fault: str) -> None:
    found = violations(source, module)
    assert fault in "\n".join(found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("peml.tuner", "import peft\nfrom peml.bank import x\nfrom . import routing\npeft.__version__"),
        ("peml.adapters.lora", "from peml.errors import PemlError\nfrom .base import Adapter"),
        ("peml.adapters.__init__", "from .lora import LoRA\nfrom ..routing import Route"),
        ("peml.bank", "if TYPE_CHECKING:\n    from peml.tuner import PemlModel"),
        ("peml._peft", "from peft.mapping import x\nfrom peft.utils.peft_types import PeftType"),
        ("peml.tuner", "from peft import PeftModel\nfrom peft.mapping_func import get_peft_model"),
        ("peml.__init__", "from peml.cli import main\nfrom .tuner import PemlModel"),
    ],
)
def test_a_good_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_the_files_are_found() -> None:
    assert Path("peml/errors.py") in FILES


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=str)
def test_every_folder_of_code_is_a_package(folder: Path) -> None:
    """Otherwise it works from a checkout and is missing from the wheel."""
    assert folder / "__init__.py" in FILES

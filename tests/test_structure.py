"""Who may import whom, with no cycles; what the source must never contain."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "runtime": {"runtime"},
    "lora": {"lora", "runtime"},
    "data": {"data", "runtime"},
    "models": {"models", "lora", "runtime"},
    "jobs": {"jobs", "models", "lora", "data", "runtime"},
    "benchmarks": {"benchmarks", "jobs", "models", "lora", "data", "runtime"},
    "templates": {"jobs", "models", "lora", "runtime"},
    "command": {"jobs", "models", "lora", "data", "runtime"},
}
TEMPLATES_IMPORT = {"jobs.generating.load", "models.bigram_lm_v2_lora", "lora.attach", "lora.merge"}
TEMPLATES_IMPORT |= {"lora.adapter", "lora.peft_format", "runtime.errors", "runtime.storage.tensors"}
FILES = list(ROOT.glob("*.py"))
FILES += [path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py")]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in FILES}


def room(name: str) -> str:
    first = name.split(".")[0]
    return first if first in MAY_IMPORT else "command"


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, for its annotations too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & MODULES


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_follow_the_map(path):
    mine = room(module(path))
    strangers = {name for name in imports(path) if room(name) not in MAY_IMPORT[mine]}
    assert not strangers, f"{module(path)} ({mine}) may not import {', '.join(sorted(strangers))}"


@pytest.mark.parametrize("path", sorted((ROOT / "templates").glob("*.py")), ids=module)
def test_a_template_shows_what_it_does_itself(path):
    """Of ours it imports the model, how it is loaded, adapters and their files, and what makes errors one line."""
    named = {name for name in imports(path) if not any(other.startswith(f"{name}.") for other in MODULES)}
    assert named <= TEMPLATES_IMPORT


def test_there_are_no_cycles():
    graph = {module(path): imports(path) - {module(path)} for path in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(FILES)


UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "pickletools",
    "shelve",
    "marshal",
    "dill",
    "cloudpickle",
    "joblib",
    "yaml",
}


def unpickling(tree: ast.AST) -> list[str]:
    """Whatever in a source could read a pickle, or run text as code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            plain = any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)
            loads = called in ("torch.load", "torch.hub.load", "torch.jit.load", "exec", "eval", "__import__")
            names = [called] if loads or called in ("np.load", "numpy.load") and not plain else []
            found += names
            continue
        else:
            continue
        found += [name for name in names if name.split(".")[0] in UNPICKLERS or name in ("torch.load", "numpy.load")]
    return found


@pytest.mark.parametrize("path", FILES, ids=module)
def test_nothing_is_unpickled(path):
    assert not unpickling(ast.parse(path.read_text("utf-8")))


@pytest.mark.parametrize(
    "source",
    ["import pickle", "import pickle as p", "from pickle import loads", "from torch import load", "torch.load(f)",
     "torch.load(f, weights_only=True)", "np.load(f)", "np.load(f, allow_pickle=True)", "import joblib", "eval(text)"],
)  # fmt: skip
def test_what_could_unpickle_is_found(source):
    assert unpickling(ast.parse(source))
    assert not unpickling(ast.parse("np.load(f, allow_pickle=False); model.eval(); from safetensors.torch import load"))


VARIANT_NAMES = {"rslora", "dora", "vera", "adalora"}
VARIANT_CLASSES = {"RsLoRA", "DoRA", "VeRA", "AdaLoRA"}
MAY_NAME_VARIANTS = {"lora.variants.registry"}


def asks_for_a_variant(tree: ast.AST) -> list[str]:
    """Where a source asks which variant it has: a comparison with one's name, or its class itself. `lora` is a kind of
    run too, and counts where it is compared with something that is called a variant."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            constants = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)}
            plain = {value for value in constants if isinstance(value, str)}
            called = "variant" in ast.unparse(node)
            found += [ast.unparse(node)] if plain & VARIANT_NAMES or ("lora" in plain and called) else []
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name in VARIANT_CLASSES]
    return found


@pytest.mark.parametrize("path", [path for path in FILES if module(path) not in MAY_NAME_VARIANTS], ids=module)
def test_nothing_asks_which_variant_an_adapter_is(path):
    assert not asks_for_a_variant(ast.parse(path.read_text("utf-8")))


@pytest.mark.parametrize(
    "source",
    ["x.variant == 'dora'", "x in ('rslora', 'lora')", "variant != 'lora'", "match v:\n    case 'vera': pass",
     "from lora.variants.vera import VeRA", "y = 1 if kind == 'adalora' else 2"],
)  # fmt: skip
def test_a_question_for_the_variant_is_found(source):
    assert asks_for_a_variant(ast.parse(source))
    assert not asks_for_a_variant(ast.parse("run.kind == 'lora'; choices = ('lora', 'dora'); VARIANTS[config.variant]"))


def test_the_names_of_the_variants_are_the_ones_that_there_are():
    from lora.variants.registry import VARIANTS

    assert VARIANTS.keys() == VARIANT_NAMES | {"lora"}
    assert {variant.__name__ for variant in VARIANTS.values()} == VARIANT_CLASSES | {"LoRA"}

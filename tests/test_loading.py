"""No file that is read can run code: nothing in the package unpickles or evaluates a text."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxinv"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Modules whose readers run code that is in the file.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "yaml", "_pickle"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
# Of numpy, torch, pandas: these unpickle, or may.
UNSAFE_METHODS = {"load", "loads", "read_pickle"}
SAFE_OWNERS = {
    "json",
    "datasets",
    "inspection",
    "_checkpoint",
}  # json.loads; this package's own load


def _unsafe(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Name) and node.id in UNSAFE_BUILTINS:
            found.append(node.id)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append("allow_pickle")
        if isinstance(node, ast.Constant) and node.value in UNSAFE_MODULES:
            found.append(node.value)  # importlib.import_module("pickle")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {k.arg for k in node.keywords}
            owner = ast.unparse(node.func.value)
            if (
                node.func.attr in UNSAFE_METHODS
                and owner not in SAFE_OWNERS
                and "allow_pickle" not in keywords  # its value is looked at above
            ):
                found.append(f"{owner}.{node.func.attr}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unpickles_or_evaluates(path):
    assert _unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import yaml",
        "def f(): import dill.source",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path)",
        "pd.read_pickle(path)",
        "eval(text)",
        "f = exec",
        "importlib.import_module('pickle')",
    ],
)
def test_the_check_sees_every_form(source):
    assert _unsafe(source)


@pytest.mark.parametrize(
    "source", ["json.loads(text)", "np.load(path, allow_pickle=False)", "datasets.load(path)"]
)
def test_the_check_lets_safe_readers_pass(source):
    assert not _unsafe(source)

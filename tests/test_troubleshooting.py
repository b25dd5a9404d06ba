"""Every message that jaxinv raises is explained in docs/troubleshooting.md, and nothing else is.

The page quotes messages as terms of definition lists, `…` for what differs from case to case:

    `params has no leaves`
    :   What it means and what to do.

Messages are read off the source, so that a new error without an explanation is found without
raising it.
"""

import argparse
import ast
import builtins
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
HOLE = "…"

# What says nothing to the user: raised and caught within the package.
INTERNAL = {
    ("__init__.py", "has no attribute"),  # what Python says of any module
    ("experiments/__init__.py", "has no attribute"),
    ("bayes/checkpoint.py", "its arrays are"),  # becomes InvalidInput: damaged (...)
    ("cli.py", "_Terminated"),  # ends the process, as Ctrl-C does
    ("experiments/files.py", "is no number of JSON"),  # becomes DamagedFile
    # becomes part of "it combines different examples of the batch"
    ("_interpreter/batch_rules.py", ""),
    ("_interpreter/batch_domain.py", ""),  # as well
    ("_interpreter/mistakes.py", "…"),  # puts a remedy after the message
    ("_interpreter/rounding.py", ""),  # then rounding is measured
    ("ranks/exact_values.py", "…"),  # hands on what the rules say
    ("_interpreter/batch.py", "its constant changes with"),
    ("_interpreter/batch.py", "an output "),
    ("rescaling/shifts.py", "_Unknown"),  # nothing is said to cancel then
    ("bayes/rlct.py", "no set of layers fits"),  # the theorem says that there is one
}


class Site(NamedTuple):
    """A place that makes a message."""

    where: str  # jaxinv/paths/norms.py:12
    text: str  # the message, HOLE for each value
    internal: bool = False


def _is_error(name: str, own: set[str]) -> bool:
    builtin = getattr(builtins, name, None)
    if isinstance(builtin, type) and issubclass(builtin, BaseException):
        return True
    return name in own or name == argparse.ArgumentTypeError.__name__


def _last(node: ast.AST) -> str:
    """The last name of `a.b.c`, which is enough: names are defined once."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _raised(node: ast.Raise) -> list[ast.expr]:
    """What a `raise` may raise; nothing where it raises again what was caught."""
    if node.exc is None:
        return []
    return [node.exc.body, node.exc.orelse] if isinstance(node.exc, ast.IfExp) else [node.exc]


class Source:
    """The modules of a package and the messages they make."""

    def __init__(self, modules: dict[str, str]) -> None:
        self.trees = {name: ast.parse(text) for name, text in modules.items()}
        nodes = [node for tree in self.trees.values() for node in ast.walk(tree)]
        self.constants: dict[tuple[str, str], ast.expr] = {}
        for name, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self.constants[name, node.targets[0].id] = node.value
        self.errors: set[str] = set()
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        for _ in classes:  # a base may come after what derives from it
            self.errors |= {
                c.name for c in classes if any(_is_error(_last(b), self.errors) for b in c.bases)
            }
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        # A helper that makes an error for others to raise.
        self.makers = {f.name for f in functions if any(self._makes(call) for call in ast.walk(f))}

    def _makes(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        return _last(node.func) == "refuse" or _is_error(_last(node.func), self.errors)

    def _imported(self, module: str, name: str) -> ast.expr | None:
        if (module, name) in self.constants:
            return self.constants[module, name]
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.ImportFrom) and any(a.name == name for a in node.names):
                path = (node.module or "").removeprefix("jaxinv.").replace(".", "/") + ".py"
                return self.constants.get((path, name))
        return None

    def text(self, module: str, node: ast.expr) -> str:
        """A message as written, HOLE for what is known only when it is raised."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(module, part) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return self.text(module, node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.text(module, node.left) + self.text(module, node.right)
        if isinstance(node, ast.Name):
            constant = self._imported(module, node.id)
            if constant is not None and not isinstance(constant, ast.Name):
                return self.text(module, constant)
        return HOLE

    @functools.cached_property
    def sites(self) -> list[Site]:
        return list(self._sites())

    def _sites(self) -> Iterator[Site]:
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                for line, found in self._messages(node):
                    if isinstance(found, ast.Name) and self.text(module, found) == HOLE:
                        if found.id == "remedy":
                            continue  # handed on
                    text = re.sub(rf"{HOLE}+", HOLE, " ".join(self.text(module, found).split()))
                    internal = any(m == module and part in text for m, part in INTERNAL)
                    yield Site(f"jaxinv/{module}:{line}", text, internal)

    def _messages(self, node: ast.AST) -> Iterator[tuple[int, ast.expr]]:
        """The expressions of the messages that a node makes."""
        if isinstance(node, ast.Call):
            name = _last(node.func)
            if name == "refuse":
                yield node.lineno, node.args[1]  # refuse(theory, why, remedy)
            elif _is_error(name, self.errors) or (name == "warn" and node.args):
                yield node.lineno, node.args[0] if node.args else ast.Constant("")
            elif name == "print" and any(k.arg == "file" for k in node.keywords):
                yield node.lineno, node.args[0]
            yield from ((node.lineno, k.value) for k in node.keywords if k.arg == "remedy")
        if isinstance(node, ast.Raise):
            # What a raise adds to the message of a helper.
            for call in _raised(node):
                if isinstance(call, ast.Call) and _last(call.func) in self.makers - {"refuse"}:
                    for argument in call.args:
                        if isinstance(argument, ast.Constant | ast.JoinedStr):
                            yield node.lineno, argument

    def not_understood(self) -> list[str]:
        """Every `raise` whose message the above does not see."""
        bad = []
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                for exc in _raised(node) if isinstance(node, ast.Raise) else ():
                    seen = self._makes(exc) or (
                        isinstance(exc, ast.Call) and _last(exc.func) in self.makers
                    )
                    carried = isinstance(exc, ast.Attribute) and exc.attr == "error"  # Opaque
                    if not seen and not carried and (module, _last(exc)) not in INTERNAL:
                        bad.append(f"jaxinv/{module}:{node.lineno}: raise {ast.unparse(exc)}")
        return bad


@functools.cache
def source() -> Source:
    package = ROOT / "jaxinv"
    files = sorted(package.rglob("*.py"))
    return Source({f.relative_to(package).as_posix(): f.read_text("utf-8") for f in files})


_TERM = re.compile(r"^(`+)\s?(.+?)\s?\1$")


def quotes(page: str) -> dict[str, int]:
    """The messages that a page quotes, each with its line: terms that have a definition."""
    found, waiting = {}, {}
    for number, line in enumerate(page.splitlines(), 1):
        if term := _TERM.match(line):
            waiting[term[2]] = number
        else:
            if re.match(r":   \S", line):
                found |= waiting
            waiting = {}
    return found


def explains(quote: str, text: str) -> bool:
    """Whether a quoted message is this one: all of it, or its beginning in three words or more."""
    quote, text = (s.removeprefix(HOLE).strip().removesuffix(HOLE).strip() for s in (quote, text))
    if quote == text:
        return True
    enough = len(re.findall(r"\w+", quote)) >= 3
    return enough and re.match(re.escape(quote) + r"(?!\w)", text) is not None


def unexplained(found: Source, page: str) -> list[str]:
    quoted = quotes(page)
    return [
        f"{site.where}: {site.text}"
        for site in found.sites
        if not site.internal and not any(explains(quote, site.text) for quote in quoted)
    ]


def outdated(found: Source, page: str) -> list[str]:
    texts = {site.text for site in found.sites}
    return [
        f"docs/{PAGE.name}:{line}: {quote}"
        for quote, line in quotes(page).items()
        if not any(explains(quote, text) for text in texts)
    ]


def test_every_message_is_explained() -> None:
    missing = unexplained(source(), PAGE.read_text("utf-8"))
    assert not missing, "explain in docs/troubleshooting.md:\n" + "\n".join(missing)


def test_every_explained_message_exists() -> None:
    gone = outdated(source(), PAGE.read_text("utf-8"))
    assert not gone, "no message of jaxinv begins like this:\n" + "\n".join(gone)


def test_every_raise_is_seen() -> None:
    assert not source().not_understood()
    texts = [site.text for site in source().sites]
    assert len(texts) > 150
    # By hand: a constant, an f-string, a shared constant, a refusal and its detail.
    for begin in (
        "params has no leaves, so",
        "… has been deleted: its memory",
        "Path-SGD needs the parameters",
        "an infinite constant is not an edge weight.",
        "a function of a sign alone is",
        "this needs …, which is not installed",
    ):
        assert any(text.startswith(begin) for text in texts), begin


def test_internal_errors_are_still_there() -> None:
    hits = {
        (module, part)
        for module, part in INTERNAL
        for site in source().sites
        if site.where.startswith(f"jaxinv/{module}:") and part in site.text
    }
    named = {(m, p) for m, p in INTERNAL if p in source().errors}
    assert hits | named == INTERNAL


MODULE = """
class Own(ValueError): pass
LATE = "call it with the parameters."
def helper(eqn, detail): return eqn.refuse("theory", f"{detail} and more of this", "do that")
def f(name, eqn):
    if name: raise Own(f"{name} is not what it should be: {eqn}")
    if eqn: raise Own(LATE)
    raise helper(eqn, "which is an added reason; ")
"""


def test_a_new_message_is_named_by_file_and_line() -> None:
    page = """
        `… is not what it should be`
        :   Because.

        `call it with the parameters.`
        `… and more of this`
        `which is an added reason`
        :   Because.
    """
    page = textwrap.dedent(page).rstrip()
    found = Source({"own.py": MODULE})
    assert not unexplained(found, page)
    assert not outdated(found, page)
    assert not found.not_understood()
    for number, begin in ((6, "… is not"), (7, "call it"), (4, "… and more"), (8, "which is")):
        kept = "\n".join(li for li in page.splitlines() if not li.startswith("`" + begin))
        (missing,) = unexplained(found, kept)
        assert missing.startswith(f"jaxinv/own.py:{number}: ")
    assert outdated(found, page + "\n\n`nothing says this`\n:   Because.\n") == [
        f"docs/troubleshooting.md:{len(page.splitlines()) + 2}: nothing says this"
    ]
    # A quote without an explanation, and one of less than three words, explain nothing.
    assert len(unexplained(found, page.replace(":   ", ""))) == 4
    assert unexplained(found, page.replace("which is an added reason", "which is"))
    blind = Source({"own.py": "def f(x):\n    raise x.failure\n"})
    assert blind.not_understood() == ["jaxinv/own.py:2: raise x.failure"]

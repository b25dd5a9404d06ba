"""The commands in shell blocks of the documentation exist: subcommands, options, targets, files."""

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinv import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
# Commands of others, whose arguments are theirs.
OTHERS = {"cd", "curl", "git", "mkdir", "pytest", "ruff", "mypy", "source", "tar"}


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """The commands in the ```sh blocks of a page, with their lines."""
    block, start, continued = False, 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("```"):
            assert not continued, f"line {number}: a block ends within a command"
            block = not block and line.strip().removeprefix("```").split()[:1] in (["sh"], ["bash"])
        elif block:
            start = start if continued else number
            continued += line
            if continued.endswith("\\"):
                continued = continued[:-1] + " "
                continue
            words = shlex.split(continued.removeprefix("$ "), comments=True)
            continued = ""
            for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
                if part:
                    yield start, shlex.split(part)


def mistake(words: list[str]) -> str | None:
    """What is wrong with a command; None if nothing is."""
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words = words[1:]
    command, *arguments = words
    command = Path(command).name
    if command == "jaxinv":
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                cli._parser(arguments).parse_args(arguments)
        except SystemExit as end:
            return said.getvalue().strip().splitlines()[-1] if end.code else None
        return None
    if command == "make":
        targets = {
            t for line in re.findall(r"^([\w -]+):(?!=)", MAKEFILE, re.M) for t in line.split()
        }
        variables = set(re.findall(r"^(\w+) *[?:]?=", MAKEFILE, re.M))
        for word in arguments:
            name, given = re.match(r"([\w-]+)(=?)", word).groups()  # type: ignore[union-attr]
            if name not in (variables if given else targets):
                return f"the Makefile has no {'variable' if given else 'target'} {name}"
        return None
    if re.fullmatch(r"python[\d.]*", command):
        if arguments[:2] == ["-m", "pip"]:
            return mistake(arguments[1:])
        files = [word for word in arguments[:1] if word.endswith(".py")]
        return next((f"there is no {f}" for f in files if not (ROOT / f).exists()), None)
    if command == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        known = extras["optional-dependencies"]
        asked = re.findall(r"(?:^\.|jaxinv)\[(.+?)\]", "\n".join(arguments), re.M)
        names = [name.strip() for group in asked for name in group.split(",")]
        return next((f"there is no extra {name}" for name in names if name not in known), None)
    return None if command in OTHERS else f"unknown command {command}"


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_commands_exist(page: Path) -> None:
    found = [
        f"{page.relative_to(ROOT)}:{line}: {shlex.join(words)}: {wrong}"
        for line, words in commands(page.read_text("utf-8"))
        if (wrong := mistake(words))
    ]
    assert not found, "\n".join(found)


def test_there_are_commands() -> None:
    found = [words for page in PAGES for _, words in commands(page.read_text("utf-8"))]
    assert sum(words[0] == "jaxinv" for words in found) >= 8


def test_blocks_are_read_as_a_shell_reads_them() -> None:
    text = """
```sh
$ pip install '.[cli]'   # a remark
A=1 make test \\
  WORKERS=3
cd here && make docs
```
```python
jaxinv nothing
```
"""
    assert list(commands(text)) == [
        (3, ["pip", "install", ".[cli]"]),
        (4, ["A=1", "make", "test", "WORKERS=3"]),
        (6, ["cd", "here"]),
        (6, ["make", "docs"]),
    ]


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("jaxinv reproduce nothing", "invalid choice"),
        ("jaxinv reproduce path-sgd --no-such-option", "unrecognized arguments"),
        ("jaxinv inspect", "required"),
        ("make nothing", "no target nothing"),
        ("make test NOTHING=1", "no variable NOTHING"),
        ("python benchmarks/nothing.py", "no benchmarks/nothing.py"),
        ("python -m pip install '.[nothing]'", "no extra nothing"),
        ("pip install 'jaxinv[cli,nothing]'", "no extra nothing"),
        ("nothing", "unknown command"),
    ],
)
def test_mistakes_are_found(command: str, part: str) -> None:
    assert part in (mistake(shlex.split(command)) or "")


@pytest.mark.parametrize(
    "command",
    ["jaxinv --version", "make test WORKERS=2", ".venv/bin/python benchmarks/ranks.py", "make"],
)
def test_right_commands_pass(command: str) -> None:
    assert mistake(shlex.split(command)) is None

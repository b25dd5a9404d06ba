"""What the site needs beyond mkdocs: executed notebooks, MathML, tables from results, checks."""

import hashlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from html import unescape as html_unescape
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import griffe
import jupytext
import latex2mathml.converter
import nbclient
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

import jaxinv

ROOT = Path(__file__).parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "build" / "notebooks"
# What the outputs of a notebook and their markdown depend on.
SHOWN_BY = "jax jaxlib flax optax numpy matplotlib scikit-learn nbconvert".split()

# --- the interface --------------------------------------------------------------------


def public_names() -> dict[str, str]:
    """What the tests record: every public name, and the full name where it is defined."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return import_module("tests.api").public_names()


def reference() -> set[str]:
    """The full names of all that users may rely on, where they are defined."""
    return set(public_names().values())


def short_names() -> dict[str, str]:
    """What a name in backticks refers to, for names that belong to one thing only."""
    found: dict[str, str] = {}
    for public, full in public_names().items():
        name = full.rpartition(".")[2]
        for short in {
            public,
            public.removeprefix("jaxinv."),
            full,
            full.removeprefix("jaxinv."),
            name,
        }:
            found[short] = full if found.get(short, full) == full else ""
    found |= {f"jaxinv.{name}": public_names()[f"jaxinv.{name}"] for name in jaxinv.__all__}
    found |= {name: found[f"jaxinv.{name}"] for name in jaxinv.__all__}
    return {short: full for short, full in found.items() if full}


def on_post_build(config: Any) -> None:
    """Fail unless every public name has a docstring and a place on a page of the reference."""
    pages = "".join(p.read_text() for p in Path(config["site_dir"], "reference").rglob("*.html"))
    for full in sorted(reference()):
        module, _, name = full.rpartition(".")
        alias = (
            module == "jaxinv.typing"
        )  # holds no docstring; the page shows what is written below
        if not alias and not getattr(import_module(module), name).__doc__:
            raise PluginError(f"{full} has no docstring")
        if f'id="{full}"' not in pages:
            raise PluginError(f"{full} is public, but on no page under docs/reference")


# --- docstrings -----------------------------------------------------------------------


class Docstrings(griffe.Extension):
    """Docstrings as markdown: names become links, formulas lose no characters."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring of the package."""
        links, public = short_names(), reference()
        shown = {full.rpartition(".")[0] for full in public}
        for thing in _walk(pkg):
            if thing.docstring is not None:
                fields = _fields(thing) if thing.is_class else ""
                thing.docstring.value += f"\n\nAttributes:\n{fields}" if fields else ""
                thing.docstring.value = as_markdown(thing.docstring.value, links, thing.path)
            if thing.is_module and thing.path in shown:  # its functions may be shared within jaxinv
                for name, member in list(thing.members.items()):
                    full = f"{thing.path}.{name}"
                    if full not in public and (member.is_alias or not member.is_attribute):
                        thing.members.pop(name)


def _fields(named_tuple: Any) -> str:
    """The fields of a NamedTuple, with the comments behind them."""
    lines = []
    for field in named_tuple.attributes.values():
        if "instance-attribute" in field.labels:
            comment = "\n".join(field.lines).partition("  # ")[2].partition("\n")[0]
            lines.append(f"    {field.name}: {comment or field.annotation}\n")
    return "".join(lines)


def _walk(thing: Any) -> Iterator[Any]:
    if thing.is_alias:
        return
    yield thing
    for member in list(thing.members.values()):
        yield from _walk(member)


SECTION = re.compile(
    r"^(Args|Attributes|Returns|Raises|Notes?|References?|Example):\n((?: {4}.*\n|\n)+)",
    re.MULTILINE,
)


def as_markdown(docstring: str, links: dict[str, str], here: str = "") -> str:
    """A docstring whose prose is markdown and whose examples and formulas are untouched."""
    parts, end = [], 0
    for found in SECTION.finditer(docstring + "\n"):
        title, body = found.groups()
        parts.append(prose(docstring[end : found.start()], links, here=here))
        if title == "Example":
            parts.append(f"Examples:\n{body}")
        elif title.startswith(("Returns", "Note", "Reference")):  # prose, not lists of names
            body = prose(textwrap.dedent(body), links, here=here)
            parts.append(f"**{title}**\n\n{body}")
        else:
            parts.append(f"{title}:\n{prose(body, links, base=4, here=here)}")
        end = found.end()
    return "".join(parts) + prose(docstring[end:], links, here=here)


def prose(text: str, links: dict[str, str], *, base: int = 0, here: str = "") -> str:
    """Text in which * and _ of formulas stay, and names of the interface are links."""
    lines, code, blank = [], False, True
    for line in text.splitlines(keepends=True):
        if line.strip():
            indented = len(line) - len(line.lstrip()) >= base + 4
            code, blank = indented and (code or blank), False
        else:
            blank = True
        # In a list of arguments what stands before the colon are names.
        names, colon, rest = (
            line.partition(": ") if base and line[base : base + 1].strip() else ("", "", line)
        )
        lines.append(line if code else names + colon + _inline(rest, links, here))
    return "".join(lines)


def _inline(line: str, links: dict[str, str], here: str) -> str:
    pieces = re.split(r"(`+[^`]+`+)", line)
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            # A star behind a letter that opens no emphasis is a star: the minimum w*.
            kept = re.split(r"((?<![\w*])\*{1,2}\S(?:[^*]*\S)?\*{1,2}(?![\w*]))", piece)
            kept[::2] = [re.sub(r"(?<=[\w)\]])\*", r"\\*", part) for part in kept[::2]]
            pieces[i] = "".join(kept).replace("_", r"\_").replace("][", r"]\[")
        else:
            full = links.get(piece.strip("`").removesuffix("()"))
            if full and full != here:
                pieces[i] = f"[{piece}][{full}]"
    return "".join(pieces)


# --- pages ----------------------------------------------------------------------------


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Names become links, tables of measured results appear, figures are found."""
    for name, table in TABLES.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", table())
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"{up}../benchmarks/results/", f"{up}results/")
    links, parts = short_names(), re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    parts[::2] = [_linked(part, links) for part in parts[::2]]
    return "".join(parts)


def _linked(markdown: str, links: dict[str, str]) -> str:
    def link(found: re.Match[str]) -> str:
        full = links.get(found[1].removesuffix("()"))
        return f"[{found[0]}][{full}]" if full else found[0]

    return re.sub(r"(?<![\[`])`([\w.]+(?:\(\))?)`(?![\]`])", link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """TeX becomes MathML, which browsers draw without scripts."""

    def mathml(found: re.Match[str]) -> str:
        inline, block = found[2], found[3]
        tex = html_unescape(inline or block).strip()
        return latex2mathml.converter.convert(tex, display="inline" if inline else "block")

    pattern = r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>'
    return re.sub(pattern, mathml, html, flags=re.DOTALL)


def invariance_table() -> str:
    """Which optimizer is invariant, from the measured errors."""
    measured = json.loads((RESULTS / "invariance-mnist" / "results.json").read_text())
    rows = ["| optimizer | rescaling | general reparametrisation |", "|---|---|---|"]
    for name, found in measured["studies"].items():
        verdicts = measured["verdicts"][name]
        fields = {"rescaling": "trajectory", "general": "first_function"}
        cells = [_cell(found[kind][field], verdicts[kind]) for kind, field in fields.items()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(error: float, verdict: str) -> str:
    mark = {"invariant to rounding": "**yes**", "not invariant": "no"}.get(verdict, verdict)
    return f"{mark}, {error:.1e}"


def real_models_table() -> str:
    """What becomes of every direction of the parameters of real models."""
    written = (RESULTS / "real-models" / "table.md").read_text(encoding="utf-8")
    return "\n".join(line for line in written.splitlines() if line.startswith("|"))


TABLES = {"invariance": invariance_table, "real-models": real_models_table}


# --- notebooks and figures ------------------------------------------------------------


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the executed notebooks and the figures of the results."""
    for path in sorted((ROOT / "notebooks").glob("*.py")):
        for name, content in _executed(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for path in sorted(RESULTS.rglob("*.png")):
        name = f"results/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def _executed(path: Path) -> dict[str, str | bytes]:
    """A notebook with its outputs as markdown, and its figures; kept until something changes."""
    code = b"".join(p.read_bytes() for p in sorted((ROOT / "jaxinv").rglob("*.py")))
    versions = [f"{name} {metadata.version(name)}" for name in SHOWN_BY]
    state = code + Path(__file__).read_bytes() + path.read_bytes() + " ".join(versions).encode()
    kept = CACHE / f"{path.stem}-{hashlib.sha256(state).hexdigest()[:16]}"
    if not kept.is_dir():
        notebook = jupytext.read(path)
        folder = {"metadata": {"path": str(ROOT)}}
        client = nbclient.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources=folder
        )
        client.create_kernel_manager().transport = "ipc"  # no ports, and no warning about them
        # In full, whatever the shell asks of the tests, and with figures in the page.
        kept_out = ("JAXINV_SHORT", "MPLBACKEND")
        client.execute(env={k: v for k, v in os.environ.items() if k not in kept_out})
        exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
        body, extra = exporter.from_notebook_node(notebook)
        figures = extra["outputs"]
        body = _with_alternatives(path.name, body, notebook, figures)
        written = {f"{path.stem}.md": body.encode()}
        written |= {f"{path.stem}-{name}": figure for name, figure in figures.items()}
        kept.mkdir(parents=True)
        for name, content in written.items():
            (kept / name).write_bytes(content)
    return {p.name: p.read_text() if p.suffix == ".md" else p.read_bytes() for p in kept.iterdir()}


def _with_alternatives(name: str, body: str, notebook: Any, figures: dict[str, bytes]) -> str:
    """Each figure once, with the text that its cell has for it: `# %% alt="..."`."""
    wanted = {
        i: cell.metadata["alt"] for i, cell in enumerate(notebook.cells) if "alt" in cell.metadata
    }
    for figure in figures:  # output_CELL_OUTPUT.png
        alt = wanted.pop(int(figure.split("_")[1]), None)
        if alt is None:
            raise PluginError(f'{name}: {figure} is from a cell without alt="..." for one figure')
        stem = name.removesuffix(".py")
        body, found = re.subn(rf"!\[[^]]*\]\({figure}\)", f"![{alt}]({stem}-{figure})", body)
        if found != 1:
            raise PluginError(f"{name}: {figure} is {found} times on the page")
    if wanted:
        raise PluginError(f"{name}: no figure for {list(wanted.values())}")
    return body

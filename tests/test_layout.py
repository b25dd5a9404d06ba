"""The package keeps its shape: imports point one way, modules stay short, imports stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxinv"

# A module imports only from levels below its own. A new package, or a new file beside the
# packages, joins a level.
LEVELS = [
    ("command line", {"cli"}),
    ("pages", {"pages"}),
    ("experiments", {"experiments"}),
    ("inspection", {"inspection"}),
    (
        "uses",
        {"bayes", "capacity", "invariance", "optimizers", "reparam", "symmetries"},
    ),
    ("ranks", {"ranks"}),
    ("programs", {"frames", "gates"}),
    ("theory", {"jacobians", "paths", "rescaling"}),
    ("interpreter", {"_interpreter"}),
    ("numerics", {"_numerics"}),
    ("networks", {"adapters", "networks"}),
    ("arguments", {"_checks", "_extras", "_files", "_text"}),
    ("errors", {"errors", "typing"}),
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
FACES = [path for path in MODULES if path.name == "__init__.py" and "experiments" not in path.parts]


def _level(top_level_name: str) -> int:
    found = [i for i, (_, members) in enumerate(LEVELS) if top_level_name in members]
    assert found, f"jaxinv/{top_level_name} is on no level of LEVELS; add it to one"
    return found[0]


def _imported(path: Path) -> set[str]:
    """Names of jaxinv's own top-level modules that the file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module != "jaxinv":
                modules = [str(node.module)]
        else:
            continue
        names |= {module.split(".")[1] for module in modules if module.startswith("jaxinv.")}
    return names


# What a package's face does not hand on is its own, except these names, which other packages of the
# library may import.
DOORS = {
    "frames": {
        "frames_of",  # the classes of matrices that a program allows, for symmetry groups and ranks
        "Place",  # where one of them acts
        "PermutationDomain",  # the same program in permutations
        "matrices",  # what an element of a class does to parameters
        "MatrixStructure",  # the classes of a group
        "named",  # a class in words
        "labels",  # the places of a permutation in words
        "exact_classes",  # those whose tangents are counted without rounding, for bounds on ranks
        "off_diagonal_tangents",  # these tangents
    },
    "jacobians": {
        "problem_of",  # a network checked and traced once; ranks and priors pass it on
        "fold_rows",  # the rows of J, never all held: a rank folds its QR over them
        "scaled_gram",  # JᵀJ with columns scaled before they meet, which keeps a rank exact
    },
    "paths": {
        "normalized_outputs",  # the forward pass that reparam wraps
        "power_of_norm",  # γ^p to be differentiated twice, for its metric
        "scaled_data_kappa",  # κ that cannot overflow, for the steps of optimizers
        "scaled_kappa",  # ditto
    },
    "rescaling": {
        "checked_leaves",  # whatever takes a group checks that params belong to it
        "span_dimension",  # independent tangents, for bounds on ranks
        "units_of",  # which weights lead into a unit: gauges, priors and reparam agree on it
        "layers_of",  # the layer of a generator, for generators that a page has combined
        "least_norm",  # the minimum of an orbit without the moved weights, which compile slowly
    },
}


def _inner_names(path: Path) -> set[tuple[str, str]]:
    """(package, name) of what the file imports from inside packages that are not its own."""
    own, found = path.relative_to(PACKAGE).parts[0].removesuffix(".py"), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        module = str(node.module).split(".") if isinstance(node, ast.ImportFrom) else [""]
        if module[0] != "jaxinv" or len(module) < 2 or module[1].startswith("_"):
            continue
        face = PACKAGE / module[1] / "__init__.py"
        if module[1] != own and face in FACES:
            found |= {(module[1], alias.name) for alias in node.names} - _handed_on(face)
    return found


def _handed_on(face: Path) -> set[tuple[str, str]]:
    """The names on a face and, for `from jaxinv.package import module`, its modules."""
    body = ast.parse(face.read_text(encoding="utf-8")).body
    names = {a.name for s in body if isinstance(s, ast.ImportFrom) for a in s.names}
    # A module with a face of its own: its `__all__` is in the documentation.
    names |= {"rlct"} if face.parent.name == "bayes" else set()
    return {(face.parent.name, name) for name in names}


def test_packages_use_of_each_other_what_faces_and_doors_hand_on():
    used = set().union(*(_inner_names(path) for path in MODULES))
    assert used == {(package, name) for package, names in DOORS.items() for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in _imported(path) - {own}:
        assert _level(other) > _level(own), f"jaxinv/{own} must not import jaxinv/{other}"


def _modules_imported(path: Path) -> set[Path]:
    """Files of jaxinv that the file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxinv."):
            module = PACKAGE.parent.joinpath(*str(node.module).split("."))
            inner = [module / f"{alias.name}.py" for alias in node.names]
            found |= {p for p in [module.with_suffix(".py"), *inner] if p.exists()}
    return found


def test_no_module_is_on_a_circle_of_imports():
    above = {path: _modules_imported(path) for path in MODULES}
    while above:
        done = {path for path, below in above.items() if not below & above.keys()}
        assert done, f"circles among {sorted(str(p.relative_to(PACKAGE)) for p in above)}"
        above = {path: below for path, below in above.items() if path not in done}


@pytest.mark.parametrize("path", FACES, ids=lambda path: str(path.parent.relative_to(PACKAGE)))
def test_a_face_only_hands_on_names(path):
    docstring, *statements = ast.parse(path.read_text(encoding="utf-8")).body
    names = {a.name for s in statements if isinstance(s, ast.ImportFrom) for a in s.names}
    assert isinstance(docstring, ast.Expr)
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            assert (PACKAGE.parent / str(statement.module).replace(".", "/")).parent == path.parent
        else:
            assert ast.unparse(statement).startswith("__all__ = ")
            assert set(ast.literal_eval(statement.value)) == names
    # A module called like a function of its face could be reached by one of two spellings only.
    assert not names & {other.stem for other in path.parent.glob("*.py")}


def test_the_import_check_sees_every_form_of_import(tmp_path):
    source = (
        "import jaxinv.cli\nfrom jaxinv import paths\ndef f():\n    from jaxinv.errors import X\n"
    )
    (tmp_path / "module.py").write_text(source)
    assert _imported(tmp_path / "module.py") == {"cli", "paths", "errors"}


def test_only_the_interpreter_knows_the_form_of_programs():
    """What changes between versions of jax is in one place."""
    knowing = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(f"{name}.".startswith("jax.extend.") for name in names):
                knowing.add(path.parent.relative_to(PACKAGE).as_posix())
    assert knowing == {"_interpreter"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_have_at_most_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_importing_jaxinv_imports_no_extra():
    extras = ["matplotlib", "sklearn", "rich", "orbax", "haiku", "equinox", "blackjax", "arviz"]
    code = f"import sys, jaxinv; print([name for name in {extras} if name in sys.modules])"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert process.stdout.strip() == "[]"


# Resolves every dotted name right after `import jaxinv`, each as if no other had been asked for.
RESOLVE = """
import importlib, sys
import jaxinv
at_once = set(vars(jaxinv))
for name in sys.argv[1:]:
    first, *rest = name.split(".")[1:]
    value = vars(jaxinv)[first] if first in at_once else jaxinv.__getattr__(first)
    for part in rest:
        value = getattr(value, part)
assert dir(jaxinv) == sorted(dir(jaxinv)) and "bayes" in dir(jaxinv)
try:
    jaxinv.no_such_name
except AttributeError as error:
    assert str(error) == "module 'jaxinv' has no attribute 'no_such_name'"
else:
    raise AssertionError("found no_such_name")
print("all", len(sys.argv) - 1)
"""


def test_import_jaxinv_is_enough_for_every_name_in_the_documentation():
    root = PACKAGE.parent
    if not (root / "docs").is_dir():
        pytest.skip("the documentation is not in this tree")
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    texts += [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    # `jaxinv.bayes.jeffreys_log_prior` in prose; not in imports, which need no attribute.
    dotted = re.compile(r"(?<![\w/.'-])jaxinv(?:\.[A-Za-z]\w*)+(?!\w|\.(?:py|md|html))")
    names = {name for text in texts for name in dotted.findall(text)}
    names |= {f"jaxinv.{p.stem}" for p in PACKAGE.iterdir() if p.suffix in (".py", "")}
    names = {n for n in names if "._" not in n and "__" not in n}
    assert {"jaxinv.bayes.jeffreys_log_prior", "jaxinv.bayes.rlct"} <= names
    run = subprocess.run(
        [sys.executable, "-c", RESOLVE, *sorted(names)], capture_output=True, text=True, timeout=100
    )
    assert run.stdout.strip() == f"all {len(names)}", run.stderr


def test_the_readme_leads_to_every_page_of_the_documentation():
    root = PACKAGE.parent
    if not (root / "docs").is_dir():
        pytest.skip("the documentation is not in this tree")
    readme = (root / "README.md").read_text(encoding="utf-8")
    pages = {page.relative_to(root).as_posix() for page in (root / "docs").rglob("*.md")}
    # The first page of the site is the README's counterpart; the reference has a list of its own.
    pages = {p for p in pages if p != "docs/index.md" and not p.startswith("docs/reference/")}
    assert [p for p in sorted(pages) if f"]({p}" not in readme] == []
    assert "](docs/reference/index.md)" in readme


def test_links_between_pages_lead_to_headings_that_exist():
    """`make docs` refuses a dead link too, but takes minutes."""
    root = PACKAGE.parent
    if not (root / "docs").is_dir():
        pytest.skip("the documentation is not in this tree")

    def anchors(page):
        headings = re.findall(r"^#+ (.+?)\s*$", page.read_text(encoding="utf-8"), re.MULTILINE)
        # The slugs of Python-Markdown, and of GitHub where a heading has plain words alone.
        plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
        return {re.sub(r"[-\s]+", "-", heading) for heading in plain}

    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    links = [
        (page, target, anchor)
        for page in pages
        for target, anchor in re.findall(
            r"\]\((?!https?:)([^)#\s]*\.md)?(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")
        )
        if not target.startswith("notebooks/")  # made from the notebooks as the site is built
    ]
    dead = []
    for page, target, anchor in links:
        at = (page.parent / target).resolve() if target else page
        if not at.is_file() or (anchor and anchor not in anchors(at)):
            dead.append(f"{page.relative_to(root)}: {target}#{anchor}")
    assert dead == [] and sum(bool(anchor) for *_, anchor in links) > 10

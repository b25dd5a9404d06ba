"""Check what `python -m build` made: `python -m tests.archives DIRECTORY`."""

import sys
import tarfile
import zipfile
from pathlib import Path

MOST_BYTES = 2_000_000


def check(directory: Path) -> None:
    """Raise AssertionError unless there is a wheel and an sdist with what belongs in them."""
    (wheel,), (sdist,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
    inside = zipfile.ZipFile(wheel).namelist()
    modules = {p.relative_to("jaxinv").as_posix() for p in Path("jaxinv").rglob("*.py")}
    missing = {f"jaxinv/{m}" for m in {*modules, "py.typed"}} - set(inside)
    assert not missing, f"the wheel lacks {sorted(missing)}"
    others = [n for n in inside if not n.startswith(("jaxinv/", "jaxinv-"))]
    assert not others, f"the wheel holds {others}"
    names = tarfile.open(sdist).getnames()
    for name in ("pyproject.toml", "README.md", "LICENSE", "jaxinv/py.typed", "tests/test_api.py"):
        assert any(n.endswith("/" + name) for n in names), f"the sdist lacks {name}"
    for path in (wheel, sdist):
        assert path.stat().st_size < MOST_BYTES, f"{path} has {path.stat().st_size} bytes"
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    check(Path(sys.argv[1]))

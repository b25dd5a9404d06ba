"""The notebooks run from top to bottom, in their short form: fewer steps, the same code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
CASES = [pytest.param(path, id=path.stem) for path in NOTEBOOKS]
# Flags that make compilation fast, and what other tests have compiled.
PASSED_ON = ("XLA_FLAGS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "JAX_PLATFORMS", "HOME")


def test_there_are_notebooks_and_the_site_has_them_all():
    assert NOTEBOOKS
    pages = re.findall(r"notebooks/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(pages) == [path.stem for path in NOTEBOOKS]


@pytest.mark.slow  # `make docs` executes them too, whole
@pytest.mark.parametrize("notebook", CASES)
def test_notebook_runs(notebook, tmp_path):
    for library in re.findall(r"^(?:from|import) (sklearn|matplotlib)", notebook.read_text(), re.M):
        pytest.importorskip(library)
    passed_on = {k: v for k, v in os.environ.items() if k in PASSED_ON or "CACHE" in k}
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(notebook)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**passed_on, "PYTHONPATH": str(ROOT), "JAXINV_SHORT": "1", "MPLBACKEND": "Agg",
             "MPLCONFIGDIR": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr

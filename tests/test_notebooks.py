"""The notebooks run from top to bottom."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    pytest.importorskip("sklearn")
    ran = subprocess.run(
        [sys.executable, str(notebook)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr

"""The command line: what it writes, and one clear line for each mistake."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest

import jaxinv
from jaxinv import cli
from jaxinv.experiments import EXPERIMENTS

SMALL = ["--hidden", "8", "--epochs", "1", "--batch-size", "400"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """One run of the whole command, shared because it trains eight networks."""
    out = tmp_path_factory.mktemp("out") / "nested"
    argv = ["reproduce", "path-sgd", *SMALL, "--lr-adam", "0.02", "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = cli.main(argv)
    return code, out, printed.getvalue()


def test_reproduce_succeeds_and_writes_only_its_three_files(small_run):
    code, out, _ = small_run
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "results.json", "table.md"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_results_hold_config_environment_and_curves(small_run):
    content = json.loads((small_run[1] / "results.json").read_text())
    assert content["experiment"] == "path-sgd"
    assert content["config"]["hidden"] == [8]
    assert content["learning_rates"]["adam"] == 0.02
    assert content["environment"]["versions"]["jaxinv"] == jaxinv.__version__
    assert list(content["studies"]) == ["sgd", "adagrad", "adam", "path_sgd"]
    assert list(content["studies"]["adam"]) == ["balanced, 0.02", "unbalanced, 0.02"]
    assert len(content["studies"]["sgd"]["unbalanced, 0.1"]["step_loss"][0]) == 1437 // 400


def test_the_table_names_every_optimizer_and_start(small_run):
    printed = small_run[2]
    for word in ("SGD", "AdaGrad", "Adam", "Path-SGD", "balanced", "unbalanced", "error %"):
        assert word in printed
    assert "…" not in printed  # nothing is cut off, however narrow the terminal


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"jaxinv {jaxinv.__version__}\n"


def test_help_lists_every_experiment(capsys):
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in EXPERIMENTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden", "512,zero"], "argument --hidden: expected widths of hidden layers, such as"),
        (["--hidden", "0"], "argument --hidden: expected widths of hidden layers"),
        (["--dropout", "1"], "argument --dropout: expected a number from 0 to below 1, got '1'"),
        (["--epochs", "0"], "argument --epochs: expected a whole number of 1 or more, got '0'"),
        (["--batch-size", "x"], "argument --batch-size: expected a whole number of 1 or more"),
        (["--seeds", "1.5"], "argument --seeds: expected a whole number of 1 or more"),
        (["--lr-sgd", "-1"], "argument --lr-sgd: expected a number above 0, got '-1'"),
        (["--lr-adam", "nan"], "argument --lr-adam: expected a number above 0, got 'nan'"),
        (["--momentum", "1"], "unrecognized arguments: --momentum 1"),
    ],
)
def test_a_bad_flag_is_named_with_what_it_expects(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["reproduce", "path-sgd", *flags])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_experiment_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["reproduce", "path-sdg"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "path-sdg" in error and all(name in error for name in EXPERIMENTS)


def _error_line(argv, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxinv: error: ") and error.count("\n") == 1
    return error


def test_missing_data_is_one_line(tmp_path, capsys):
    argv = ["reproduce", "path-sgd", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "train-images-idx3-ubyte.gz" in _error_line(argv, capsys)


def test_a_batch_larger_than_the_data_is_one_line(tmp_path, capsys):
    argv = ["reproduce", "path-sgd", "--batch-size", "5000", "--out", str(tmp_path)]
    assert "choose a smaller --batch-size" in _error_line(argv, capsys)


def test_an_output_path_that_is_a_file_is_one_line(tmp_path, capsys):
    file = tmp_path / "out"
    file.touch()
    assert str(file) in _error_line(["reproduce", "path-sgd", "--out", str(file)], capsys)


@pytest.mark.parametrize("library", ["matplotlib", "rich.progress", "sklearn.datasets"])
def test_a_missing_extra_says_how_to_install_it(library, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)  # makes its import fail
    argv = ["reproduce", "path-sgd", *SMALL, "--out", str(tmp_path)]
    error = _error_line(argv, capsys)
    assert f"this needs {library}" in error and "pip install 'jaxinv[cli]'" in error


def test_an_interrupt_exits_with_130(tmp_path, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_reproduce", interrupt)
    assert cli.main(["reproduce", "path-sgd", "--out", str(tmp_path)]) == 130


# A model that says how many threads LAPACK has once jax has used it.
THREADS = """
import os, jax.numpy as jnp, threadpoolctl
jnp.linalg.svd(jnp.ones((9, 9))).S.block_until_ready()
for pool in threadpoolctl.threadpool_info():
    if pool["internal_api"] == "openblas" and "numpy.libs" not in pool["filepath"]:
        print("jax's", pool["num_threads"], "of", os.environ["OPENBLAS_NUM_THREADS"])
def model():
    return (lambda w, x: x @ w), jnp.ones((2, 1)), jnp.ones((1, 2))
"""


@pytest.mark.parametrize("chosen", [None, "2"])
def test_the_command_gives_lapack_one_thread_unless_told_otherwise(chosen, tmp_path):
    """Its threads and XLA's would wait for each other."""
    pytest.importorskip("threadpoolctl")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("with one core OpenBLAS has one thread anyway")
    (tmp_path / "model.py").write_text(THREADS)
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    if chosen is not None:
        environment["OPENBLAS_NUM_THREADS"] = chosen
    argv = [sys.executable, "-m", "jaxinv.cli", "inspect", f"{tmp_path / 'model.py'}:model"]
    run = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=100)
    assert run.returncode == 0, run.stderr
    found = [line for line in run.stdout.splitlines() if line.startswith("jax's")]
    assert found == [f"jax's {chosen or 1} of {chosen or 1}"]


def test_importing_jaxinv_changes_no_variable():
    code = (
        "import os; names = set(os.environ); import jaxinv, jaxinv.cli; "
        "print(sorted(name for name in set(os.environ) - names if 'THREADS' in name))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    argv = [sys.executable, "-c", code]
    run = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=100)
    assert run.stdout.strip() == "[]", run.stderr

"""Chains against known laws, and their checkpoints against an interrupted and a damaged run."""

import errno
import io
import json
import os
import sys
import tracemalloc
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import InvalidInput
from jaxinv.bayes import checkpoint as _checkpoint
from jaxinv.bayes import diagnostics, dispersed_starts, sample_nuts, sample_sgld
from jaxinv.errors import JaxinvError, MissingExtra

pytestmark = pytest.mark.usefixtures("standard_dtype_promotion")

KEY = jax.random.key(3)
STARTS = {"a": jnp.zeros((4, 2)), "b": jnp.ones((4,))}
OPTIONS = {"num_warmup": 60, "block": 20}


def normal(w):
    """Means (1, 1) and 2, standard deviations 1 and 3."""
    return -((w["a"] - 1) ** 2).sum() / 2 - (w["b"] - 2) ** 2 / 18


def scaled(w):
    return 2 * normal(w)


def files_of(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 40 draws with checkpoints."""
    directory = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        return sample_nuts(
            normal, STARTS, KEY, num_samples=40, checkpoint=directory, **OPTIONS
        ), directory


@pytest.mark.slow
def test_a_run_with_checkpoints_gives_the_draws_of_one_without(whole):
    samples, directory = whole
    assert samples.params["a"].shape == (4, 40, 2)
    assert files_of(directory) == ["draws-00000000.npz", "draws-00000020.npz", "start.npz"]
    chex.assert_trees_all_equal(
        samples, sample_nuts(normal, STARTS, KEY, num_samples=40, **OPTIONS)
    )


def test_an_interrupted_run_goes_on_bit_for_bit_and_can_be_lengthened(whole, tmp_path):
    samples, directory = whole
    for name in ("start.npz", "draws-00000000.npz"):  # killed in the second block
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    before = (tmp_path / "start.npz").stat().st_mtime_ns
    longer = sample_nuts(normal, STARTS, KEY, num_samples=45, checkpoint=tmp_path, **OPTIONS)
    assert (tmp_path / "start.npz").stat().st_mtime_ns == before
    assert longer.log_density.shape == (4, 45)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[:, :40], longer[:4]), samples[:4])


def test_chains_share_what_they_adapted(whole):
    step = np.asarray(whole[0].step_size)
    assert step.shape == (4,) and (step == step[0]).all() and 0.1 < step[0] < 10


def test_damaged_and_foreign_checkpoints_are_refused_by_name(whole, tmp_path):
    _, directory = whole
    for name in files_of(directory):
        (tmp_path / name).write_bytes((directory / name).read_bytes())

    def run(log_density=normal, key=KEY, **options):
        return sample_nuts(
            log_density, STARTS, key, num_samples=40, checkpoint=tmp_path, **(OPTIONS | options)
        )

    with pytest.raises(InvalidInput, match=r"start.npz: of another configuration \(num_warmup"):
        run(num_warmup=61)
    with pytest.raises(InvalidInput, match="density_at_starts"):
        run(scaled)
    with pytest.raises(InvalidInput, match=r"\(key = "):
        run(key=jax.random.key(4))
    path = tmp_path / "draws-00000000.npz"
    content = bytearray(path.read_bytes())
    for damaged in (
        content[: len(content) // 2],
        b"",
        bytes(content[:600]) + b"x" + bytes(content[601:]),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InvalidInput, match="draws-00000000.npz: damaged"):
            run()
    # A file whose zip is sound, but whose numbers are not those that were written.
    with np.load(directory / path.name) as file:
        arrays = {name: file[name] for name in file.files}
    assert json.loads(arrays["__header__"].tobytes())["identity"]["sampler"] == "nuts"
    arrays["0"] = arrays["0"] + 1
    np.savez(path, **arrays)
    with pytest.raises(InvalidInput, match="draws-00000000.npz: damaged, its checksum"):
        run()


def test_sgld_samples_a_normal_law_and_resumes(tmp_path):
    """Of N(2, 1) an Euler step ε samples N(2, 1/(1 − ε/2)); the draws of chains are apart."""

    def gradient(w, key):
        return 2 - w + 0.1 * jax.random.normal(key, w.shape)

    options = {"step_size": 0.2, "num_warmup": 20, "thin": 10, "block": 100}
    first = sample_sgld(
        gradient, jnp.zeros((8, 4)), KEY, num_samples=80, checkpoint=tmp_path, **options
    )
    found = sample_sgld(
        gradient, jnp.zeros((8, 4)), KEY, num_samples=380, checkpoint=tmp_path, **options
    )
    chex.assert_trees_all_equal(first.params, found.params[:, :80])
    assert found.params.shape == (8, 380, 4)
    estimate = diagnostics(found.params)
    assert (np.abs(estimate.mean - 2) < 4 * estimate.standard_error).all()
    assert (estimate.r_hat < 1.02).all()
    np.testing.assert_allclose(found.params.var(), 1 / 0.9, rtol=0.05)


def test_starts_have_positive_density_or_are_refused():
    def half(w):
        return jnp.where(w > 0, 0.0, -jnp.inf)

    starts = dispersed_starts(half, jnp.zeros(()), KEY, 50)
    assert (starts > 0).all() and len(np.unique(starts)) == 50
    with pytest.raises(InvalidInput, match="no start of density > 0"):
        dispersed_starts(half, -jnp.ones(()), KEY, 3)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InvalidInput, match="all must be finite"):
        sample_nuts(lambda w: jnp.log(w), jnp.zeros(2), KEY, num_samples=10)
    with pytest.raises(InvalidInput, match="num_samples must be"):
        sample_nuts(normal, STARTS, KEY, num_samples=0)
    with pytest.raises(InvalidInput, match="one common leading axis"):
        sample_nuts(normal, {"a": jnp.zeros((4, 2)), "b": jnp.ones(3)}, KEY, num_samples=1)
    with pytest.raises(InvalidInput, match="step_size"):
        sample_sgld(lambda w, key: -w, jnp.zeros(2), KEY, step_size=0.0, num_samples=1)
    with pytest.raises(InvalidInput, match="at least 2 chains"):
        diagnostics(np.zeros((1, 10)))


def test_diagnostics_agree_with_their_definition():
    """Of white noise: the effective sample size is the number of draws, the error σ/√N."""
    draws = np.random.default_rng(0).normal(5, 2, size=(4, 1000, 3))
    found = diagnostics(draws)
    np.testing.assert_allclose(found.mean, draws.mean((0, 1)))
    np.testing.assert_allclose(found.standard_error, 2 / 4000**0.5, rtol=0.15)
    assert (found.r_hat < 1.01).all() and (found.ess > 3000).all()
    constant = diagnostics(np.full((2, 10), 3.0))
    assert [float(v) for v in constant] == [3.0, 0.0, 20.0, 1.0]


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(
        MissingExtra, match=r"needs arviz, .*pip install 'jaxinv\[bayes\]'"
    ) as caught:
        diagnostics(np.zeros((2, 4)))
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    "option",
    [
        {"num_warmup": -1},
        {"num_samples": 0},
        {"thin": 1.5},
        {"step_size": 0.0},
        {"step_size": np.inf},
    ],
    ids=str,
)
def test_options_of_sgld_are_checked(option):
    options = {"step_size": 1e-3, "num_samples": 4, "num_warmup": 0, **option}
    (name,) = option
    with pytest.raises(InvalidInput, match=f"{name} must be"):
        sample_sgld(lambda w, key: w, STARTS, KEY, **options)


def test_checkpoints_that_nobody_here_wrote_are_damage(tmp_path):
    """Packed arrays, more than the file holds, no header, a header of another kind."""

    def stored(**arrays):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    def header(text):
        return np.frombuffer(text, np.uint8)

    packed = io.BytesIO()
    np.savez_compressed(packed, a=np.zeros(10**7, np.uint8))
    vast = io.BytesIO()
    with zipfile.ZipFile(vast, "w") as file:
        npy = io.BytesIO()
        description = {"descr": "|u1", "fortran_order": False, "shape": (2**45,)}
        np.lib.format.write_array_header_1_0(npy, description)
        file.writestr("a.npy", npy.getvalue())
    contents = {
        "packed": packed.getvalue(),
        "vast": vast.getvalue(),
        "no header": stored(a=np.zeros(2)),
        "a list": stored(__header__=header(b"[1]")),
        "no digest": stored(__header__=header(b'{"identity": {}}')),
        "identity is a number": stored(__header__=header(b'{"identity": 1, "digest": "0"}')),
        "nested": stored(__header__=header(b"[" * 100_000)),
        "objects": stored(a=np.array([{}, None])),
        "no zip": b"PK\x03\x04" + bytes(100),
    }
    path = tmp_path / "start.npz"
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match="start.npz: damaged") as caught:
            _checkpoint.load(path, {})
        assert "remove this one" in str(caught.value), name
    path.write_bytes(contents["packed"])
    tracemalloc.start()
    with pytest.raises(InvalidInput, match="packed"):
        _checkpoint.load(path, {})
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "start.npz"
    _checkpoint.save(path, {"0": np.zeros(3)}, {})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JaxinvError, match=r"start.npz: cannot be written \(No space left"):
        _checkpoint.save(path, {"0": np.ones(3)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["start.npz"]
    assert (_checkpoint.load(path, {})["0"] == 0).all()

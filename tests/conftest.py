"""Set up jax before anything imports it, and the fixtures every test may use."""

import atexit
import functools
import gc
import importlib.metadata
import os
import platform
import shutil
import tempfile
from pathlib import Path

# Eight devices on one CPU, so that sharded parameters are tested on any machine.
_flags = ["--xla_force_host_platform_device_count=8"]
# Most of the suite's time is compilation of programs that run once: a fifth less of it this way.
_flags.append("--xla_backend_optimization_level=0")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older code generator compiles in half the time. XLA stops at a flag that it does not know.
    _flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each xdist worker is a process of its own: without a limit every one of them
    # starts a thread per core for each matmul, and they fight over the cores.
    _flags.append("--xla_cpu_multi_thread_eigen=false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one file or worker has compiled, the others read, and so does the next run: jax looks for
    # the very program, flags and version. `make clean` removes it.
    _cache = Path(__file__).parents[1] / ".pytest_cache" / f"programs-{platform.node()}"
    try:
        if _cache.exists() and sum(entry.stat().st_size for entry in os.scandir(_cache)) > 1e9:
            shutil.rmtree(_cache, ignore_errors=True)
        _cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # not ours to write: for this run alone
        _cache = Path(tempfile.mkdtemp(prefix="jaxinv-tests-"))
        atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Run by itself where only a wheel is installed; collecting it would run it here.
collect_ignore = ["smoke.py"]

import chex  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir as _mlir  # noqa: E402

# jax makes a context of the compiler, with all its dialects, for every single program: a third of
# what lowering a small one costs. The programs are the same if those of a file share one.
_new_context = getattr(_mlir, "make_ir_context", None)
_shared_context = functools.cache(lambda: _new_context())


def _context():
    try:
        _mlir.ir.Context.current  # noqa: B018
    except ValueError:
        return _shared_context()
    return _new_context()  # a program that is compiled while another is being written


if _new_context is not None:
    _mlir.make_ir_context = _context

# Compilation makes the first example of a test slow, so a deadline would only flake;
# derandomised, because a suite that fails one day in ten says nothing about today's change.
hypothesis.settings.register_profile("jaxinv", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxinv")


def pytest_collection_finish():
    """Tracing makes objects by the million, and those of the imports never die: look less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def strict_dtype_promotion():
    """float32 and float64 never mix silently in the code under test."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def count_traces_from_zero():
    """`chex.assert_max_traces` counts by source, over all cases of a parametrised test."""
    chex.clear_trace_counter()


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drop compiled programs after each file; a whole run would otherwise keep gigabytes."""
    yield
    jax.clear_caches()
    _shared_context.cache_clear()


@pytest.fixture
def standard_dtype_promotion(strict_dtype_promotion):
    """The promotion of jax's defaults, for tests that run libraries which rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64():
    """64-bit floats inside one test; the default elsewhere stays what users have."""
    with jax.enable_x64(True):
        yield

"""The figures of the papers, one module each.

A module ``jaxinv/experiments/NAME.py`` has these names, and one row in
:data:`EXPERIMENTS` makes it a command, ``jaxinv reproduce NAME``:

- ``Config``: a dataclass; each field is a flag (see :mod:`jaxinv.experiments.options`);
- ``run(config, progress, store) -> Result``: made by :func:`jaxinv.experiments.training.driver` of
  ``run(config, running)``, the computation, cut into cells: ``running.store(study, cell, compute)``
  returns the cell from ``results.json`` if an earlier run left it there, and else
  computes and writes it; :func:`jaxinv.experiments.resuming.compute` does this for a table of
  cells. A cell is what may be lost when a run is killed, so it should take a minute or two at
  most, and it depends on the ``Config`` and on nothing else. It holds numbers, texts, arrays and
  lists of them, and comes back as JSON holds them: arrays as lists, floats bit for bit. A measured
  time goes into a field whose name begins with ``seconds``. ``store`` is ``None`` by default;
- ``table(result) -> Table``: what is printed;
- ``record(result) -> dict``: what ``results.json`` says next to the cells, such as verdicts;
- ``plot(result, path)``: the figure, and ``FIGURE``, the name of its file.

What is trained on minibatches of images is loaded, checked, trained and evaluated by
:mod:`jaxinv.experiments.training`.

The command opens the store, with its lock, checksum and messages, and writes the record and the
figure; the fields ``out`` and ``jobs`` of a ``Config`` play no part in whose results are whose. A
row of tiny sizes in ``tests/experiments/test_kills.py`` has the new experiment killed there.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple


class Experiment(NamedTuple):
    """A row of :data:`EXPERIMENTS`."""

    module: str  # imported only when the experiment is asked for
    summary: str  # the line `jaxinv reproduce --help` shows


EXPERIMENTS = {
    "path-sgd": Experiment(
        "jaxinv.experiments.path_sgd",
        "SGD, AdaGrad, Adam and Path-SGD from a balanced and an unbalanced start of one network",
    ),
    "invariance": Experiment(
        "jaxinv.experiments.invariance",
        "Every optimizer of optax, Path-SGD and SGD in a gauge: is it invariant? A measured table",
    ),
    "parametrizations": Experiment(
        "jaxinv.experiments.parametrizations",
        "One network trained unconstrained, constrained and normalised, with ReLU and sigmoid",
    ),
    "geometry": Experiment(
        "jaxinv.experiments.geometry",
        "Good parametrisations and invariant algorithms side by side, over learning rates",
    ),
    "inductive-bias": Experiment(
        "jaxinv.experiments.inductive_bias",
        "Error and capacity norms of one-hidden-layer networks against their width: is there a U?",
    ),
    "degrees-of-freedom": Experiment(
        "jaxinv.experiments.degrees_of_freedom",
        "Spectrum of the Jacobian; d = rank + rescaling + dead + unexplained, on noise and images",
    ),
    "learning-coefficient": Experiment(
        "jaxinv.experiments.learning_coefficient",
        "Learning coefficients by sampling against exact ones, and between rank/2 and d/2",
    ),
    "discussion": Experiment(
        "jaxinv.experiments.discussion",
        "Is rescaling all? The rank against inputs, draws, training, depth and width",
    ),
    "functional-dimension": Experiment(
        "jaxinv.experiments.functional_dimension",
        "Proven degrees of freedom against depth, width, training: is there a large-scale limit?",
    ),
    "bayes": Experiment(
        "jaxinv.experiments.bayes",
        "Posterior predictives under Jeffreys' and a Gaussian prior, in two parametrisations",
    ),
}

if not TYPE_CHECKING:  # a type checker would take any name for a module
    _ON_DEMAND = {
        "datasets", "ensembles", "files", "gaps", "options", "report", "resuming", "starts",
        "training",
        *(experiment.module.rpartition(".")[2] for experiment in EXPERIMENTS.values()),
    }  # fmt: skip

    def __getattr__(name: str) -> ModuleType:
        """A module of this package, imported when it is first asked for."""
        if name in _ON_DEMAND:
            return importlib.import_module(f"jaxinv.experiments.{name}")
        raise AttributeError(f"module 'jaxinv.experiments' has no attribute {name!r}")

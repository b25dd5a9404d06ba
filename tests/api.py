"""Write the public interface, every public name with its signature, to tests/api.txt.

`python -m tests.api` after a change that is meant; the diff then shows what changed.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path

FILE = Path(__file__).parent / "api.txt"


def _signature(value) -> str:
    if isinstance(value, type):
        fields = getattr(value, "_fields", None)
        return f" class({', '.join(fields)})" if fields is not None else " class"
    if not inspect.isfunction(value):
        return ""
    parameters = inspect.signature(value).parameters.values()
    # Names, kinds and defaults; how a version of Python prints annotations is no change of ours.
    plain = [
        p.replace(annotation=inspect.Parameter.empty, default=_default(p.default))
        for p in parameters
    ]
    return str(inspect.Signature(plain))


class _Named:
    """A default that is a function: its name, rather than where it lies in memory."""

    def __init__(self, value):
        self.name = getattr(value, "__name__", type(value).__name__)

    def __repr__(self) -> str:
        return self.name


def _default(value):
    return _Named(value) if callable(value) and value is not inspect.Parameter.empty else value


def public_names() -> dict[str, str]:
    """Every public name, as `jaxinv.rescale`, and where it is, `jaxinv.rescaling.group.rescale`.

    What `__all__` lists: of jaxinv, of the face of each package, and of each module beside them.
    The commands, experiments and pages promise no names.
    """
    import jaxinv

    beside = sorted(module.name for module in pkgutil.iter_modules(jaxinv.__path__))
    kept = [n for n in beside if not n.startswith("_") and n not in ("cli", "experiments", "pages")]
    found = {}
    for module in (jaxinv, *(importlib.import_module(f"jaxinv.{name}") for name in kept)):
        for name in module.__all__:
            home = str(getattr(getattr(module, name), "__module__", ""))
            home = home if home.startswith("jaxinv.") else module.__name__  # an alias of a type
            found[f"{module.__name__}.{name}"] = f"{home}.{name}"
    return found


def named(full: str):
    """What a full name stands for."""
    module, _, name = full.rpartition(".")
    return getattr(importlib.import_module(module), name)


def interface() -> str:
    return "".join(f"{name}{_signature(named(name))}\n" for name in public_names())


if __name__ == "__main__":
    FILE.write_text(interface(), encoding="utf-8")

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
    if not callable(value):
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


def _of_module(module) -> list[str]:
    """A face hands on what it lists; of a single file, what is defined in it."""
    own = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return [f"{module.__name__}.{n}{_signature(getattr(module, n))}" for n in sorted(own)]


def interface() -> str:
    import jaxinv

    lines = [f"jaxinv.{name}{_signature(getattr(jaxinv, name))}" for name in sorted(jaxinv.__all__)]
    for found in sorted(pkgutil.iter_modules(jaxinv.__path__), key=lambda m: m.name):
        if not found.name.startswith("_") and found.name not in ("cli", "experiments", "pages"):
            lines += _of_module(importlib.import_module(f"jaxinv.{found.name}"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(interface(), encoding="utf-8")

"""Libraries that only some of jaxinv needs, and that are installed with its extras."""

import importlib
from types import ModuleType

from jaxinv.errors import MissingExtra


def require(library: str, extra: str) -> ModuleType:
    """Import ``library``, or say which extra brings it.

    Args:
        library: name of the module.
        extra: the extra of jaxinv that installs it.

    Returns:
        the module.

    Raises:
        MissingExtra: if the module is not installed.

    >>> require("math", "cli").sqrt(4.0)
    2.0
    >>> require("no_such_library", "cli")
    Traceback (most recent call last):
    ...
    jaxinv.errors.MissingExtra: this needs no_such_library, which is not installed; run: pip install 'jaxinv[cli]'
    """  # noqa: E501 (a doctest cannot break the message)
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"this needs {library}, which is not installed; run: pip install 'jaxinv[{extra}]'"
        ) from error

"""The errors jaxinv raises: one class per kind, each says what, where, why and what to do."""

from __future__ import annotations


class JaxinvError(Exception):
    """Base class of every error raised by jaxinv.

    Example:
        >>> from jaxinv.errors import InvalidInput, JaxinvError
        >>> issubclass(InvalidInput, JaxinvError)
        True
    """


class InvalidInput(JaxinvError, ValueError):
    """An argument has a wrong type, shape, dtype or value; nothing was computed.

    Example:
        >>> import jax.numpy as jnp, jaxinv
        >>> try:
        ...     jaxinv.path_norm(lambda w, x: x @ w, jnp.ones((2, 1), int), jnp.ones((1, 2)))
        ... except jaxinv.InvalidInput as error:
        ...     print(str(error).splitlines()[0])
        params has dtype int32, but parameters must be real floating-point arrays.
    """


class MissingExtra(JaxinvError, ImportError):
    """A library of an extra is needed and not installed; the message says what installs it.

    Example:
        >>> from jaxinv.errors import MissingExtra
        >>> from jaxinv._extras import require
        >>> try:
        ...     require("no_such_library", "cli")
        ... except MissingExtra as error:
        ...     print(str(error).split("; ")[1])
        run: pip install 'jaxinv[cli]'
    """


class UnsupportedOperation(JaxinvError, NotImplementedError):
    """The function uses an operation that the theory in question does not cover.

    The message names the operation and its shapes, the source line that wrote it, why the theory
    does not cover it, and what to do. Refusing is deliberate: an approximation here would be a
    silently wrong number.

    Example:
        >>> import jax, jax.numpy as jnp, jaxinv
        >>> try:
        ...     jaxinv.path_norm(lambda w, x: jnp.tanh(x @ w), jnp.ones((2, 1)), jnp.ones((1, 2)))
        ... except jaxinv.UnsupportedOperation as error:
        ...     print(str(error).splitlines()[0])
        `tanh` of values that depend on x is not covered by path semantics.
    """


class ExponentOverflow(UnsupportedOperation, OverflowError):
    """The exponents of a rescaling group are too large to be solved for in exact arithmetic.

    Example:
        >>> import jax, jax.numpy as jnp, jaxinv
        >>> def net(w, x):
        ...     return jax.nn.relu(x @ w[0]) ** 1_234_567_890 @ w[1]
        >>> try:
        ...     jaxinv.rescaling_group(net, [jnp.ones((2, 1)), jnp.ones((1, 1))], jnp.ones((1, 2)))
        ... except jaxinv.errors.ExponentOverflow as error:
        ...     print(str(error).split(":")[0])
        exponents of the scale classes are too large to solve for exactly
    """


__all__ = [
    "ExponentOverflow",
    "InvalidInput",
    "JaxinvError",
    "MissingExtra",
    "UnsupportedOperation",
]

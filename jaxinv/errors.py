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

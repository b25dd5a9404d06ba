"""Which matrices may act on the axes of every value of a program without changing its outputs."""

from jaxinv.frames.matrices import MatrixClass

__all__ = ["MatrixClass"]

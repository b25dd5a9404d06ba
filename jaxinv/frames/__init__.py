"""Which matrices may act on the axes of every value of a program without changing its outputs."""

__all__ = ()

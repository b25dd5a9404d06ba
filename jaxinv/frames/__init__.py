"""Which matrices may act on the axes of every value of a program without changing its outputs."""

from jaxinv.frames.follow import FrameClass, Frames, Place, frames_of

__all__ = ["FrameClass", "Frames", "Place", "frames_of"]

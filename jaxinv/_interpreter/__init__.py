"""Tracing a function once, walking its jaxpr in another domain, and which axis holds the
examples. Everything that touches the internals of jaxprs is in `walk`."""

"""Undercroft: many isolated operating systems on one machine, many machines as one pool."""

__version__ = "0.1.0"

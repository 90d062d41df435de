"""Benchmarks: the figures that Undercroft must reach, each beside its peer in the same run."""

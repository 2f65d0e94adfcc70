"""Benchmarks: one format of results for all, and what `stpath bench` measures of an engine on a machine."""

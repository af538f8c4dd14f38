"""Benchmarks: `python -m bench.run cpu`. Not shipped; docs/benchmarks.md explains how to read and extend them."""

"""Numerical error bounds of correct results, shared by the tests and the benchmarks."""

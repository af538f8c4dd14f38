"""Claims of the papers that this package implements, measured on a CPU: `python -m bench.fidelity`."""

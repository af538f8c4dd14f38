"""Everything that only a GPU can show, in ten minutes: `python -m bench.gpu_check --out DIR` (`make gpu-check`)."""

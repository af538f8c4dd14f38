"""All checks that need a GPU, in ten minutes: `python -m bench.gpu_check --out DIR` (`make gpu-check`)."""

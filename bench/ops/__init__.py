"""One bench_<op>.py for each op: its problems, what they cost, and who competes. bench/run.py does everything else."""

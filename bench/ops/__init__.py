"""One bench_<op>.py for each op: its problems, their cost, and the implementations. bench/run.py runs them."""

"""Faults planted in the CPU kernels, and the tests of the suite that must detect each of them.

    python -m tests.cpu.planted [--all] [WORD ...]

All faults are compiled into one library. Each is activated in a forked process, which runs the test that its entry
names. The command prints one line for each fault and exits with 1 if a fault is not detected, or if a test fails
without a fault.

--all adds the faults of instruction sets that are not this machine's best (avx2, portable), which `make test` leaves
out. WORD: only faults whose names contain one of these.
"""

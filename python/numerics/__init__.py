"""How far a correct result may lie from the exact one; the tests and the benchmarks share these bounds."""

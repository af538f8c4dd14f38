"""How ops are computed: one package per backend, none of which imports another."""

"""Implementations of the ops: one package per backend, none of which imports another."""

"""The NF4 codec as a specification and as a reference implementation in plain torch."""

"""What the bytes mean: the NF4 codec as specification and as a reference in plain torch."""

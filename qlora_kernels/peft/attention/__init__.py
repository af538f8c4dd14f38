"""Module names of the parts of a transformer, and the places where prefixes and prompts enter it."""

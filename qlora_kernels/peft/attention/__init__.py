"""Module names of the parts of a transformer, and the places at which prefixes and prompts are added."""

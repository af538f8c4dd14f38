"""Where the parts of a transformer are, and how prefixes and prompts enter it."""

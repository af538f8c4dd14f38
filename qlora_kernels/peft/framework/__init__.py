"""The base classes of methods, and what every method shares: names, targets, copies of parameters, files."""

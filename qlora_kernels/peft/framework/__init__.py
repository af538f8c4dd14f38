"""The base classes of methods, and their shared parts: names, targets, copies of parameters, files."""

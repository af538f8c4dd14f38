"""Layers with adapters: the protocol of a base layer, and the modules that change a layer's computation."""

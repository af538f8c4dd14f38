"""Configurations, the selection of active adapters, and where the modules of adapters are."""

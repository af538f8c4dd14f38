"""The formulas of python/numerics/linear_formulas.py under the name by which the tests import them."""

from python.numerics.linear_formulas import *  # noqa: F403

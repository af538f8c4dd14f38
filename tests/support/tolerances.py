"""The bounds of python/numerics/tolerances.py under the name by which the tests import them."""

from python.numerics.tolerances import *  # noqa: F403

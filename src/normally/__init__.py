"""normally: the normalization layers of PyTorch, faster, exact, and explained."""

from . import functional, nn, reference
from ._native import backends

__all__ = ["__version__", "backends", "functional", "nn", "reference"]
__version__ = "0.1.0"

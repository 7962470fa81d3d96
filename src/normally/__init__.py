"""normally: the normalization layers of PyTorch, faster, exact, and explained."""

from . import functional, nn, reference
from ._native import backends
from .nn import create_norm

__all__ = ["__version__", "backends", "create_norm", "functional", "nn", "reference"]
__version__ = "0.1.0"

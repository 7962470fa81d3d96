"""Stateless normalization functions: validate, then call the operator.

Signatures are torch.nn.functional's; what is ours comes last and by keyword only.
"""

from .batch_norm import batch_norm

__all__ = ["batch_norm"]

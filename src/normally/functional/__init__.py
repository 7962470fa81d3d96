"""Stateless normalization functions: validate, then call the operator.

Signatures are torch.nn.functional's; what is ours comes last and by keyword only.
"""

from .batch_norm import batch_norm
from .frozen_batch_norm import frozen_batch_norm
from .group_norm import group_norm
from .instance_norm import instance_norm
from .layer_norm import add_layer_norm, layer_norm
from .local_response_norm import local_response_norm
from .rms_norm import add_rms_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "frozen_batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "local_response_norm",
    "rms_norm",
]

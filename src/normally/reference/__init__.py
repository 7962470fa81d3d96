"""Every normalization as its formula: slow, obvious, and the oracle of the tests.

The functions here are plain torch expressions. They widen to float64 first and narrow once at the
end, so they are differentiable any number of times, run on any device that has float64, and say
what the compiled kernels must compute. Where there is no kernel they are also what runs.
"""

from .activation import ACTIVATIONS, DEFAULT_ACT_PARAM, DERIVATIVES, act_param_of, activate
from .batch_norm import batch_norm, batch_norm_backward
from .group_norm import group_norm, group_statistics
from .layer_norm import layer_norm
from .local_response_norm import local_response_norm
from .normalization import (
    hide,
    identity_parameters,
    moments,
    normalize,
    population_statistics,
    running_average,
    unbiased,
    widen,
)
from .rms_norm import CASTINGS, default_eps, rms_norm

__all__ = [
    "ACTIVATIONS",
    "CASTINGS",
    "DEFAULT_ACT_PARAM",
    "DERIVATIVES",
    "act_param_of",
    "activate",
    "batch_norm",
    "batch_norm_backward",
    "default_eps",
    "group_norm",
    "group_statistics",
    "hide",
    "identity_parameters",
    "layer_norm",
    "local_response_norm",
    "moments",
    "normalize",
    "population_statistics",
    "rms_norm",
    "running_average",
    "unbiased",
    "widen",
]

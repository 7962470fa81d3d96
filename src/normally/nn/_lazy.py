"""What the lazy layers share: `num_features` comes from the first input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ._skipped_updates import CountsSkippedUpdates


class LazyNorm(CountsSkippedUpdates):
    """A layer with running statistics that does not know its channels yet."""

    # From torch's lazy class, which stands behind this one in the method resolution order.
    has_uninitialized_params: Callable[[], bool]

    def _start_lazily(self, bias: bool, *arguments: Any) -> None:
        """Torch's lazy constructor, which takes no `num_features`, and what ours has beyond it."""
        lazy: Any = torch.nn.modules.batchnorm._LazyNormBase
        lazy.__init__(self, *arguments)
        if not bias:
            self.register_parameter("bias", None)
        self.register_buffer("_skipped_updates", None, persistent=False)

    def reset_parameters(self) -> None:
        """Nothing before the first input."""
        if not self.has_uninitialized_params() and self.num_features != 0:
            super().reset_parameters()

    def _take_features(self, num_features: int) -> None:
        """Create parameters and buffers, unless a state dict came first."""
        self.num_features = num_features
        if not self.has_uninitialized_params():
            return
        for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
            if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                tensor.materialize((num_features,))
        self.reset_parameters()
        self._count_skipped_updates()

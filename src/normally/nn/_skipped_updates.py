"""Running statistics that refuse a non-finite batch, and the counter of how often they did."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer


class CountsSkippedUpdates(_NormBase):
    """A layer with running statistics, and one count a channel beside them."""

    _skipped_updates: Tensor | None

    def _count_skipped_updates(self) -> None:
        """Start the counter beside the running statistics, which is not part of a state dict."""
        running = self.running_mean
        if running is None or isinstance(running, UninitializedBuffer):
            counter = None
        else:
            counter = torch.zeros(running.shape, dtype=torch.long, device=running.device)
        self.register_buffer("_skipped_updates", counter, persistent=False)

    def _start_count(self) -> None:
        """For a layer of torch's that has become one of these."""
        if "_skipped_updates" not in self._buffers:
            self._count_skipped_updates()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """torch's; refused updates of another past do not count for the statistics loaded now."""
        super()._load_from_state_dict(*args, **kwargs)
        self._count_skipped_updates()

    @property
    def skipped_updates(self) -> Tensor:
        """How many times a channel's running statistics refused a non-finite batch, in total."""
        if self._skipped_updates is None:
            return torch.zeros((), dtype=torch.long)
        return self._skipped_updates.sum()

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batches: as new."""
        super().reset_running_stats()
        if getattr(self, "_skipped_updates", None) is not None:
            self._skipped_updates.zero_()  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        """Fresh running statistics, γ = 1 and β = 0 where the layer has them."""
        self.reset_running_stats()
        if self.affine:
            torch.nn.init.ones_(self.weight)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)


def warn_of_half_statistics(layer: torch.nn.Module) -> None:
    """For a layer that updates float16 buffers."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{type(layer).__name__} is training with float16 running statistics: they cannot hold "
            "a variance above 65504 and lose small updates. Keep the layer in float32; it takes "
            "float16 inputs as it is.",
            UserWarning,
            stacklevel=3,
        )

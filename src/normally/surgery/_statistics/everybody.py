"""The processes whose data is one population."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import distributed
from ..._ops.batch_norm import stats_like
from ...nn._sync_conversion import check_group


class Everybody:
    """The members of a process group; this process alone without one.

    Args:
        group: the group; None is that of all processes, if there is one.
        layers: by path, the same in all of them.
        caller: whom the errors name.
    """

    def __init__(self, group: Any, layers: Mapping[str, torch.nn.Module], caller: str) -> None:
        check_group(group, "group", caller)
        has_all = torch.distributed.is_available() and torch.distributed.is_initialized()
        if group is None and has_all:
            group = torch.distributed.group.WORLD
        self._group, self._layers, self._caller = group, layers, caller
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()

    def error(self, words: str) -> ValueError:
        """An error that all of them raise alike."""
        return ValueError(f"{self._caller}: {words}")

    def statistics(self, found: Mapping[str, Tensor], paths: Iterable[str]) -> dict[str, Tensor]:
        """The (3, C) statistics of all values that the layers got in any process."""
        return {path: self._merged(path, found.get(path)) for path in paths}

    def _merged(self, path: str, own: Tensor | None) -> Tensor:
        if own is None:  # no values here
            own = _nothing(self._layers[path])
        if self.size == 1:
            return own
        site = self._site(path, f"statistics of {own.shape[1]} channels")
        messages = distributed.gather(own, site)
        merged = distributed.merge_messages(messages)
        if bool(merged[2].isnan().any()):  # a count is NaN where the calls differ
            distributed.raise_disagreement(site, own.device)
        return merged

    def total(self, numbers: Iterable[float], what: str) -> list[float]:
        """The sums over all processes."""
        numbers = list(numbers)
        if self.size == 1:
            return numbers
        like = _nothing(next(iter(self._layers.values())))
        site = self._site(what, f"{len(numbers)} numbers")
        sums: list[float] = distributed.sum_processes(like.new_tensor(numbers), site).tolist()
        return sums

    def _site(self, layer: str, what: str) -> distributed.Site:
        name = f"{self._caller} of {layer}" if layer else self._caller
        return distributed.Site(self._group.group_name, name, what)


def _nothing(layer: Any) -> Tensor:
    return stats_like(layer.running_mean[None]).zero_()

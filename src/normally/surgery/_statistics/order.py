"""In which order layers can be measured, so that each depends on those before it alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """One layer, or several of which each is called before the others."""

    #: In the order of their first calls.
    paths: tuple[str, ...]
    #: Whether what they get may depend on their own statistics: a layer that is called twice.
    depends_on_itself: bool
    #: Whether a layer comes before them.
    has_ancestors: bool


def relations(orders: Iterable[Sequence[str]], paths: Sequence[str]) -> Tensor:
    """(2, n, n) float64, 1 where in one of the orders layer i is called before layer j.

    In the first matrix any call of i before any of j counts, in the second first calls alone.
    """
    index = {path: i for i, path in enumerate(paths)}
    before = torch.zeros(2, len(paths), len(paths), dtype=torch.float64)
    for order in orders:
        for matrix, names in zip(before, (order, dict.fromkeys(order)), strict=True):
            calls = torch.tensor([index[name] for name in names], dtype=torch.long)
            for position, call in enumerate(calls):
                matrix[calls[:position], call] = 1
    return before


def blocks(before: Tensor, called: Sequence[bool], paths: Sequence[str]) -> list[Block]:
    """The layers that were called, in the order of execution.

    Those of which each may come before the other are one block: the strongly connected components
    of the first relation, sorted.

    Args:
        before: what `relations` gives, or sums of it.
        called: of every layer, whether it was.
        paths: their names.

    >>> before = relations([["a", "c", "b", "c"]], "abc")
    >>> [block.paths for block in blocks(before, [True] * 3, "abc")]
    [('a',), ('c', 'b')]
    """
    reach, first = before[0] > 0, before[1] > 0
    for middle in range(len(paths)):  # Warshall's closure
        reach = reach | (reach[:, middle, None] & reach[None, middle])
    mutual = reach & reach.T
    # What comes later has all the ancestors of what comes before it, and that besides.
    ancestors = reach.sum(0).tolist()
    found: list[Block] = []
    seen: set[int] = set()
    for i in sorted(range(len(paths)), key=lambda i: ancestors[i]):
        if i in seen or not called[i]:
            continue
        members = sorted({i, *mutual[i].nonzero().flatten().tolist()})
        seen.update(members)
        earlier = first[members][:, members].sum(0).tolist()
        names = [paths[m] for _, m in sorted(zip(earlier, members, strict=True))]
        outside = set(reach[:, i].nonzero().flatten().tolist()) - set(members)
        found.append(Block(tuple(names), bool(mutual[i, i]), bool(outside)))
    return found

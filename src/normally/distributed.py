"""What processes tell each other so that N of them normalize as one: `torch.distributed` as it is.

A layer's forward sends one message, 2C + 2 float64 numbers: the mean and the biased variance of
every channel, how many values they are of, and a fingerprint of the call. Everybody merges all of
them in the order of the ranks, and so has the same statistics, bit for bit. Its backward sums 2C
numbers and the fingerprints.

The fingerprint says whose numbers these are. Where two processes are in different layers, all of
them raise, and nobody goes on with wrong numbers. But a message of another size would end the
process inside of gloo. So before a layer is met for the first time after the one before it, all
agree on the call by another kind of collective, which is of a fixed size and which gloo cannot take
for the message itself. They do so again wherever different messages have followed that one. With
`NORMALLY_DISTRIBUTED_DEBUG=1` they do so every time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Peers",
    "Site",
    "agree",
    "gather",
    "merge",
    "merge_messages",
    "raise_disagreement",
    "sum_processes",
    "total",
]

#: How long a process that has lost the others listens for them.
_ROLL_CALL_SECONDS = 2.0

#: A call's collective and how many numbers a process gives to it.
Message = tuple[str, int]

#: A description as it travels where processes disagree: so many bytes of UTF-8.
_DESCRIPTION_BYTES = 512


class Peers(NamedTuple):
    """A process group, and the layer on whose behalf its members communicate."""

    group: ProcessGroup
    #: Its path in the model: what an error names, and what must be the same in every process.
    layer: str


class Site(NamedTuple):
    """A call that all processes of a group must make alike."""

    #: The group by the name under which torch knows it.
    group: str
    layer: str
    #: All that must agree, in words.
    what: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.what}"


def merge(stats: Tensor) -> Tensor:
    """The statistics of all values from those of parts (Chan, Golub & LeVeque 1983).

        m    = Σ m_i
        mean = Σ m_i·mean_i / m
        var  = (Σ m_i·var_i + Σ m_i·(mean_i - mean)²) / m

    Exact for means that are large against the deviations, and the mean of equal means is that mean.
    A part without values does not count, whatever its mean and variance. The order of the parts is
    fixed, so that all who merge the same numbers get the same bits.

    Args:
        stats: `(parts, 3, C)` float64: mean, biased variance and number of values.

    Returns:
        `(3, C)`: the same of all parts; mean 0 and variance 1 where there is no value at all.

    >>> two = torch.tensor([[[1.0], [0.0], [1.0]], [[4.0], [0.0], [2.0]]], dtype=torch.float64)
    >>> merge(two).flatten()  # of the values 1, 4, 4
    tensor([3., 2., 3.], dtype=torch.float64)
    """
    mean, var, count = stats.unbind(1)
    has_values = count > 0
    total = count.sum(0)
    m = total.clamp(min=1)
    # Relative to one of them; the others are then small, and equal ones exactly 0.
    near = torch.where(has_values, mean, -torch.inf).amax(0)
    near = torch.where(near.isfinite(), near, 0.0)
    merged = near + (torch.where(has_values, mean - near, 0.0) * count).sum(0) / m
    apart = torch.where(has_values, mean - merged, 0.0)
    spread = torch.where(has_values, var + apart * apart, 0.0)
    merged_var = torch.where(total > 0, (spread * count).sum(0) / m, 1.0)
    return torch.stack((merged, merged_var, total))


def gather(stats: Tensor, site: Site) -> Tensor:
    """Every process's own statistics: one message, one collective.

    Args:
        stats: `(3, C)` float64, as `merge` takes it of each; the count is the same in all channels.
        site: the call.

    Returns:
        `(W, 2C + 2)`, in the order of the ranks: C means, C variances, the count, and the call's
        fingerprint. Where the fingerprints differ, so do the calls.

    Raises:
        ValueError: in every process, if they do not all make this call.
        RuntimeError: if one of them cannot be reached within the group's timeout.
    """
    numbers = 2 * stats.shape[1] + 1
    agree(site, stats.device, ("gather", numbers))
    message = stats.new_empty(numbers + 1)
    message[:numbers] = stats.view(-1)[:numbers]
    message[numbers] = _fingerprint(site)
    size = _resolve(site.group).size()
    collectives = torch.ops._c10d_functional
    with _Named(site):
        everything: Tensor = collectives.wait_tensor(
            collectives.all_gather_into_tensor(message, size, site.group)
        )
    return everything.view(size, -1)


def merge_messages(messages: Tensor) -> Tensor:
    """The statistics of all processes from what `gather` gives; NaN if the calls differ."""
    size, numbers = messages.shape
    channels = numbers // 2 - 1
    moments = messages[:, : 2 * channels].view(size, 2, channels)
    counts = messages[:, None, 2 * channels, None].expand(size, 1, channels)
    same = (messages[:, -1] == messages[0, -1]).all()
    return torch.where(same, merge(torch.cat((moments, counts), 1)), torch.nan)


def sum_processes(sums: Tensor, site: Site) -> Tensor:
    """The sum over all processes, in one collective.

    Args:
        sums: any float64 tensor, of the same shape everywhere.
        site: the call.

    Raises:
        ValueError: in every process, if they do not all make this call.
        RuntimeError: if one of them cannot be reached within the group's timeout.
    """
    numbers = sums.numel()
    agree(site, sums.device, ("sum", numbers))
    mark = float(_fingerprint(site))
    message = sums.new_empty(numbers + 1)
    message[:numbers] = sums.reshape(-1)
    message[numbers] = mark
    collectives = torch.ops._c10d_functional
    with _Named(site):
        message = collectives.wait_tensor(collectives.all_reduce_(message, "sum", site.group))
    same = message[-1] == mark * _resolve(site.group).size()
    result: Tensor = message[:-1].view(sums.shape)
    if not sums.is_cpu:  # asking would wait for the device
        return torch.where(same, result, torch.nan)
    if not same:
        raise_disagreement(site, sums.device)
    return result


def total(sums: Tensor, site: Site) -> Tensor:
    """`sum_processes` that can be differentiated, any number of times and under `torch.func`."""
    result: Tensor = _Total.apply(sums, site)  # type: ignore[no-untyped-call]
    return result


class _Total(torch.autograd.Function):
    """Everybody's result depends on everybody's term: the gradient is the sum of all gradients."""

    @staticmethod
    def forward(sums: Tensor, site: Site) -> Tensor:
        """The sum over all processes."""
        return sum_processes(sums, site)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Site], output: Tensor) -> None:
        """Keep the site."""
        ctx.site = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The sum over all processes again."""
        return total(gradient, ctx.site), None


# --- what processes agree on before they exchange numbers


class _History:
    """The calls of a group: the last, and which have followed which, with their messages."""

    def __init__(self) -> None:
        self.last = 0
        self.followers: dict[int, dict[int, Message]] = {}


# By the group itself: after destroy_process_group a name may be used again.
_histories: WeakKeyDictionary[Any, _History] = WeakKeyDictionary()


def agree(site: Site, device: torch.device, message: Message) -> None:
    """Make sure, at a fixed cost, that all processes of the group make this call.

    Nothing is sent where this call has followed the last one before, and no other call with another
    message ever has. Then it did so everywhere: whoever makes another call asks, or sends a message
    like this one, whose fingerprint tells.
    """
    group = _resolve(site.group)
    history = _histories.setdefault(group, _History())
    mark = _fingerprint(site)
    followers = history.followers.setdefault(history.last, {})
    history.last = mark
    debug = os.environ.get("NORMALLY_DISTRIBUTED_DEBUG") == "1"
    if not debug and mark in followers and len(set(followers.values())) == 1:
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # the answer would be waited for
    # Equal if the largest is the smallest. Reduced to one and told to all: both are collectives
    # that nothing else here uses, so gloo cannot mistake another message for them.
    marks = torch.tensor([mark, -mark], device=device)
    with _Named(site):
        if debug and dist.get_backend(group) == "gloo":
            # Says who is missing. Its own default is half an hour, whatever the group's.
            dist.monitored_barrier(group, timeout=_timeout(group), wait_all_ranks=True)
        dist.reduce(marks, op=dist.ReduceOp.MAX, group=group, group_dst=0)
        dist.broadcast(marks, group=group, group_src=0)
    largest, smallest = marks.tolist()
    if largest != -smallest:
        raise_disagreement(site, device)
    followers[mark] = message


@functools.lru_cache(4096)
def _fingerprint(site: Site) -> int:
    """32 bits: a float64 holds their sum over two million processes exactly."""
    digest = hashlib.blake2b(str(site).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") | 1  # never 0, which is the last call of a new group


def raise_disagreement(site: Site, device: torch.device) -> NoReturn:
    """ValueError with everybody's call in words. All processes come here or none does."""
    group = _resolve(site.group)
    text = str(site).encode()[:_DESCRIPTION_BYTES].ljust(_DESCRIPTION_BYTES, b"\0")
    own = torch.tensor(list(text), dtype=torch.uint8, device=device)
    everybody = [torch.empty_like(own) for _ in range(group.size())]
    with _Named(site):
        dist.all_gather(everybody, own, group=group)
    ranks: dict[str, list[int]] = {}
    for rank, said in zip(dist.get_process_group_ranks(group), everybody, strict=True):
        words = bytes(said.tolist()).rstrip(b"\0").decode(errors="replace")
        ranks.setdefault(words, []).append(rank)
    listed = "; ".join(
        f"rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}: {words}"
        for words, who in ranks.items()
    )
    raise ValueError(
        "batch_norm: all processes of a group must normalize with the same layer and the same "
        f"settings at the same time. Got {listed}."
    )


# --- faults


class _Named:
    """Adds to an error of `torch.distributed` where it happened, and who is missing."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if isinstance(error, RuntimeError):
            raise RuntimeError(_explain(self.site, error)) from error


def _explain(site: Site, error: RuntimeError) -> str:
    group = _resolve(site.group)
    ranks = dist.get_process_group_ranks(group)
    timeout = _timeout(group)
    return (
        f"batch_norm: {site.layer} on rank {dist.get_rank()} could not exchange its statistics "
        f"with the ranks {_listed(ranks)}: one of them has died, hangs or has come to another "
        f"layer. The call is {site.what}. {_roll_call(site, ranks)}"
        f"The group's timeout is {f'{timeout.total_seconds():g} s' if timeout else 'not known'}. "
        "With NORMALLY_DISTRIBUTED_DEBUG=1 all processes first agree on every call. "
        f"torch.distributed says: {error}"
    )


def _listed(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown}, … ({len(ranks)} of them)"


def _timeout(group: ProcessGroup) -> timedelta | None:
    """That of the group's collectives; None where its backend keeps it elsewhere."""
    for device in getattr(group, "_device_types", ()):
        with contextlib.suppress(RuntimeError):  # no backend for this one
            options = getattr(group._get_backend(device), "options", None)
            timeout = getattr(options, "_timeout", None)
            if isinstance(timeout, timedelta):
                return timeout
    return None


def _roll_call(site: Site, ranks: list[int]) -> str:
    """Who else has failed and where, and of whom there is no sign.

    The processes that are left meet in the store through which the groups were made. It may hang as
    well, if it is in the process that does: so another thread asks, and is not waited for.
    """
    heard: dict[int, str] = {}
    answers = threading.Event()
    lost = threading.Event()

    def ask() -> None:
        store = dist.distributed_c10d._get_default_store()
        keys = {rank: f"normally/{site.group}/{rank}" for rank in ranks}
        store.set(keys.pop(dist.get_rank()), str(site))
        answers.set()
        while keys:
            for rank in [rank for rank, key in keys.items() if store.check([key])]:
                heard[rank] = store.get(keys.pop(rank)).decode(errors="replace")
            time.sleep(0.05)

    def ask_quietly() -> None:
        try:
            ask()
        except RuntimeError:  # torch's DistError
            lost.set()

    thread = threading.Thread(target=ask_quietly, daemon=True)
    thread.start()
    thread.join(_ROLL_CALL_SECONDS)
    said = "".join(f"Rank {rank} failed at {where}. " for rank, where in sorted(heard.items())[:16])
    missing = [rank for rank in ranks if rank not in heard and rank != dist.get_rank()]
    if lost.is_set() or not answers.is_set():
        said += "The others could not be asked: the store that made the group does not answer. "
    elif missing:
        said += f"No sign of {_listed(missing)} within {_ROLL_CALL_SECONDS:g} s. "
    return said


def _resolve(name: str) -> ProcessGroup:
    from torch._C._distributed_c10d import _resolve_process_group  # not in every build of torch

    group: ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return group

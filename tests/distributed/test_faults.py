"""Promise 6 where processes fail: who is left gets an error that says where, who and what.

Every fault happens to a real process of three. None of the others may hang, be ended by a signal or
go on with wrong numbers.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normally.functional import batch_norm
from normally.nn import SyncBatchNorm
from tests.distributed.launch import Outcome, run

SIZE = 3
#: The rank that the fault happens to: not the first, which others wait for.
FAULTY = 1
OTHERS = [0, 2]
#: What a process ends with that dies.
DEATH = 7
#: Of the group's collectives, in seconds, where somebody is waited for in vain.
TIMEOUT = 4.0
#: Where nobody is: a slow machine may take its time.
GENEROUS = 30.0
#: The launcher's: nobody should come near it, who does hangs.
PATIENCE = 60.0
DEBUG = {"NORMALLY_DISTRIBUTED_DEBUG": "1"}
#: What errors call the layers.
FIRST = "SyncBatchNorm at first of Net"
SECOND = "SyncBatchNorm at second of Net"


class Net(nn.Module):
    """Two layers of one size: their messages differ in nothing but the fingerprint."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SyncBatchNorm(4)
        self.second = SyncBatchNorm(4)
        self.order = ["first", "second"]
        #: What happens between them.
        self.between: Callable[[Tensor], Tensor] = torch.Tensor.clone

    def forward(self, input: Tensor) -> Tensor:
        """The layers in their order."""
        before, after = self.order
        output: Tensor = getattr(self, after)(self.between(getattr(self, before)(input)))
        return output


def _die(input: Tensor) -> Tensor:
    os._exit(DEATH)


def _hang(input: Tensor, folder: Path) -> Tensor:
    """Until all others have their error: they cannot have it from a lost connection."""
    while len(list(folder.iterdir())) < len(OTHERS):
        time.sleep(0.05)
    os._exit(DEATH)


def _widen(input: Tensor) -> Tensor:
    return torch.cat((input, input), 1)[:, :5]


def _spoil(net: Net, fault: str, folder: Path) -> None:
    """Let the fault happen between the layers."""
    if fault == "die":
        net.between = _die
    elif fault == "hang":
        net.between = functools.partial(_hang, folder=folder)
    elif fault == "channels":
        net.second, net.between = SyncBatchNorm(5), _widen
    elif fault == "dtype":
        net.second, net.between = SyncBatchNorm(4, dtype=torch.float64), torch.Tensor.double
    elif fault == "eps":
        net.second.eps = 1e-3
    elif fault == "order":
        net.order.reverse()
    elif fault == "skip":
        net.order = ["first", "first"]
    else:
        raise ValueError(fault)


def _train(rank: int, fault: str, orders: str, folder: Path) -> None:
    """A step for every letter of `orders`, "b" with the layers reversed; the last with the fault.

    A fault "… in backward" happens between the last step's forward and its backward.
    """
    net = Net()
    try:
        for step, order in enumerate(orders):
            faulty = rank == FAULTY and step == len(orders) - 1
            net.order = ["first", "second"] if order == "a" else ["second", "first"]
            if faulty and "backward" not in fault:
                _spoil(net, fault, folder)
            y = net(torch.randn(2, 4, 3, requires_grad=True))
            if faulty and "backward" in fault:
                _spoil(net, fault.split()[0], folder)
                net.between(y)
            y.square().sum().backward()
    except BaseException:
        (folder / str(rank)).touch()
        raise


def _suffer(
    fault: str, orders: str, folder: Path, debug: bool = False, group_timeout: float = TIMEOUT
) -> list[Outcome]:
    """What becomes of all; whom nothing happened to has ended by itself, with an exception."""
    outcomes = run(
        SIZE, _train, fault, orders, folder,
        timeout=PATIENCE, group_timeout=group_timeout, environment=DEBUG if debug else None,
    )  # fmt: skip
    for o in outcomes:
        assert not o.hung, f"rank {o.rank} hangs"
        if o.rank in OTHERS:
            assert o.exitcode == 1, f"rank {o.rank} ended with {o.exitcode}: {o.error}"
            assert o.error is not None
    return outcomes


def _first_line(outcome: Outcome) -> str:
    assert outcome.error is not None
    return outcome.error.split("\nTraceback")[0]


# --- who cannot answer


@pytest.mark.parametrize(
    ("orders", "debug"),
    [("a", False), ("aaa", False), ("aaa", True)],
    ids=["first step", "later", "later, debug"],
)
@pytest.mark.parametrize("fault", ["die", "hang"])
def test_who_dies_or_hangs_is_reported(
    fault: str, orders: str, debug: bool, tmp_path: Path
) -> None:
    outcomes = _suffer(fault, orders, tmp_path, debug)
    assert outcomes[FAULTY].exitcode == DEATH
    for o in (outcomes[rank] for rank in OTHERS):
        _check_report(o, SECOND)


@pytest.mark.parametrize("fault", ["die in backward", "hang in backward"])
def test_who_dies_or_hangs_before_a_backward_is_reported(fault: str, tmp_path: Path) -> None:
    outcomes = _suffer(fault, "aaa", tmp_path)
    assert outcomes[FAULTY].exitcode == DEATH
    for o in (outcomes[rank] for rank in OTHERS):
        _check_report(o, SECOND)
        assert "backward" in _first_line(o)


def _check_report(outcome: Outcome, layer: str) -> None:
    text = _first_line(outcome)
    assert text.startswith("RuntimeError: batch_norm: "), text
    assert f"{layer} on rank {outcome.rank} could not exchange" in text
    assert "with the ranks 0, 1, 2" in text
    assert f"timeout is {TIMEOUT:g} s" in text
    # Whoever else is not heard of in time may be in the list as well, but this one must be.
    missing = re.search(r"No sign of ([\d, ]+) within", text)
    assert missing is not None, text
    assert str(FAULTY) in missing[1].split(", ")


# --- who calls otherwise

DIFFERENCES = {
    "channels": ("4 channels", "5 channels"),
    "dtype": ("float32", "float64"),
    "eps": ("eps=1e-05", "eps=0.001"),
}


@pytest.mark.parametrize(
    ("orders", "debug"),
    [("a", False), ("a", True), ("aaa", True)],
    ids=["first step", "first step, debug", "later, debug"],
)
@pytest.mark.parametrize("fault", list(DIFFERENCES))
def test_who_calls_otherwise_is_refused_by_all(
    fault: str, orders: str, debug: bool, tmp_path: Path
) -> None:
    usual, other = DIFFERENCES[fault]
    for o in _suffer(fault, orders, tmp_path, debug, GENEROUS):
        others_words, own_words = _two_calls(o)
        assert SECOND in others_words
        assert SECOND in own_words
        assert usual in others_words
        assert other in own_words


@pytest.mark.parametrize(
    ("fault", "orders", "debug", "expected", "found"),
    [
        ("order", "a", False, FIRST, SECOND),
        ("order", "aaa", True, FIRST, SECOND),
        ("skip", "a", False, SECOND, FIRST),
        ("skip", "aaa", True, SECOND, FIRST),
        # All have gone from each order to each: nobody asks, as the messages are of one size, and
        # the fingerprints tell.
        ("order", "aabaa", False, FIRST, SECOND),
    ],
)
def test_who_is_in_another_layer_is_refused_by_all(
    fault: str, orders: str, debug: bool, expected: str, found: str, tmp_path: Path
) -> None:
    for o in _suffer(fault, orders, tmp_path, debug, GENEROUS):
        others_words, own_words = _two_calls(o)
        assert expected in others_words
        assert found in own_words


def _call_in_order(rank: int) -> None:
    """Channels of 4, then of 5 or 6: at last the faulty process does what it did before, too."""
    group = torch.distributed.group.WORLD
    for step, other in enumerate((5, 6, 5)):
        if rank == FAULTY and step == 2:
            other = 6
        for channels in (4, other):
            batch_norm(torch.randn(2, channels), None, None, training=True, group=group)


def test_who_goes_another_known_way_is_refused_by_all() -> None:
    """Messages of other sizes would end the processes inside of gloo."""
    for o in run(SIZE, _call_in_order, timeout=PATIENCE, group_timeout=GENEROUS):
        others_words, own_words = _two_calls(o)
        assert "5 channels" in others_words
        assert "6 channels" in own_words


def _two_calls(outcome: Outcome) -> tuple[str, str]:
    """What the others called, and what the faulty rank did."""
    assert outcome.exitcode == 1
    text = _first_line(outcome)
    assert text.startswith("ValueError: batch_norm: all processes of a group must"), text
    found = re.search(r"Got ranks 0, 2: (.*); rank 1: (.*)", text)
    assert found is not None, text
    return found[1], found[2]


@pytest.mark.parametrize("fault", ["channels", "order", "skip"])
def test_in_a_later_step_no_message_is_taken_for_another(fault: str, tmp_path: Path) -> None:
    # The faulty rank alone asks whether all make this call; the others know theirs. Both wait
    # until the timeout, and the report has all that is known without the debug mode.
    for o in _suffer(fault, "aaa", tmp_path):
        assert o.exitcode == 1
        text = _first_line(o)
        assert text.startswith("RuntimeError: batch_norm: "), text
        assert f"on rank {o.rank} could not exchange" in text
        assert "NORMALLY_DISTRIBUTED_DEBUG=1" in text
        # What the others were at, from the store: that is what differed.
        usual, other = LATER[fault]
        assert f"The call is {(other if o.rank == FAULTY else usual).rpartition(': ')[2]}" in text
        if o.rank == FAULTY:
            assert re.search(f"Rank [02] failed at .*{re.escape(usual)}", text), text
        else:
            assert re.search(f"Rank {FAULTY} failed at .*{re.escape(other)}", text), text


#: What the others were at in the end, and the faulty rank.
LATER = {
    "channels": ("forward of 4 channels", "forward of 5 channels"),
    "order": (f"{FIRST}: forward", f"{SECOND}: forward"),
    "skip": (f"{SECOND}: forward", f"{FIRST}: forward"),
}


def _lose_the_store(rank: int) -> str:
    """The first process, which hosts the store, dies; what the other hears."""
    layer = SyncBatchNorm(4)
    layer(torch.randn(2, 4))
    if rank == 0:
        os._exit(DEATH)
    try:
        layer(torch.randn(2, 4))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_where_the_store_is_lost_nobody_is_called_missing() -> None:
    _, other = run(2, _lose_the_store, timeout=PATIENCE, group_timeout=TIMEOUT, tcp=True)
    assert "The others could not be asked" in other.value
    assert "No sign of" not in other.value


def _go_on(rank: int) -> tuple[str, Tensor]:
    """What a process hears in the second of three steps, and its statistics after them."""
    net, said = Net(), ""
    for step in range(3):
        net.order = ["first", "second"]
        if rank == FAULTY and step == 1:
            net.order.reverse()
        try:
            net(torch.randn(2, 4, 3)).sum()
        except ValueError as error:
            said = str(error)
    return said, torch.stack([b for n, b in net.state_dict().items() if "running" in n])


def test_all_can_go_on_after_a_refusal() -> None:
    """It left no message behind, and no buffer that had moved."""
    found = run(SIZE, _go_on, timeout=PATIENCE, environment=DEBUG)
    for o in found:
        assert o.error is None
        assert "Got ranks 0, 2: " in o.value[0]
        assert torch.equal(o.value[1], found[0].value[1])

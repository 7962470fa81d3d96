"""LazyInstanceNorm1d, 2d, 3d: `num_features` from the first input."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from normally import nn
from tests.helpers import assert_same_bits, values
from tests.nn.layer_checks import check_signature
from tests.nn.test_instance_norm import NAMES, SHAPES


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_classes(name: str) -> None:
    ours, theirs = getattr(nn, f"Lazy{name}"), getattr(torch.nn, f"Lazy{name}")
    check_signature(ours, theirs, ("act", "act_param"))
    assert isinstance(ours(), theirs)
    assert repr(ours()) == repr(theirs())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_becomes_the_layer(name: str, affine: bool, track: bool, batched: bool) -> None:
    lazy = getattr(nn, f"Lazy{name}")(affine=affine, track_running_stats=track, act="relu")
    layer = getattr(nn, name)(3, affine=affine, track_running_stats=track, act="relu")
    x = values(SHAPES[name], torch.float32)
    x = x if batched else x[0]
    assert_same_bits(lazy(x), layer(x))
    assert type(lazy) is getattr(nn, name)
    assert repr(lazy) == repr(layer)
    assert list(lazy.state_dict()) == list(layer.state_dict())
    for key, value in layer.state_dict().items():
        assert_same_bits(lazy.state_dict()[key], value, key)
    assert lazy.skipped_updates.item() == 0


def test_without_bias() -> None:
    lazy = nn.LazyInstanceNorm2d(bias=False)
    lazy(values(SHAPES["InstanceNorm2d"], torch.float32))
    assert [name for name, _ in lazy.named_parameters()] == ["weight"]
    assert repr(lazy) == repr(nn.InstanceNorm2d(3, affine=True, track_running_stats=True,
                                                bias=False))  # fmt: skip


def test_a_state_dict_comes_first() -> None:
    layer = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    x = values((6, 3, 4), torch.float32)
    layer(x)
    lazy = nn.LazyInstanceNorm1d()
    lazy.load_state_dict(layer.state_dict())
    assert_same_bits(lazy.eval()(x), layer.eval()(x))


def test_copied_after_the_first_input() -> None:
    x = values((6, 3, 4), torch.float32)
    lazy = nn.LazyInstanceNorm1d()
    lazy(x)
    assert_same_bits(copy.deepcopy(lazy)(x), lazy(x))


def test_an_input_of_another_rank_is_refused_and_the_next_one_may_be_right() -> None:
    lazy = nn.LazyInstanceNorm2d()
    with pytest.raises(ValueError, match="expected 3D or 4D input"):
        lazy(torch.randn(3, 4))
    lazy(torch.randn(2, 3, 4, 4))
    assert lazy.num_features == 3


def test_no_warning_without_parameters() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.LazyInstanceNorm1d(affine=False, track_running_stats=False)(torch.randn(2, 3, 4))


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match=r"^LazyInstanceNorm3d: act must be None or one of"):
        nn.LazyInstanceNorm3d(act="swish")

"""timm's architectures, one of each family: converted, fused, folded, and back."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import timm
import torch

from tests.models.architectures import Seen, walk


class Model(NamedTuple):
    """A model of a family, the size of its images, and what is found in it."""

    name: str
    size: int
    converted: int
    fused: int
    folded: int


#: Norms of all kinds in seconds. Counts are what is there: fewer mean a matcher that lost some.
QUICK = [
    Model("test_convnext", 64, 14, 0, 0),
    Model("test_vit", 160, 13, 0, 0),
    Model("test_mambaout", 64, 11, 0, 0),
    Model("test_byobnet", 64, 14, 4, 14),
    Model("starnet_s050", 64, 18, 1, 17),
    Model("test_coatnet", 160, 14, 0, 5),
    Model("mobilenetv3_small_050", 64, 34, 0, 34),
    Model("regnetx_002", 64, 44, 4, 44),
    Model("fasternet_t0", 64, 17, 13, 17),
    Model("pvt_v2_b0", 64, 30, 0, 0),
    Model("efficientvit_b0", 64, 27, 12, 26),
    Model("edgenext_xx_small", 64, 20, 0, 0),
    Model("levit_128s", 224, 52, 14, 50),
    Model("hrnet_w18_small", 64, 91, 73, 91),
]

#: Of every other family that has normalization one model and the size of its images, but those of
#: over 60 million parameters.
REST = [
    ("caformer_s18", 64), ("cait_xxs24_224", 224), ("coat_tiny", 224), ("convit_tiny", 224),
    ("convmixer_1024_20_ks9_p14", 64), ("cpubone_nano", 64), ("crossvit_tiny_240", 240),
    ("cs3darknet_focus_s", 64), ("csatv2", 64), ("cspnext_tiny", 64), ("davit_tiny", 64),
    ("deit_tiny_patch16_224", 224), ("dla34", 64), ("eca_botnext26ts_256", 256),
    ("efficientformer_l1", 224), ("efficientformerv2_s0", 224), ("efficientvim_m1", 64),
    ("efficientvit_m0", 224), ("ese_vovnet19b_slim_dw", 64), ("fastvit_t8", 64),
    ("focalnet_tiny_srf", 64), ("gcvit_xxtiny", 224), ("ghostnet_050", 64), ("gmlp_ti16_224", 224),
    ("hardcorenas_b", 64), ("hgnetv2_b0", 64), ("hiera_tiny_224", 224), ("iformer_t", 64),
    ("inception_next_atto", 64), ("inception_resnet_v2", 96), ("inception_v3", 96),
    ("inception_v4", 96), ("lcnetv2_small", 64), ("legacy_seresnet18", 64), ("legacy_xception", 64),
    ("lowformer_b0", 64), ("mobilevit_xxs", 64), ("mvitv2_tiny", 224), ("nest_tiny", 224),
    ("nextvit_small", 64), ("pit_xs_224", 224), ("rdnet_tiny", 64), ("repghostnet_050", 64),
    ("repvit_m1_0", 64), ("res2net50_26w_4s", 64), ("resnest26d", 64), ("resnet18", 64),
    ("resnetv2_18", 64), ("rexnet_100", 64), ("sam2_hiera_tiny", 64), ("selecsls42", 64),
    ("sequencer2d_s", 224), ("shvit_s1", 64), ("skresnet18", 64), ("swiftformer_xs", 224),
    ("swin_tiny_patch4_window7_224", 224), ("swinv2_cr_tiny_224", 224),
    ("swinv2_tiny_window8_256", 256), ("test_vit_relpos", 160), ("tiny_vit_5m_224", 64),
    ("tinynet_e", 64), ("tnt_s_legacy_patch16_224", 224), ("tresnet_m", 64),
    ("twins_svt_small", 224), ("visformer_tiny", 224), ("vit_tiny_patch16_dinov3_qkvb", 256),
    ("vit_tiny_r_s16_p8_224", 224), ("vitamin_small_224", 224), ("volo_d1_224", 224),
    ("xception41p", 64), ("xcit_nano_12_p8_224", 224),
]  # fmt: skip


@pytest.mark.parametrize("model", QUICK, ids=lambda model: model.name)
def test_families(model: Model) -> None:
    seen = seen_of(model.name, model.size)
    assert seen.fused is not None
    assert seen.folded is not None
    found = [len(report.changed) for report in (seen.converted, seen.fused, seen.folded)]
    assert found == [model.converted, model.fused, model.folded], (
        f"{seen.converted}\n{seen.fused}\n{seen.folded}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), REST)
def test_other_families(name: str, size: int) -> None:
    assert seen_of(name, size).converted.changed


def seen_of(name: str, size: int) -> Seen:
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    return walk(timm.create_model(name), {"x": images})

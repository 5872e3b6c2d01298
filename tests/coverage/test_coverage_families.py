"""One small network per family of timm, torchvision and pytorchvideo: what `make coverage` does for all of them."""

from __future__ import annotations

import pytest
import torch
from coverage_check import check

# Convolutions that become dynamic, of how many, at the smallest input that the network takes.
NETWORKS = {
    # Convolutions that read permuted tensors, at a batch of one.
    "torchvision:convnext_tiny": (22, 22),
    "timm:csatv2": (20, 52),
    "timm:davit_tiny": (24, 28),
    "timm:edgenext_xx_small": (17, 20),
    "timm:coatnet_pico_rw_224": (56, 58),
    "timm:caformer_s18": (34, 34),
    "timm:gcvit_xxtiny": (40, 49),
    # One per family.
    "timm:gernet_s": (42, 45),
    "timm:coat_lite_tiny": (18, 20),
    "timm:convnext_zepto_rms_ols": (35, 35),
    "timm:cpubone_nano": (28, 31),
    "timm:cs3darknet_focus_s": (31, 31),
    "timm:cspnext_tiny": (37, 37),
    "timm:densenetblur121d": (122, 122),
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn": (64, 69),
    "timm:dla46_c": (48, 49),
    "timm:efficientformerv2_s0": (71, 83),
    "timm:efficientnet_es_pruned": (49, 49),
    "timm:efficientvim_m1_dist": (31, 48),
    "timm:efficientvit_b0": (44, 50),
    "timm:efficientvit_m2": (80, 100),
    "timm:fasternet_t0": (44, 44),
    "timm:fastvit_t8": (52, 68),
    "timm:ghostnet_050": (79, 95),
    "timm:hardcorenas_a": (50, 51),
    "timm:hgnet_tiny": (39, 42),
    "timm:hrnet_w18_small": (91, 91),
    "pytorchvideo:efficient_x3d_s": (99, 116),
    "timm:inception_next_atto": (58, 64),
    "timm:inception_v3": (94, 94),
    "timm:lcnetv2_small": (37, 46),
    "timm:lowformer_b0": (48, 56),
    "timm:fbnetv3_b": (111, 124),
    "timm:mobilevit_xs": (31, 35),
    "timm:eca_nfnet_l0": (57, 57),
    "torchvision:raft_small": (53, 53),
    "timm:pvt_v2_b0": (16, 18),
    "timm:regnetx_002": (44, 44),
    "timm:repghostnet_050": (77, 95),
    "timm:repvit_m1": (95, 126),
    "timm:resnest14d": (26, 27),
    "timm:ecaresnet26t": (31, 31),
    "timm:resnetv2_18": (20, 21),
    "timm:rexnet_100": (62, 75),
    "torchvision:deeplabv3_mobilenet_v3_large": (64, 70),
    "timm:legacy_seresnet18": (26, 36),
    "timm:shvit_s1": (63, 77),
    "timm:skresnet18": (38, 44),
    "timm:starnet_s2": (60, 60),
    "timm:swiftformer_l1": (74, 79),
    "timm:tiny_vit_5m_224": (22, 27),
    "torchvision:mc3_18": (20, 20),
    "timm:visformer_tiny": (57, 57),
    "timm:eca_vovnet39b": (39, 39),
    "timm:legacy_xception": (72, 74),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NETWORKS)
def test_converted_and_equal(name):
    row = check(name)
    assert row["status"] == "ok", row
    assert (row["converted"], row["convs"]) == NETWORKS[name]
    assert row["converted"] + sum(row["skipped"].values()) == row["convs"] + row["other_convs"]
    assert 0 < row["lowest_macs"] < 0.75 * row["conv_macs"]
    assert row["covered"] >= 0.85


def test_no_convolution_to_convert():
    row = check("timm:naflexvit_base_patch16_gap")
    assert (row["status"], row["convs"]) == ("nothing to convert", 0)
    assert "it has no Conv2d or Conv3d modules" in row["error"]

"""One small network per family of timm, torchvision and pytorchvideo: what `make coverage` does for all of them."""

from __future__ import annotations

import pytest
import torch
from coverage_check import check

# Convolutions that become dynamic, of how many, at the smallest input that the network takes.
NETWORKS = {
    "timm:resnet18": (20, 20),
}
FEW_MACS = {"timm:vit_tiny_patch16_224"}


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

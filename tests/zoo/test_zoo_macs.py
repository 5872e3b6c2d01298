"""GFLOPs, parameters and shapes of the paper's networks, counted on networks without numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from redconvert import zoo
from redconvert.cost import dense_macs


def counted(name: str, shape: tuple[int, ...], part: str = "", **options: object) -> tuple[float, float]:
    """GMACs of one forward pass, and with two more per norm element (* in the table of the paper's networks)."""
    elements = 0

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    with torch.device("meta"):
        model, inputs = zoo.create(name, **options).eval(), torch.empty(shape)
        macs = dense_macs(model, inputs).by_module[part]
        for module in model.get_submodule(part).modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                module.register_forward_hook(count)
        model(inputs)
    return macs / 1e9, (macs + 2 * elements) / 1e9


def parameters(name: str, **options: object) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in zoo.create(name, **options).parameters())


@pytest.mark.parametrize(
    ("name", "shape", "pinned", "starred", "tolerance"),
    [
        ("r2plus1d_18", (1, 3, 8, 128, 128), None, 27.6, 0.01),
        ("r2plus1d_18", (1, 3, 16, 128, 128), None, 55.2, 0.01),
        ("r2plus1d_18", (1, 3, 32, 128, 128), None, 110.4, 0.01),
        ("i3d_v2", (1, 3, 16, 256, 256), None, 56.0, 0.01),
        ("i3d_kinetics", (1, 3, 64, 224, 224), 111.2, None, 0.01),
        ("x3d_m", (1, 3, 16, 256, 256), 6.20, 6.41, 0.01),
        ("tpn_r2plus1d_18", (1, 3, 8, 128, 128), 28.4, None, 0.02),
        ("tpn_r2plus1d_18", (1, 3, 16, 128, 128), 56.7, None, 0.02),
        ("corrnet_r2plus1d_18", (1, 3, 16, 128, 128), 60.8, None, 0.02),
        ("tsn_resnet50", (1, 3, 16, 224, 224), 65.8, None, 0.01),
        ("yowo_i3d", (1, 3, 16, 224, 224), 43.9, None, 0.01),
        ("yowo_x3d_m", (1, 3, 16, 224, 224), 5.75, None, 0.01),
    ],
)
def test_gflops_of_the_paper(
    name: str, shape: tuple[int, ...], pinned: float | None, starred: float | None, tolerance: float
) -> None:
    plain, with_norms = counted(name, shape)
    assert pinned is None or plain == pytest.approx(pinned, rel=tolerance)
    assert starred is None or with_norms == pytest.approx(starred, rel=tolerance)


def test_gflops_of_pspnet_are_its_encoders() -> None:
    plain, with_norms = counted("pspnet_resnet18", (1, 3, 224, 224), part="encoder")
    assert plain == pytest.approx(10.6, rel=0.01) and with_norms == pytest.approx(10.6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "shape", "gmacs"),
    [
        ("r2plus1d_18", (1, 3, 16, 128, 128), 55.043),
        ("i3d_v2", (1, 3, 16, 224, 224), 42.823),
        ("x3d_m", (1, 3, 16, 224, 224), 4.732),
        ("tpn_resnet50", (1, 3, 8, 224, 224), 41.233),
        ("corrnet_r2plus1d_18", (1, 3, 16, 128, 128), 60.504),
    ],
)
def test_gmacs_of_the_docstrings(name: str, shape: tuple[int, ...], gmacs: float) -> None:
    assert counted(name, shape)[0] == pytest.approx(gmacs, abs=2e-3)


def test_parameters() -> None:
    assert parameters("r2plus1d_18", num_classes=200) == pytest.approx(33.2e6, rel=0.01)
    assert parameters("i3d_v2", num_classes=0) == pytest.approx(12.3e6, rel=0.01)
    assert parameters("x3d_m") == 3_794_274  # pytorchvideo's
    assert parameters("tsn_resnet50", num_classes=200) == pytest.approx(23.9e6, rel=0.01)
    assert parameters("r2plus1d_18", midplanes="torchvision") == 31_505_325  # as torchvision's weights say


def test_midplanes_by_hand() -> None:
    with torch.device("meta"):
        model = zoo.create("r2plus1d_18")
    middle = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv3d) and m.kernel_size[1] in (3, 7)]
    # floor(27 ci co / (9 ci + 3 co)) for (64, 64), (64, 128), (128, 128), ...; torchvision has 45, and 230 twice.
    assert middle == [83, *[144] * 4, 230, *[288] * 3, 460, *[576] * 3, 921, *[1152] * 3]


@pytest.mark.parametrize(
    ("name", "shape", "output"),
    [
        ("i3d_v2", (2, 3, 16, 224, 224), (2, 1024, 2, 7, 7)),
        ("x3d_m", (2, 3, 16, 224, 224), (2, 192, 16, 7, 7)),
    ],
)
def test_features(name: str, shape: tuple[int, ...], output: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model, clips = zoo.create(name, num_classes=0).eval(), torch.empty(shape)
        assert model(clips).shape == model.features(clips).shape == output


@pytest.mark.parametrize("name", [name for name in zoo.list_models() if name != "i3d_kinetics"])
def test_the_example_shape_fits(name: str) -> None:
    with torch.device("meta"):
        model = zoo.create(name).eval()
        assert model(torch.empty(model.example_shape)).shape[0] == 1

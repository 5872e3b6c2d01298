"""Published weights, without a download: state dicts of the same names and shapes, from the networks they fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import redconvert.zoo.r2plus1d as r2plus1d_module
import redconvert.zoo.tpn as tpn_module
import redconvert.zoo.tsn as tsn_module
import redconvert.zoo.x3d as x3d_module
from redconvert import zoo
from redconvert.errors import RedconvertError
from redconvert.zoo import i3d_v2 as i3d_module


def randomized(model: nn.Module) -> nn.Module:
    """Norms with statistics and weights of their own, so that a swapped pair shows."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            for value in (module.weight.data, module.running_var):
                value.uniform_(0.5, 1.5, generator=generator)
            for value in (module.bias.data, module.running_mean):
                value.normal_(0, 0.1, generator=generator)
    return model.eval()


def run(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(*inputs)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-6 * b.abs().max())


def sums(tensors: list[Tensor]) -> list[float]:
    return sorted(float(tensor.double().sum()) for tensor in tensors)


# --- R(2+1)D -------------------------------------------------------------------------------------------------------


def test_torchvisions_r2plus1d_fits_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models.video import r2plus1d_18

    source = randomized(r2plus1d_18())
    monkeypatch.setitem(r2plus1d_module._PUBLISHED, "KINETICS400_V1", source.state_dict)
    clip = torch.randn(1, 3, 4, 24, 24)
    model = zoo.create("r2plus1d_18", weights="KINETICS400_V1", midplanes="torchvision")
    assert torch.equal(run(model, clip), run(source, clip))

    fewer = zoo.create("r2plus1d_18", weights="KINETICS400_V1", midplanes="torchvision", num_classes=7)
    assert fewer.fc.weight.shape == (7, 512)
    assert torch.equal(fewer.layer4[1].conv2[0][3].weight, source.layer4[1].conv2[0][3].weight)


def test_torchvisions_r2plus1d_is_refused_for_the_originals_widths(tmp_path: Path) -> None:
    with pytest.raises(RedconvertError, match=r"45 channels in the stem instead of 83.*midplanes='torchvision'"):
        zoo.create("r2plus1d_18", weights="KINETICS400_V1")
    torch.save(zoo.create("r2plus1d_18", midplanes="torchvision").state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(
        RedconvertError, match=r"not those of this network: 'stem\.0\.weight' has shape \(45, 3, 1, 7, 7\)"
    ):
        zoo.create("r2plus1d_18", weights=tmp_path / "theirs.pt")


def test_the_published_urls_are_the_libraries_own() -> None:
    from pytorchvideo.models.hub.x3d import checkpoint_paths
    from timm import list_pretrained
    from torchvision.models.video import R2Plus1D_18_Weights

    assert R2Plus1D_18_Weights.KINETICS400_V1.url.endswith("/r2plus1d_18-91a641e6.pth")
    assert checkpoint_paths["x3d_m"].endswith("/X3D_M.pyth")
    assert {f"resnet50.{tag}" for tag in tsn_module._TAGS.values()} <= set(list_pretrained("resnet50.*"))


# --- X3D -----------------------------------------------------------------------------------------------------------


def test_pytorchvideos_x3d_fits_key_by_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pytorchvideo.models.x3d import create_x3d

    source = randomized(create_x3d(input_clip_length=4, input_crop_size=64))  # X3D-M, for small clips
    torch.save({"model_state": source.state_dict()}, tmp_path / "X3D_M.pyth")
    clip = torch.randn(1, 3, 4, 64, 64)  # the one size at which this head of pytorchvideo's averages over everything
    model = zoo.create("x3d_m", weights=tmp_path / "X3D_M.pyth")
    assert close(run(model, clip).softmax(dim=1), run(source, clip))

    monkeypatch.setitem(x3d_module._PUBLISHED, "KINETICS400", source.state_dict)
    fewer = zoo.create("x3d_m", weights="KINETICS400", num_classes=7)
    assert fewer.blocks[5].proj.weight.shape == (7, 2048)
    assert torch.equal(fewer.blocks[5].pool.post_conv.weight, source.blocks[5].pool.post_conv.weight)
    headless = zoo.create("yowo_x3d_m", backbone_weights="KINETICS400").backbone
    assert torch.equal(run(headless, clip), run(nn.Sequential(*source.blocks[:5]), clip))


# --- I3D -----------------------------------------------------------------------------------------------------------


def test_googlenet_is_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import googlenet

    source = randomized(googlenet(weights=None, init_weights=False))
    monkeypatch.setattr(i3d_module, "_googlenet_weights", source.state_dict)
    model = zoo.create("i3d_v2", weights="IMAGENET1K_V1", num_classes=7).eval()

    # A clip that repeats one image answers as the image does, away from the ends, where time is padded with zeros.
    image = torch.randn(1, 3, 64, 64)
    clip = image[:, :, None].expand(-1, -1, 9, -1, -1)
    assert torch.allclose(run(model.stem[0], clip)[:, :, 4], run(source.conv1, image), atol=1e-5)
    features = torch.randn(1, 512, 6, 6)
    clip = features[:, :, None].expand(-1, -1, 3, -1, -1)
    assert torch.allclose(run(model.mixed_4c, clip)[:, :, 1], run(source.inception4b, features), atol=1e-4)
    # Every tensor of ours but the classifier's comes from one of theirs: summed over time, they hold the same numbers.
    ours = [value for key, value in model.state_dict().items() if not key.startswith("fc.")]
    theirs = [value for key, value in source.state_dict().items() if not key.startswith(("fc.", "aux"))]
    assert sums(ours) == pytest.approx(sums(theirs), abs=1e-4)


# --- ResNet-50 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["A1_IN1K", "IMAGENET1K_V2"])
def test_timms_resnet50_fits_key_by_key(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    source = randomized(timm.create_model("resnet50"))
    monkeypatch.setitem(tsn_module.PUBLISHED, weights, source.state_dict)
    clip = torch.randn(2, 3, 3, 32, 32)
    model = zoo.create("tsn_resnet50", weights=weights, num_classes=1000)
    frames = clip.transpose(1, 2).flatten(0, 1)
    assert close(run(model, clip), run(source, frames).view(2, 3, 1000).mean(dim=1))

    pyramid = zoo.create("tpn_resnet50", weights=weights, num_classes=7)
    assert tpn_module.PUBLISHED is tsn_module.PUBLISHED
    assert torch.equal(
        run(pyramid.backbone, frames), source.forward_head(source.forward_features(frames), pre_logits=True)
    )


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> dict[str, Tensor]:
        raise OSError("no route to host")

    monkeypatch.setitem(x3d_module._PUBLISHED, "KINETICS400", offline)
    with pytest.raises(RedconvertError, match=r"could not be downloaded: OSError: no route to host.*path of a file"):
        zoo.create("x3d_m", weights="KINETICS400")


def test_unknown_weights_suggest_the_nearest() -> None:
    with pytest.raises(RedconvertError, match=r"neither a known name nor a file. Did you mean 'KINETICS400'\?"):
        zoo.create("x3d_m", weights="kinetics_400")


@pytest.mark.parametrize(
    ("content", "says"), [(b"hello", "no readable file of weights"), ([1, 2], "holds no state dict")]
)
def test_a_file_without_weights(content: object, says: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(RedconvertError, match=says):
        zoo.create("x3d_m", weights=path)


def test_weights_of_another_network_change_nothing(tmp_path: Path) -> None:
    torch.save({"blocks.0.norm.weight": torch.ones(24), "x": torch.ones(1)}, tmp_path / "few.pt")
    with pytest.raises(RedconvertError, match=r"'blocks\.0\.conv\.conv_t\.weight' is missing \(and \d+ more\)"):
        zoo.create("x3d_m", weights=tmp_path / "few.pt")

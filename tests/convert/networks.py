"""The real networks that conversion must leave equal to the bit, at the smallest inputs that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from redconvert.inputs import as_arguments

Build = Callable[[], tuple[nn.Module, Any]]


def _torchvision(path: str, *shape: int, **options: Any) -> Build:
    def build() -> tuple[nn.Module, Any]:
        import torchvision

        return torchvision.models.get_model(path, weights=None, **options), torch.randn(shape)

    return build


def _timm(name: str, size: int = 64) -> Build:
    def build() -> tuple[nn.Module, Any]:
        import timm

        return timm.create_model(name, pretrained=False), torch.randn(2, 3, size, size)

    return build


def _x3d_m() -> tuple[nn.Module, Any]:
    from pytorchvideo.models.x3d import create_x3d

    model = create_x3d(input_clip_length=4, input_crop_size=64, depth_factor=2.2, model_num_class=11)
    return model, torch.randn(2, 3, 4, 64, 64)


def _slowfast() -> tuple[nn.Module, Any]:
    from pytorchvideo.models.slowfast import create_slowfast

    model = create_slowfast(model_num_class=11, head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2)))
    return model, [torch.randn(1, 3, 2, 64, 64), torch.randn(1, 3, 8, 64, 64)]


def _csn() -> tuple[nn.Module, Any]:
    from pytorchvideo.models.csn import create_csn

    return create_csn(model_num_class=11, head_pool_kernel_size=(1, 2, 2)), torch.randn(2, 3, 8, 64, 64)


def _i3d() -> tuple[nn.Module, Any]:
    from redconvert import zoo

    return zoo.create("i3d_kinetics", dropout=0.5), torch.randn(1, 3, 16, 224, 224)


NETWORKS: dict[str, Build] = {
    "r2plus1d_18": _torchvision("r2plus1d_18", 2, 3, 4, 48, 48),
    "r3d_18": _torchvision("r3d_18", 2, 3, 4, 48, 48),
    "s3d": _torchvision("s3d", 1, 3, 16, 224, 224),
    "deeplabv3_resnet50": _torchvision(
        "deeplabv3_resnet50", 2, 3, 65, 65, weights_backbone=None, aux_loss=True, num_classes=5
    ),
    "x3d_m": _x3d_m,
    "slowfast": _slowfast,
    "csn": _csn,
    "resnet50": _timm("resnet50"),
    "tf_efficientnet_lite0": _timm("tf_efficientnet_lite0"),
    "convnext_tiny": _timm("convnext_tiny"),
    "nf_resnet50": _timm("nf_resnet50"),
    "i3d_kinetics": _i3d,
}


def run(model: nn.Module, inputs: Any, *, training: bool = False) -> dict[str, Tensor]:
    """What a network returns, by name; always from the same seed, and never from a list that it changed."""
    torch.manual_seed(1)
    args, kwargs = as_arguments(list(inputs) if isinstance(inputs, list) else inputs)
    was_training = model.training
    model.train(training)
    try:
        with torch.no_grad():
            out = model(*args, **kwargs)
    finally:
        model.train(was_training)
    return dict(out) if isinstance(out, dict) else {"out": out}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a check before conversion must not touch."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "rng": torch.get_rng_state(),
    }


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    for key, value in before["state"].items():
        assert torch.equal(after["state"][key].nan_to_num(7.0), value.nan_to_num(7.0)), key
    assert torch.equal(after["rng"], before["rng"])
    for part in ("training", "classes", "attributes", "parameters"):
        assert after[part] == before[part], part
    return True

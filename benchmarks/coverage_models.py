"""Every network that the coverage run converts: its name, how it is built, and the smallest input it takes.

A network is built without the slow part of its initialisation and then filled with random numbers, so that no
output is zero or constant because an initialiser closed a branch (LayerScale, the last norm of a residual block):
two such outputs would be equal whatever conversion did.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Candidate", "all_names", "build", "candidates", "family", "library_of"]

# Later in the order: one of them takes as long as a hundred others.
LARGE = re.compile(
    r"\db_|_\db|giant|gigantic|enormous|huge|so400m|so150m|xxlarge|x4_bit|x2_bit|32x48d|32x32d|_1280|_2560|efficientnet_(l2|b8)|_xl_"
    r"|xlarge|coatnet_[3-5]|cait_m|maxvit_(large|rmlp)|nfnet_f[3-7]|300m|_l14|large_patch1[46]|c320|c288|_448$|_512$|_560$|_384$"
)

# After the others (mostly a patch embedding and no more).
FEW = re.compile(
    r"^(vit|eva|beit|deit|swin|mixer|gmlp|gmixer|resmlp|cait|xcit|volo|flexivit|naflexvit|samvit|aimv2|crossvit|pit_|tnt|test_vit"
    r"|twins|hiera|sam2|nest|convit|qwen|gemma|deepseek|sequencer|levit_\d+$|mvitv2|davit|focalnet|csatv2)"
)


@dataclass(frozen=True)
class Candidate:
    """One way to build and feed a network; the first that runs is taken.

    Attributes:
        shape: of the input, for the table.
        options: keyword arguments of the builder.
        inputs: makes the example inputs.
    """

    shape: Any
    inputs: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)


def library_of(name: str) -> str:
    return name.partition(":")[0]


def all_names() -> list[str]:
    """``library:model``: one of each family, then the second of each, and so on, and large ones after those.

    All with few convolutions follow, in the same order.
    """
    vision = [name for names in _torchvision_names().values() for name in names]
    libraries = {"timm": _timm_names(), "torchvision": vision, "pytorchvideo": _pytorchvideo_names()}
    seen: Counter[str] = Counter()
    order = {}
    for name in (f"{library}:{model}" for library, models in libraries.items() for model in models):
        model, kin = name.partition(":")[2], family(name)
        seen[kin] += 1
        order[name] = (bool(FEW.search(model)), bool(LARGE.search(model)), seen[kin])
    return sorted(order, key=order.__getitem__)


def family(name: str) -> str:
    """timm's module, torchvision's task, or pytorchvideo's hub."""
    library, _, model = name.partition(":")
    if library == "timm":
        from timm.models import model_entrypoint

        return model_entrypoint(model).__module__.rpartition(".")[2]
    if library == "torchvision":
        return _torchvision_tasks()[model]
    return "hub"


def candidates(name: str) -> list[Candidate]:
    """Ways to build and feed the network, the cheapest first."""
    library, _, model = name.partition(":")
    return {"timm": _timm, "torchvision": _torchvision, "pytorchvideo": _pytorchvideo}[library](model)


def build(name: str, options: dict[str, Any]) -> nn.Module:
    """The network with random weights, in ``eval()``."""
    library, _, model = name.partition(":")
    with _without_initialisers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            import timm

            network = timm.create_model(model, pretrained=False, **options)
        elif library == "torchvision":
            from torchvision import models

            builder = models.get_model_builder(model)
            if "weights_backbone" in inspect.signature(builder).parameters:
                options = {"weights_backbone": None, **options}
            network = builder(weights=None, **options)
        else:
            from pytorchvideo.models import hub

            network = getattr(hub, model)(pretrained=False, **options)
    fill(network)
    return network.eval()


# -- timm ----------------------------------------------------------------------------------------------


def _timm_names() -> list[str]:
    import timm

    return timm.list_models()


def _timm(model: str) -> list[Candidate]:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(model)
    default = tuple(config.input_size)
    least = max(config.min_input_size[-2:]) if config.min_input_size else 0
    found = []
    if config.fixed_input_size:  # the size is an argument, and must suit patches of 14 or 16 and windows of 7 or 8
        for size in (64, 112, 128):
            if least <= size < min(default[1:]):
                found.append(_image((default[0], size, size), {"img_size": size}))
    else:
        found += [_image((default[0], size, size)) for size in (64, 96, 128) if least <= size < min(default[1:])]
    return [*found, _image(default)]


def _image(shape: tuple[int, ...], options: dict[str, Any] | None = None) -> Candidate:
    whole = (1, *shape)
    return Candidate(whole, lambda: _random(whole), options or {})


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 0.5


# -- torchvision ---------------------------------------------------------------------------------------


def _torchvision_names() -> dict[str, list[str]]:
    from torchvision import models

    return {
        "classification": models.list_models(module=models),
        "segmentation": models.list_models(module=models.segmentation),
        "video": models.list_models(module=models.video),
        "detection": models.list_models(module=models.detection),
        "optical flow": models.list_models(module=models.optical_flow),
    }


@functools.cache
def _torchvision_tasks() -> dict[str, str]:
    return {name: task for task, names in _torchvision_names().items() for name in names}


def _torchvision(model: str) -> list[Candidate]:
    task = family(f"torchvision:{model}")
    if task == "detection":
        return [_detection(model)]
    if task == "optical flow":
        shape = (1, 3, 128, 128)
        return [Candidate([shape, shape], lambda: (_random(shape), _random(shape).flip(3), 2))]
    if task == "video":
        clips = [(1, 3, 8, 64, 64), (1, 3, 16, 224, 224)]
        return [Candidate(clip, lambda clip=clip: _random(clip)) for clip in clips]  # type: ignore[misc]
    sizes = (64, 96, 128, 224, 299)
    if model.startswith("vit_"):
        return [_image((3, size, size), {"image_size": size}) for size in (64, 112)]
    return [_image((3, size, size)) for size in sizes]


def _detection(model: str) -> Candidate:
    """Low thresholds, or random weights detect nothing and there is nothing to compare."""
    size = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(model, 128)
    prefix = "box_" if "rcnn" in model else ""
    options: dict[str, Any] = {f"{prefix}score_thresh": 0.0}
    if not model.startswith("ssd"):
        options |= {"min_size": size, "max_size": size}
    shape = (3, size, size)
    return Candidate([(3, size, size)], lambda: ([_random(shape)],), options)


# -- pytorchvideo --------------------------------------------------------------------------------------


def _pytorchvideo_names() -> list[str]:
    from pytorchvideo.models import hub

    return [key for key, value in vars(hub).items() if inspect.isfunction(value) and not key.startswith("_")]


def _pytorchvideo(model: str) -> list[Candidate]:
    """Heads pool over a fixed window, so only the usual sizes run."""
    boxes = (torch.tensor([[0.0, 20.0, 30.0, 150.0, 200.0]]),) if model.endswith("detection") else ()
    if model.startswith("slowfast"):
        pairs = [(8, 32), (16, 64)]
        shapes = [[(1, 3, slow, 224, 224), (1, 3, fast, 224, 224)] for slow, fast in pairs]
        return [Candidate(pair, lambda pair=pair: ([_random(s) for s in pair], *boxes)) for pair in shapes]  # type: ignore[misc]
    clips = [
        *((1, 3, 4, size, size) for size in (160, 182)),
        *((1, 3, frames, 224, 224) for frames in (4, 8, 13, 16, 32)),
        (1, 3, 16, 312, 312),
        (1, 3, 224, 224),
    ]
    return [Candidate(clip, lambda clip=clip: (_random(clip), *boxes)) for clip in clips]  # type: ignore[misc]


# -- weights -------------------------------------------------------------------------------------------

_SLOW = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.clamp_}
_SLOW |= {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
_POOL = 1 << 22
SHARED_FROM = 200_000_000  # parameters from which layers of one shape share their numbers: less to write and to hold


class _Skip(TorchFunctionMode):
    """Initialisers leave large parameters as they are: `fill` follows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if func in _SLOW and isinstance(target, nn.Parameter) and target.numel() > 4096:
            return target
        return func(*args, **kwargs)


@contextlib.contextmanager
def _without_initialisers() -> Iterator[None]:
    with _Skip():
        yield


@torch.no_grad()
def fill(network: nn.Module, gain: float = 1.0) -> None:
    """Random numbers for every parameter: matrices keep the variance of what they multiply, vectors stay away from 0.

    Args:
        network: changed in place.
        gain: of matrices.
    """
    pool = torch.rand(_POOL, generator=torch.Generator().manual_seed(1)).mul_(2).sub_(1)
    shared = sum(parameter.numel() for parameter in network.parameters()) > SHARED_FROM
    cache: dict[tuple[int, ...], Tensor] = {}
    offset = 0
    for name, parameter in network.named_parameters():
        if not parameter.is_floating_point() or isinstance(parameter, nn.UninitializedParameter):
            continue
        if parameter.dim() < 2:
            _fill_vector(name, parameter, pool)
            continue
        key = tuple(parameter.shape)
        if shared and key in cache:
            parameter.data = cache[key]
            continue
        fan_in = parameter[0].numel()
        scale = min(gain * math.sqrt(3 / fan_in), 0.5)
        _fill_from(parameter.data.view(-1) if parameter.is_contiguous() else parameter.data, pool, scale, offset)
        offset = (offset + 7919) % (_POOL // 2)
        cache[key] = parameter.data


def _fill_from(flat: Tensor, pool: Tensor, scale: float, offset: int) -> None:
    if flat.dim() != 1:
        flat.uniform_(-scale, scale)
        return
    step = _POOL // 2
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        torch.mul(pool[offset : offset + part.numel()], scale, out=part)


def _fill_vector(name: str, parameter: nn.Parameter, pool: Tensor) -> None:
    noise = pool[: parameter.numel()].view_as(parameter)
    leaf = name.rpartition(".")[2]
    if leaf == "bias" or leaf.endswith(("_bias", "beta")):
        parameter.copy_(0.1 * noise)
    elif parameter.numel() > 1:
        parameter.copy_(0.75 + 0.25 * noise)
    elif parameter.abs().item() < 1e-2:  # a closed branch
        parameter.fill_(0.5)

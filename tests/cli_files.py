"""Files and networks that command-line tests are run on."""

from pathlib import Path

import pytest

av = pytest.importorskip("av")
images = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")

NETS = '''
import torch
from torch import nn

def net(conv, norm, pool):
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 16, 3, padding=1), norm(16), nn.ReLU(), conv(16, 32, 3, padding=1), norm(32),
                         nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(32, 5))

def video():
    return net(nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d)

def vivid():
    """Whose answers to noise differ."""
    model = video()
    model[-1].weight.data.mul_(300)
    return model

def image():
    return net(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d)

def grey():
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU())
'''


def write_video(path: Path, frames: int = 10, seed: int = 0) -> Path:
    """Noise, lossless, 24 x 32 pixels, 25 frames per second."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "bgr0"
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_image(path: Path, height: int = 20, width: int = 20, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    images.fromarray(pixels).save(path)
    return path


def fill(folder: Path) -> None:
    """nets.py, three videos in clips/ and four images in pictures/."""
    (folder / "nets.py").write_text(NETS)
    (folder / "clips" / "deep").mkdir(parents=True)
    (folder / "pictures").mkdir()
    for i, name in enumerate(("a.avi", "b.mkv", "deep/c.avi")):
        write_video(folder / "clips" / name, seed=i)
    for i, name in enumerate(("a.png", "b.png", "c.PNG", "d.jpg")):
        write_image(folder / "pictures" / name, seed=i)

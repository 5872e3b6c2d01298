"""Whether what a gate reads tells hard images from easy ones: ResNet-56 on CIFAR-10 at half of its multiply-adds.

    python benchmarks/difficulty.py --data FOLDER --plot difficulty.png    # see benchmarks/cifar.py for the folder

The network computes mixtures of filters of mixtures of its inputs, calibrated and set to a budget without training. An
image is hard where its answer is not the dense network's. For each convolution, a small network of a gate's shape reads
what its gate reads, the mean of its input over H and W, and learns from 6,000 images without labels how unsure the
answer will be. The area under the ROC curve, over 4,000 other images, says how well it finds the hard ones (0.5: not at
all), beside that of the answer's own margin, which `redconvert.cascade` goes by.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from asking import answers
from cifar import MIXED, calibration_batches, convert, images, resnet56
from common import RESULTS, environment, write
from plots import difficulty_against_depth
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

import redconvert
from redconvert.cascade import margin
from redconvert.layers.modes import dynamic_layers

HIDDEN, EPOCHS, BATCH = 32, 40, 128
DECAYS = (0.01, 0.3, 3.0)  # of the weights; the best for the last fifth of the images learned from is kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=1000, help="for calibration")
    parser.add_argument("--test-images", type=int, default=4000, help="the first; the others are learned from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "difficulty.json")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = resnet56(arguments.data)
    batches = calibration_batches(arguments.data, arguments.images)
    dynamic = convert(model, **MIXED)
    redconvert.calibrate(dynamic, batches)
    redconvert.set_budget(dynamic, arguments.budget, batches[:3])
    redconvert.calibrate(dynamic, batches, decisions="gates")

    pixels, _ = images(arguments.data, "test")
    test, learned = pixels[: arguments.test_images], pixels[arguments.test_images :]
    scores, read = answers_and_means(dynamic, test)
    unsure, known = answers_and_means(dynamic, learned)
    hard = scores.argmax(1) != answers(model, test).argmax(1)
    result: dict[str, Any] = {
        "what": __doc__.split("\n")[0],
        "budget": arguments.budget,
        "images": {"calibration": arguments.images, "learned": len(learned), "test": len(test)},
        "hard": round(float(hard.double().mean()), 4),
        "margin": round(float(binary_auroc(-margin(scores), hard.long())), 4),
        "gates": {},
    }
    for name, means in read.items():
        found = predicted(known[name], -margin(unsure), means, arguments.seed)
        result["gates"][name] = round(float(binary_auroc(found, hard.long())), 4)
    write(result | environment(arguments.seed), arguments.out)
    print(json.dumps(result, indent=2))
    if arguments.plot:
        difficulty_against_depth(result, arguments.plot)


@torch.no_grad()
def answers_and_means(dynamic: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores ``(N, classes)``, and by dynamic convolution, in their order, what its gate reads, ``(N, C)``."""
    means: dict[str, list[Tensor]] = defaultdict(list)

    def listen(name: str, given: Tensor) -> None:
        means[name].append(given.mean((2, 3)))

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: listen(name, args[0]))
        for name, layer in dynamic_layers(dynamic).items()
    ]
    scores = answers(dynamic, x)
    for hook in hooks:
        hook.remove()
    return scores, {name: torch.cat(parts) for name, parts in means.items()}


def predicted(known: Tensor, wanted: Tensor, read: Tensor, seed: int) -> Tensor:
    """What a network of a gate's shape, taught by least squares what is ``wanted`` of ``known``, says of ``read``."""
    mean, std = known.mean(0), known.std(0) + 1e-6
    known, read, few = (known - mean) / std, (read - mean) / std, len(known) * 4 // 5
    tried = []
    for decay in DECAYS:
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(known.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1), nn.Flatten(0))
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=decay)
        for _ in range(EPOCHS):
            for chosen in torch.randperm(few).split(BATCH):
                optimizer.zero_grad()
                F.mse_loss(network(known[chosen]), wanted[chosen]).backward()
                optimizer.step()
        with torch.no_grad():
            missed = float(F.mse_loss(network(known[few:]), wanted[few:]))
            tried.append((missed, network(read)))
    return min(tried, key=lambda pair: pair[0])[1]


if __name__ == "__main__":
    main()

"""redconvert in a training loop of your own: no Trainer, no labels file, no downloads; about a minute on a laptop.

    python examples/your_own_loop.py [--epochs 6] [--target 0.6]

The task is made up on the spot: a bright square moves left, right, up or down through noise, or stands still.
First a small 3D network learns it. Then it becomes dynamic and learns when to compute less. Everything redconvert
needs from your loop is marked with (1) to (5).
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import redconvert

DIRECTIONS = torch.tensor([[0, 0], [0, 1], [0, -1], [1, 0], [-1, 0]])
FRAMES, SIZE, SQUARE = 8, 24, 6


def moving_squares(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips ``(count, 3, 8, 24, 24)`` and the direction of each, ``(count)``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    clips = 0.3 * torch.randn(count, 3, FRAMES, SIZE, SIZE, generator=generator)
    starts = torch.randint(FRAMES, SIZE - SQUARE - FRAMES, (count, 2), generator=generator)
    for clip, start, direction in zip(clips, starts.tolist(), DIRECTIONS[labels].tolist(), strict=True):
        for t in range(FRAMES):
            top, left = start[0] + t * direction[0], start[1] + t * direction[1]
            clip[:, t, top : top + SQUARE, left : left + SQUARE] += 1
    return clips, labels


def small_network() -> nn.Module:
    """Four 3x3x3 convolutions with norms."""
    widths, layers = [3, 16, 32, 32, 32], []
    for i, (before, after) in enumerate(pairwise(widths)):
        conv = nn.Conv3d(before, after, 3, stride=(1, 2, 2) if i == 1 else 1, padding=1, bias=False)
        layers += [conv, nn.BatchNorm3d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d((FRAMES, 1, 1)), nn.Flatten(), nn.Linear(32 * FRAMES, 5))


def accuracy(model: nn.Module, clips: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(clips).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--target", type=float, default=0.6, help="wished share of the dense multiply-adds")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, test = moving_squares(512, seed=1), moving_squares(200, seed=2)

    model = small_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(8):  # the pretrained network that you have already
        model.train()
        for index in torch.randperm(len(train[0])).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][index]), train[1][index]).backward()
            optimizer.step()
    print(f"dense: {accuracy(model, *test):.1%} right")

    dynamic = redconvert.convert(model, example_inputs=train[0][:1])  # (1) the same outputs, to the bit
    redconvert.calibrate(dynamic, [train[0][:128]])  # (2) no labels: cheap operations that rebuild well
    efficiency = redconvert.EfficiencyLoss(dynamic, target=arguments.target)  # (3) before the loop
    groups = redconvert.parameter_groups(dynamic, lr=5e-4, gate_lr=2e-2)  # (4) gates learn faster
    optimizer = torch.optim.AdamW(groups)
    for epoch in range(arguments.epochs):
        dynamic.train()
        costs = []
        for index in torch.randperm(len(train[0])).split(32):
            clips, labels = train[0][index], train[1][index]
            scores = dynamic(clips)
            loss = F.cross_entropy(scores, labels) + 10 * efficiency(scores, labels)  # (5) what computing costs
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            costs.append(float(efficiency.costs.mean()))
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {sum(costs) / len(costs):.0%} of the convolutions' MACs")

    print(f"dynamic: {accuracy(dynamic, *test):.1%} right")
    report = redconvert.report(dynamic, [test[0][:50]], time=False)
    print(f"{report.executed_macs / report.dense_macs:.0%} of the dense network's MACs, whole network, on test clips")
    for budget in (0.8, 0.6, 0.45):  # another budget, without training
        print(redconvert.set_budget(dynamic, budget, [train[0][:128]]))
        print(f"  {accuracy(dynamic, *test):.1%} right")


if __name__ == "__main__":
    main()

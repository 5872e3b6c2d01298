"""Structured pruning to compare with: smaller static networks, made by Torch-Pruning.

    pip install torch-pruning==1.6.1       # only the benchmarks need it

"depgraph" is DepGraph (Fang et al., CVPR 2023) as its own CIFAR script runs ``group_norm``: mean squared L2 norm
of everything that belongs to a channel, divided by the mean of its group, ranked over the whole network, in small
steps. Its sparsity training is left out, so that every row of a benchmark trains for equally many epochs. That can
starve a layer: of VGG-16's tenth convolution 12 of 512 channels stay at half of the MACs. Hence "depgraph_uniform":
the same norms, ranked within each group, one share for all groups.
"magnitude" is Li et al. (ICLR 2017): L1 norm of a channel's filter, ranked within the layer, one share for all
layers; where a residual addition ties layers together, the shortcut's convolution decides (in a stage without
one, the stem).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from redconvert.cost import dense_macs

METHODS = ("depgraph", "depgraph_uniform", "magnitude")
STEPS = 400  # as DepGraph's script: one step is 1/400 of all channels
TOLERANCE = 0.01  # the result lies at most so far below the target, as a share of the dense MACs


def prune(model: nn.Module, example: Tensor, share: float, method: str) -> tuple[nn.Module, float]:
    """A pruned copy in eval mode with at most `share` of the MACs (`dense_macs`), and the share that it has.

    Convolutions and linear layers lose output channels, the last linear layer none.
    """
    pruned = copy.deepcopy(model).eval()
    pruner, macs = _pruner(pruned, example, method), _Macs(pruned, example)
    dense, target = macs.total(), share * macs.total()
    while macs.total() > target:
        if pruner.current_step == STEPS:
            raise ValueError(f"{method} cannot go below {macs.total() / dense:.1%} of the MACs, asked for {share:.1%}")
        for group in pruner.step(interactive=True):
            # One channel of a whole ResNet stage can be worth more than the tolerance: then others must do.
            if macs.total() > target and macs.total(without=group) >= target - TOLERANCE * dense:
                group.prune()
    return pruned, dense_macs(pruned, example).total / dense


def _pruner(model: nn.Module, example: Tensor, method: str) -> Any:
    import torch_pruning

    if method in ("depgraph", "depgraph_uniform"):
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer="mean")
    elif method == "magnitude":
        importance = torch_pruning.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None)
    else:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    return torch_pruning.pruner.BasePruner(
        model,
        example,
        importance,
        global_pruning=method == "depgraph",
        pruning_ratio=1.0,  # every step goes further; `prune` stops at its target
        iterative_steps=STEPS,
        ignored_layers=[classifier],
    )


class _Macs:
    """MACs of a network that loses channels, from its widths: no forward pass per step. No grouped convolutions."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        counts = dense_macs(model, example).by_module
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
        # MACs of one output channel and one input channel
        self.of_pair = {layer: counts[name] // layer.weight.shape[:2].numel() for name, layer in layers.items()}

    def total(self, without: Sequence[tuple[Any, list[int]]] = ()) -> int:
        """As the network is, or as it would be `without` a group of torch_pruning."""
        lost = {(edge.target.module, edge.handler.__name__): len(indices) for edge, indices in without}
        return sum(
            macs
            * (layer.weight.shape[0] - lost.get((layer, "prune_out_channels"), 0))
            * (layer.weight.shape[1] - lost.get((layer, "prune_in_channels"), 0))
            for layer, macs in self.of_pair.items()
        )

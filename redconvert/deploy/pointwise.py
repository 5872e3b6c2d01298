"""Operations that treat every number alone, or two tensors number by number."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["CALLS", "MODULES", "PAIRWISE"]

MODULES = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Identity, nn.modules.dropout._DropoutNd)
CALLS = frozenset({F.relu, torch.relu, F.relu6, F.silu, F.hardswish, torch.sigmoid, "relu", "relu_", "sigmoid"})
PAIRWISE = frozenset({operator.add, operator.iadd, operator.mul, torch.add, torch.mul})

"""Phi_t: rebuilds skipped frames from those that were computed on both sides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .candidates import Candidates
from .gate import matching, one_hot

__all__ = ["FrameRebuild"]


class FrameRebuild(nn.Module):
    """Phi_t for each temporal candidate: per channel, from the computed frames on both sides.

    Frame ``s + d`` of the group that starts at computed frame s is
    ``weight[d-1, 0] * x_s + weight[d-1, 1] * x_(s+R) + bias[d-1]``; the last group, which has no
    frame to its right, reads ``x_s`` twice. It starts as a copy: weight (1, 0), bias 0.
    """

    def __init__(self, candidates: Candidates) -> None:
        super().__init__()
        self.strides = candidates.strides
        channels = candidates.channels[0]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for stride in self.strides[1:]:
            weight = torch.zeros(stride - 1, 2, channels)
            weight[:, 0] = 1
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(stride - 1, channels)))

    def extra_repr(self) -> str:
        return f"strides={self.strides}"

    def rebuild(self, index: int, computed: Tensor) -> list[Tensor]:
        """The dropped frames at each offset 1 to R - 1, each ``(N, C, T', H, W)`` like ``computed``."""
        following = torch.cat([computed[:, :, 1:], computed[:, :, -1:]], dim=2)
        weight, bias = (matching(each[index - 1], computed) for each in (self.weights, self.biases))
        weight, bias = (each.reshape(-1, each.shape[-1], 1, 1, 1) for each in (weight, bias))
        return [
            torch.addcmul(torch.addcmul(bias[d], computed, weight[2 * d]), following, weight[2 * d + 1])
            for d in range(len(bias))
        ]

    def single(self, z: Tensor, index: int, num_frames: int) -> Tensor:
        """Candidate ``index`` alone: its frames ``(N, C, T', H, W)`` -> ``(N, C, num_frames, H, W)``."""
        if index == 0:
            return z
        # Not divisible: the last group is shorter, and what is rebuilt past the end is cut off.
        return torch.stack([z, *self.rebuild(index, z)], dim=3).flatten(2, 3)[:, :, :num_frames]

    def matrices(self, num_frames: int) -> tuple[Tensor, Tensor]:
        """All candidates as linear maps over frames: ``E (S_t, C, T, T)`` and ``bias (S_t, C, T)``.

        ``E_j(z)_t = sum_s E[j, :, t, s] z_s + bias[j, :, t]``; the columns of dropped frames are 0.
        """
        maps, biases = [], []
        frames = torch.arange(num_frames, device=self.weights[0].device)
        channels = self.weights[0].shape[2]
        for stride, weight, bias in zip(self.strides, (None, *self.weights), (None, *self.biases), strict=True):
            left = frames // stride * stride
            right = torch.where(left + stride < num_frames, left + stride, left)
            ones, zeros = self.weights[0].new_ones(1, channels), self.weights[0].new_zeros(1, channels)
            if weight is None or bias is None:
                from_left, from_right, shift = ones, zeros, zeros
            else:
                from_left = torch.cat([ones, weight[:, 0]])
                from_right, shift = torch.cat([zeros, weight[:, 1]]), torch.cat([zeros, bias])
            offset = frames % stride
            maps.append(
                from_left[offset].T.unsqueeze(2) * one_hot(left, num_frames)
                + from_right[offset].T.unsqueeze(2) * one_hot(right, num_frames)
            )
            biases.append(shift[offset].T)
        return torch.stack(maps), torch.stack(biases)

    def mixed_matrix(self, weights: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """``sum_j w_j E_j`` per sample: ``(N, C, T, T)``, and its bias ``(N, C, T)``."""
        maps, biases = self.matrices(num_frames)
        weights = weights.to(maps.dtype)
        return torch.einsum("nj,jcts->ncts", weights, maps), torch.einsum("nj,jct->nct", weights, biases)

    def mix(self, z: Tensor, weights: Tensor, num_frames: int, first: int = 0) -> Tensor:
        """``sum_j w_j E_j(z)``: E_j keeps every ``2**j``-th frame and rebuilds the others.

        Args:
            z: the frames of candidate ``first``, ``(N, C, T', H, W)``.
            weights: ``(N, S_t)``; those before ``first`` must be 0.
            num_frames: frames of the result.
            first: the candidate with the most frames that is open.
        """
        matrix, bias = self.mixed_matrix(weights, num_frames)
        matrix = matrix[..., :: self.strides[first]].to(z.dtype)
        mixed = torch.matmul(matrix, z.flatten(3)) + bias.to(z.dtype).unsqueeze(3)
        return mixed.unflatten(3, z.shape[3:])

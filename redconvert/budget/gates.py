"""Gates in closed form: an input is worth a layer's full candidate where it is hard, at one price for the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import DynamicConv
from ..layers.gate import BIRTH_BETA, Gate
from .difficulty import Difficulty

__all__ = ["write_gates"]

RIDGES = tuple(
    10.0**k for k in range(-4, 3)
)  # times the mean variance; the one that predicts best what it has not seen
CHANCE = 2.0  # over the number of samples is the share of the error that must go: half of it goes by chance
LEAST_RATE = 1e-9  # of the highest: what harms less for its multiply-adds is free
MARGIN = 0.25  # by which every gate is open while nothing has been asked for


class _Predictor(NamedTuple):
    """``slope * tanh(x . weight - mean)``, and the log of the mean of its exponential."""

    weight: Tensor
    mean: Tensor
    slope: float
    log_mean: float


@torch.no_grad()
def write_gates(layers: Mapping[str, DynamicConv], found: Difficulty, macs: Mapping[str, Tensor]) -> None:
    """Let every gate say the log of the harm per saved multiply-add that it expects of its input.

    At a price p per multiply-add, candidate i beats all cheaper ones j where its rate is above p,
    ``rate_i = min_j (h_j - h_i) / (m_i - m_j)``, and the largest such candidate is the best of all. One hidden unit per
    axis predicts the sample's difficulty d from what the gate reads (ridge regression, its strength by leaving one
    out), and ``z_i = (log rate_i + d) / scale + shift``: one threshold for all gates is then one price for the whole
    network. At threshold 0 every gate is open for every input.

    Args:
        layers: by name, with ``gate="hard"``.
        found: of `measure_difficulty`.
        macs: by layer what each decision costs, ``(S_c, S_t)``.
    """
    rates = _log_rates(layers, found, macs)
    predictors = {
        (name, axis): _predictor(found.pooled[name], getattr(found, axis)[found.rows[name]]) for name, axis in rates
    }
    rates = {key: rate - predictors[key].log_mean for key, rate in rates.items()}
    scale = float(torch.cat([*rates.values(), torch.zeros(1)]).std(correction=0).clamp_min(1.0))
    least = min(float(rate.min()) - predictors[key].slope for key, rate in rates.items()) if rates else 0.0
    for name in found.pooled:
        _renorm(layers[name].gate, found.pooled[name])
    for (name, axis), rate in rates.items():
        _write(layers[name].gate, axis, predictors[name, axis], (rate - least) / scale + MARGIN, scale)


def _log_rates(
    layers: Mapping[str, DynamicConv], found: Difficulty, macs: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Of all candidates but the cheapest, by layer and axis, within what a logarithm can tell."""
    rates = {}
    for name in found.pooled:
        for axis, index in (("channel", (slice(None), 0)), ("temporal", (0, slice(None)))):
            if layers[name].gate.thresholds(axis).numel():
                rates[name, axis] = _rates(found.harms[name][index], macs[name][index])
    paid = [rate[(rate > 0) & rate.isfinite()] for rate in rates.values()]
    highest = float(torch.cat([*paid, torch.zeros(1)]).max()) or 1.0
    return {key: rate.clamp(LEAST_RATE * highest, 3 * highest).log() for key, rate in rates.items()}


def _rates(harm: Tensor, macs: Tensor) -> Tensor:
    """``min_j (h_j - h_i) / (m_i - m_j)`` over cheaper j; infinite where no later candidate is cheaper."""
    saved = macs[:-1, None] - macs[None, :]
    later = torch.arange(len(macs))[None, :] > torch.arange(len(macs) - 1)[:, None]
    rate = (harm[None, :] - harm[:-1, None]) / saved
    return torch.where(later & (saved > 0), rate, torch.inf).amin(1)


def _predictor(x: Tensor, y: Tensor) -> _Predictor:
    """Ridge regression of ``y (n)`` on ``x (n, F)``; a constant where leaving one out says that x tells nothing."""
    x, y = x.double(), y - y.mean()
    mean, spread = x.mean(0), x.std(0, correction=0)
    inverse = torch.where(spread > 1e-6 * spread.max(), 1 / spread, torch.zeros_like(spread))
    u, s, v = torch.linalg.svd((x - mean) * inverse, full_matrices=False)
    along, weight = u.T @ y, torch.zeros_like(mean)
    best = (1 - CHANCE / len(y)) * _left_out(y, torch.full_like(y, 1 / len(y)))
    for ridge in RIDGES:
        share = s.square() / (s.square() + ridge * len(y))
        error = _left_out(y - u @ (share * along), u.square() @ share + 1 / len(y))
        if error < best:
            best, weight = error, (v.T @ (along * share / s.clamp_min(1e-12))) * inverse
    predicted = (x - mean) @ weight
    size = predicted.std(correction=0)
    if not size > 0:
        return _Predictor(torch.zeros_like(mean), torch.zeros((), dtype=x.dtype), 0.0, 0.0)
    unit = torch.tanh(predicted / size)
    slope = float((predicted @ unit) / (unit @ unit))
    log_mean = float((slope * unit).logsumexp(0)) - math.log(len(y))
    return _Predictor(weight / size, mean @ weight / size, slope, log_mean)


def _left_out(residual: Tensor, leverage: Tensor) -> float:
    """Sum of squared errors where each sample is predicted from the others."""
    return float((residual / (1 - leverage).clamp_min(1e-6)).square().sum())


def _renorm(gate: Gate, pooled: Tensor) -> None:
    """Statistics of the gate's norm, from what it read."""
    hidden = pooled.to(gate.fc1.weight) @ gate.fc1.weight.T
    gate.norm.running_mean.copy_(hidden.mean(0))  # type: ignore[union-attr]
    gate.norm.running_var.copy_(hidden.var(0, correction=0).clamp_min(1e-12))  # type: ignore[union-attr]


def _write(gate: Gate, axis: str, predictor: _Predictor, level: Tensor, scale: float) -> None:
    """``z = level + slope / scale * tanh(unit)`` for all but the cheapest, which runs where they are closed."""
    unit = 0 if axis == "channel" else len(gate.norm.weight) - 1  # both axes share a hidden layer of one unit
    norm = gate.norm
    gate.fc1.weight[unit] = predictor.weight.to(gate.fc1.weight)
    norm.running_mean[unit] = predictor.mean.to(norm.weight)  # type: ignore[index]
    norm.running_var[unit] = 1 - norm.eps  # type: ignore[index]
    norm.weight[unit], norm.bias[unit] = 1, 0
    rows = gate.axis(axis, torch.arange(len(gate.beta)))
    gate.fc2.weight[rows] = 0
    gate.fc2.weight[rows[:-1], unit] = predictor.slope / scale
    gate.beta[rows[:-1]] = level.to(gate.beta)
    gate.beta[rows[-1]] = -BIRTH_BETA

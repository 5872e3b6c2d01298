"""Gates that need not be asked: what no input can change is known from the thresholds alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from deploy_networks import Image, Video, undecided_gates
from hypothesis import given
from hypothesis import strategies as st

import redconvert
from redconvert.deploy.gate import FoldedGate, _first_open
from redconvert.layers import dynamic_layers
from redconvert.layers.gate import Gate

CLIPS = torch.randn(2, 3, 6, 20, 20)


@given(
    st.sampled_from([sizes for sizes in itertools.product((1, 2, 3), repeat=2) if max(sizes) > 1]),
    st.floats(0, 1.5),
    st.integers(0, 10_000),
)
def test_known_where_no_input_can_change_it(sizes, spread, seed):
    """Against every corner of what tanh can give to the second layer."""
    torch.manual_seed(seed)
    channels, strides = sizes
    gate = Gate(4, 1, channels, strides, hidden=3)
    with torch.no_grad():
        gate.fc2.weight.normal_()
        gate.beta.copy_(spread * 4 * torch.randn_like(gate.beta))
        gate.threshold.copy_(spread * torch.randn_like(gate.beta))
    folded = FoldedGate(gate)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    z = (corners @ gate.fc2.weight.T + gate.beta - gate.threshold).tolist()
    split = folded.split
    found = {(_first_open(row[split:]), _first_open(row[:split]) if split else 0) for row in z}
    known = folded.constant
    assert found == {known[:2]} if known is not None else len(found) > 1


@pytest.fixture
def asked(monkeypatch):
    """The gates that a deployed network asks, in order."""
    found, original = [], FoldedGate.__call__

    def ask(self, x, sources=None, read=True):
        found.append(self.gate)
        return original(self, x, sources, read)

    monkeypatch.setattr(FoldedGate, "__call__", ask)
    return found


def test_a_budget_by_layers_leaves_nothing_to_ask(asked):
    torch.manual_seed(0)
    config = redconvert.ConvertConfig(rules=[("*", {})], cheap="pointwise")
    dynamic = redconvert.convert(Video().eval(), config, example_inputs=CLIPS)
    undecided_gates(dynamic)
    layers = dynamic_layers(dynamic)
    fast = redconvert.deploy(dynamic, CLIPS)
    asked.clear()
    fast(CLIPS)
    assert set(asked) <= {layer.gate for layer in layers.values()} and asked and fast.batch.gates_run
    redconvert.set_budget(dynamic, 0.7, [CLIPS], by="layers")
    asked.clear()
    with torch.no_grad():
        torch.testing.assert_close(fast(CLIPS), dynamic(CLIPS), atol=1e-5, rtol=1e-4)
    assert not asked and not fast.batch.gates_run
    assert any(fast.stand_in(layer).known() != (0, 0, False, 0) for layer in layers.values())
    # Whoever looks at what gates say, or times them, has them asked.
    seen = []
    with redconvert.observed(dynamic, lambda layer, observation: seen.append(observation.weights)):
        fast(CLIPS)
    assert len(asked) == len(layers) * len(CLIPS) and fast.batch.gates_run
    asked.clear()
    fast.batch.always_ask = True
    fast(CLIPS)
    assert len(asked) == len(layers) * len(CLIPS)
    fast.batch.always_ask = False
    redconvert.clear_budget(dynamic)
    asked.clear()
    with torch.no_grad():
        torch.testing.assert_close(fast(CLIPS), dynamic(CLIPS), atol=1e-5, rtol=1e-4)
    assert asked


def test_an_axis_without_choice_is_not_asked_about(asked):
    """Images have no time: with the channels forced nothing is open."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 30, 30)
    dynamic = redconvert.convert(Image().eval(), redconvert.ConvertConfig(min_saving=0.0), example_inputs=x)
    undecided_gates(dynamic)
    fast = redconvert.deploy(dynamic, x)
    for channel in (0, 1, [0, 1]):
        with redconvert.forced(dynamic, channel=channel):
            asked.clear()
            with torch.no_grad():
                torch.testing.assert_close(fast(x), dynamic(x), atol=1e-5, rtol=1e-4)
            assert not asked and not fast.batch.gates_run
    with redconvert.forced(dynamic, channel=[None, 1]):
        fast(x)
    assert asked and fast.batch.gates_run

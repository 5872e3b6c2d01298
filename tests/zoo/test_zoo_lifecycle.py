"""From conversion to revert, for each of the paper's networks with its preset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from zoo_networks import CASES, Case

import redconvert
from redconvert.cost import dense_macs
from redconvert.layers import dynamic_layers


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_lifecycle(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, clip = case.build().eval(), case.inputs()
    kinds = [type(module) for module in model.modules()]
    dense = _run(model, clip)
    assert dense.shape == case.output and dense.isfinite().all()
    expected_macs = dense_macs(model, clip).total / len(clip)

    dynamic = redconvert.convert(model, case.config(), example_inputs=clip, inplace=True)
    assert torch.equal(_run(dynamic, clip), dense)

    # Matching runs the network again, dense and reduced side by side: worth a look where it folds frames by itself.
    calibration = redconvert.calibrate(dynamic, [clip], match=case.config().num_frames is not None)
    assert calibration.samples == len(clip)
    for layer in calibration.layers:
        explained = [share for share in (*layer.channel_explained, *layer.temporal_explained) if share is not None]
        assert explained and all(share <= 1 for share in explained), layer
    assert torch.equal(_run(dynamic, clip), dense)  # open gates stay exact

    report = redconvert.report(dynamic, [clip], time=False)
    assert report.dense_macs == expected_macs and len(report.layers) == len(dynamic_layers(dynamic))
    gates = sum(layer.gate_macs for layer in report.layers)
    assert report.executed_macs == pytest.approx(report.dense_macs + gates, rel=1e-12) and gates > 0

    _train_one_step(dynamic, case)

    trained = _run(dynamic.eval(), clip)
    assert trained.isfinite().all() and not torch.equal(trained, dense)
    deployed = _run(redconvert.deploy(dynamic, clip), clip)
    assert (deployed - trained).abs().max() <= 1e-4 * trained.abs().max()
    redconvert.save_pretrained(dynamic, tmp_path)
    loaded = redconvert.from_pretrained(case.empty(), tmp_path, inplace=True).eval()
    assert torch.equal(_run(loaded, clip), trained)

    with redconvert.disabled(dynamic):
        full = _run(dynamic, clip)
    assert [type(module) for module in redconvert.revert(dynamic).modules()] == kinds
    assert torch.equal(_run(dynamic, clip), full)


def _run(model: nn.Module, clip: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(clip)


def _train_one_step(dynamic: nn.Module, case: Case) -> None:
    """The loss reaches every gate, every cheap operation and every weight that is not frozen."""
    efficiency = redconvert.EfficiencyLoss(dynamic.train(), target=0.5)
    optimizer = torch.optim.Adam(dynamic.parameters(), lr=1e-4)  # norms over so few positions have huge gradients
    outputs = dynamic(case.inputs(seed=2))
    (outputs.square().mean() + efficiency(outputs)).backward()
    for layer_name, layer in dynamic_layers(dynamic).items():
        learning = [*layer.gate.parameters(), *_cheap_parameters(layer)]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learning), layer_name
        assert any((p.grad != 0).any() for p in layer.gate.parameters()), layer_name
        assert (layer.weight.grad is None) == bool(case.options.get("freeze_backbone")), layer_name
    before = {key: value.clone() for key, value in dynamic.named_parameters() if ".gate." in key}
    optimizer.step()
    moved = [key for key, value in before.items() if not torch.equal(value, dynamic.get_parameter(key))]
    assert len(moved) >= len(dynamic_layers(dynamic))


def _cheap_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [p for key, p in layer.named_parameters() if key.startswith(("cheap_c.", "cheap_t."))]

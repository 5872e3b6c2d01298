"""``python -m redconvert.cli``."""

from . import main

main()

"""Hooks of the documentation's build: the coverage page shows COVERAGE.md where `make coverage` has written it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MARKER = "<!-- coverage -->"
ABSENT = "*`make coverage` has not been run in this checkout: there is no `COVERAGE.md` yet.*\n"


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Put COVERAGE.md in the marker's place."""
    if MARKER not in markdown:
        return markdown
    path = Path(config.config_file_path).parent / "COVERAGE.md"
    return markdown.replace(MARKER, included(path.read_text(encoding="utf-8")) if path.is_file() else ABSENT)


def included(text: str) -> str:
    """Without its title, and links to files of the repository as plain names: they are not part of the site."""
    text = re.sub(r"\A# .*\n", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"`\1`", text)

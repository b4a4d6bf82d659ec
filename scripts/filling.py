"""What is put into written pages when the site is built."""

from __future__ import annotations

import re
from pathlib import Path

from method_facts import facts
from method_numbers import numbers

DOCS = Path(__file__).parents[1] / "docs"
STYLE = "width: 24rem; max-width: 100%; height: auto"
"""Of a diagram, which has no size by itself."""


def filled(markdown: str) -> str:
    """A page with `<!-- facts: NAME ... -->` and `<!-- numbers: NAME ... -->` replaced, by names of methods."""
    made = {"facts": facts, "numbers": numbers}
    return re.sub(r"<!-- (facts|numbers): ([^\n]*?) -->", lambda found: made[found[1]](found[2].split()), markdown)


def drawn(markdown: str) -> str:
    """A page with its diagrams as a part of it, in the colour of its text: as images they would not know the theme."""

    def inlined(found: re.Match[str]) -> str:
        image = (DOCS / found[1]).read_text(encoding="utf-8")
        if "currentColor" not in image:
            return found[0]
        image = re.sub(r"<style>.*?</style>\n", "", image).replace("<svg ", f'<svg style="{STYLE}" ', 1)
        return f"<figure>\n{image.strip()}\n</figure>"

    return re.sub(r"^!\[[^\]]*\]\((images/[\w-]+\.svg)\)$", inlined, markdown, flags=re.M)

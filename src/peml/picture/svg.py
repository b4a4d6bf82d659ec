"""What all pictures share: one page in the colours of the reader's light or dark surface, and the pieces on it.

Text stays text, nothing is fetched, and there is no script. Colours are those of Okabe and Ito, which colour-blind
readers tell apart too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from unicodedata import east_asian_width
from xml.sax.saxutils import escape, quoteattr

WIDTH, MARGIN = 760, 36
"""Of a page, in pixels."""

INNER = WIDTH - 2 * MARGIN

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--quiet:#5d6670;--line:#c9cfd6;--faint:#eceff2;
--main:#0072b2;--soft:#a9cfe6;--mark:#b84e00}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e8eaed;--quiet:#9aa4af;--line:#444c56;--faint:#23282f;
--main:#56b4e9;--soft:#2a5876;--mark:#e69f00}}
text{font:12px Inter,"Helvetica Neue",Helvetica,Arial,sans-serif;fill:var(--ink)}
.title{font-size:17px;font-weight:600}.head{font-weight:600}.quiet{fill:var(--quiet)}.small{font-size:10.5px}
.over{stroke:var(--paper);stroke-width:3;paint-order:stroke}.onmain{fill:var(--paper);font-weight:600}
.mark{fill:var(--mark)}.paper{fill:var(--paper)}.main{fill:var(--main)}.soft{fill:var(--soft)}.faint{fill:var(--faint)}
.box{fill:var(--faint);stroke:var(--line)}.chosen{fill:var(--paper);stroke:var(--main);stroke-width:1.5}
.line{stroke:var(--line);fill:none}.limit{stroke:var(--mark);stroke-dasharray:5 3;fill:none}
.curve{fill:none;stroke-width:1.6;stroke-linejoin:round}
"""


def page(height: float, title: str, about: str, pieces: Iterable[str]) -> str:
    """A whole picture.

    Args:
        height: of the page.
        title: what a screen reader, or a pointer that rests on it, says first.
        about: the same picture in words.
        pieces: what is on it.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'role="img" aria-labelledby="title about">\n<title id="title">{escape(title)}</title>\n'
        f'<desc id="about">{escape(about)}</desc>\n<style>{STYLE}</style>\n'
        f'<rect class="paper" width="{WIDTH}" height="{height:g}"/>\n' + "\n".join(pieces) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text.

    Args:
        x: where it begins, has its middle or ends, by `anchor`.
        y: of its baseline.
        words: what it says.
        kind: classes of the style.
        anchor: "start", "middle" or "end".
    """
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    named = f" class={quoteattr(kind)}" if kind else ""
    return f'<text x="{x:.2f}" y="{y:.2f}"{named}{at}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, radius: float = 0, opacity: float = 1) -> str:
    """A rectangle."""
    rounded = f' rx="{radius:g}"' if radius else ""
    seen = "" if opacity >= 1 else f' fill-opacity="{opacity:.2f}"'
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" class="{kind}"{rounded}{seen}/>'


def path(points: Iterable[tuple[float, float]], kind: str, extra: str = "") -> str:
    """Straight lines from point to point."""
    drawn = "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return f'<path d="M{drawn}" class="{kind}"{extra}/>'


def length_of(words: str, size: float = 12) -> float:
    """About how wide a line is, in pixels: an average letter of these fonts is a little over half as wide as high.

    Letters of East Asian scripts, and pictures, are as wide as high.
    """
    wide = sum(east_asian_width(letter) in "WF" for letter in words)
    return size * (0.56 * (len(words) - wide) + wide)


def wrapped(items: Iterable[str], width: float, lines: int, size: float = 12) -> list[str]:
    """A list as lines of text, the last of which says how many did not fit.

    Args:
        items: what is listed.
        width: most pixels of a line.
        lines: most lines.
        size: of the letters.
    """
    words, out = list(items), [""]
    for place, word in enumerate(words):
        tail = ", " if place + 1 < len(words) else ""
        more = f"and {len(words) - place} more"
        last = len(out) == lines
        # On the last line, room is kept for saying that there is more.
        room = width - (length_of(more, size) if last and tail else 0)
        if not out[-1] or length_of(out[-1] + word + tail, size) <= room:
            out[-1] += word + tail
        elif last:
            return [*out[:-1], out[-1] + more]
        else:
            out.append(word + tail)
    return [line.rstrip() for line in out]


def ticks(most: float, count: int = 4) -> list[float]:
    """Round numbers from 0 up to `most`, about `count` of them above 0."""
    if most <= 0:
        return [0.0]
    least = most / count
    exponent = math.floor(math.log10(least))
    step = next(s for s in (factor * 10.0**exponent for factor in (1, 2, 5, 10)) if s >= least)
    return [round(step * number, 12) for number in range(int(most / step + 1e-9) + 1)]

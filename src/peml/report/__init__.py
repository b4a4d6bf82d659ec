"""Reports: a comparison as one HTML file, as Markdown and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from peml.compare import CompareFolder
from peml.errors import PemlError
from peml.report.contents import contents_of
from peml.report.markdown import markdown
from peml.report.page import page
from peml.training.folder import write_text


def report(folder: str | Path, output: str | Path | None = None) -> list[Path]:
    """Write the report of a comparison: an HTML file, and the same as Markdown and JSON beside it.

    Args:
        folder: of the comparison.
        output: the HTML file; default `report.html` in the folder.

    Raises:
        PemlError: there is no comparison in the folder, or the output is no HTML file.
    """
    found = CompareFolder.existing(folder)
    path = Path(output).expanduser() if output is not None else found.path / "report.html"
    if path.suffix != ".html":
        raise PemlError(f"--output must be a file that ends in .html, not {path}")
    contents = contents_of(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {
        ".html": page(contents),
        ".md": markdown(contents),
        ".json": json.dumps(contents, ensure_ascii=False, indent=1) + "\n",
    }
    for suffix, text in texts.items():
        write_text(path.with_suffix(suffix), text)
    return [path.with_suffix(suffix) for suffix in texts]


__all__ = ["report"]

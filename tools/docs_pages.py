"""MkDocs hook: add pages from the repository's root to the site, and fix links between the root and docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "ARCHITECTURE.md": "architecture.md"}
"""Files in the repository's root that become pages of the site, with each page's file name."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages in the repository's root to the site."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links that work in the repository, such as ``docs/find.md`` and ``../CONTRIBUTING.md``, by the site's."""
    if page.file.src_uri in PAGES.values():
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    for source, name in {**PAGES, "README.md": "index.md"}.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(source)}(?=[#)])", f"]({name}", markdown)
    return markdown

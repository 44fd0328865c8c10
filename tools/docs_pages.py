"""A hook of the docs site: pages that lie in the repository's root, and links between the root and docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "ARCHITECTURE.md": "architecture.md"}
"""Files of the root that are pages of the site, and the pages' names."""


def on_files(files: Any, config: Any) -> Any:
    """Add the root's pages to the site."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at pages of the site: ``docs/find.md`` and ``../CONTRIBUTING.md`` are those of the repository."""
    if page.file.src_uri in PAGES.values():
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    for source, name in {**PAGES, "README.md": "index.md"}.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(source)}(?=[#)])", f"]({name}", markdown)
    return markdown

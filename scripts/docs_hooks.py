"""What the documentation site has beyond `docs/`: pages that live elsewhere, and links to files that are no pages.

mkdocs calls these functions (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "llava/assets/tiny_llava/README.md": "shipped_model.md",
    "llava/visualize/report.stages.svg": "figures/stages.svg",
}
"""Files of the repository → where they stand in the site."""

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that live elsewhere."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the repository has them → links of the site; to a file that is not in it, its name."""
    source = Path(page.file.abs_src_path).resolve()
    at = Path(page.file.src_uri).parent

    def replace(match: re.Match[str]) -> str:
        text, link = match.groups()
        target, hash_, anchor = link.partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]  # mkdocs says what is wrong with it
        name = path.relative_to(ROOT).as_posix()
        in_site = PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        if in_site is None or (ROOT / "docs" / in_site).is_dir():
            return f"{text} (`{name}`)" if text.strip("`") != name else f"`{name}`"
        return f"[{text}]({os.path.relpath(in_site, at)}{hash_}{anchor})"

    return _LINK.sub(replace, markdown)

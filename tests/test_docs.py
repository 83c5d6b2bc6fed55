"""The documentation site is built without a warning, links included, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("material"), reason="extra 'docs' is missing")
def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "changelog.html", "reference.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"""<(script|img|link)\b[^>]*(src|href)=["']?(https?:)?//""", text), page.name
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    for name in ("llava.pruning.prune", "llava.inference.LoadedModel", "llava.visualize.observe.observe"):
        assert f'id="{name}"' in reference

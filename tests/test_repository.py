"""What a newcomer meets first says the truth, and what must never slip in has not."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from transformers.utils import logging

import llava
from llava.model.recommended import PUBLISHED
from llava.pruning import METHODS, Method, PruningConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
SOURCES = [path for folder in ("llava", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]

logging.set_verbosity_error()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_links_and_modules_in_the_guides_exist(guide):
    text = guide.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (guide.parent / target).exists(), f"{guide.name} links to {target}"
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        assert find_spec(module), f"{guide.name} runs {module}"
    for name in re.findall(r"`((?:llava|tests|scripts)/[\w./]+)`", text):
        assert (ROOT / name).exists(), f"{guide.name} names {name}"


def test_the_readme_config_is_the_published_one_and_the_methods_page_has_a_row_for_each_of_its_keys():
    published, *others = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert PruningConfig.from_any(json.loads(published)) == PUBLISHED
    assert all(Method.from_any(json.loads(other)).name in METHODS for other in others)
    section = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("### visipruner\n")[1].split("\n### ")[0]
    assert published in section
    rows = dict(re.findall(r"^\| `(\w+)`[^|]* \|(.*)$", section, re.MULTILINE))
    assert set(PruningConfig.__dataclass_fields__) <= set(rows)


def test_citation_and_package_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert citation["version"] == llava.__version__ and '\ndynamic = ["version"]\n' in project
    assert f'license = "{citation["license"]}"' in project
    assert "arXiv:2510.17205" in str(citation["preferred-citation"])
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_torch_load_reads_weights_only_and_no_remote_code_is_trusted():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert flags.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_no_prompt_length_or_patch_count_is_written_into_the_package():
    # Where the picture starts (35 in one template) and how many rows it has (576 in one tower) come from the splice.
    for path in (ROOT / "llava").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, int):
                assert node.value not in (35, 576, 611), f"{path}:{node.lineno}"


def test_one_place_chooses_the_dtype_of_mixed_precision():
    # A dtype written down elsewhere is slow on some processor: bfloat16 is on those without instructions for it.
    users = [path for path in SOURCES if "autocast(" in path.read_text(encoding="utf-8").replace("fast_autocast(", "")]
    assert users == [ROOT / "llava" / "utils.py"]


@pytest.mark.parametrize(("ci", "installs"), [({}, False), ({"CI": "true"}, True), ({"INSTALL_BROWSER": "1"}, True)])
def test_a_browser_is_installed_in_ci_or_where_it_is_asked_for_and_a_person_is_told_how(tmp_path, ci, installs):
    for name, does in (("id", "echo 0"), ("apt-get", f'echo "$@" >> {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    command = [shutil.which("bash"), str(ROOT / "scripts" / "install_test_browser.sh")]
    said = subprocess.run(command, env={"PATH": str(tmp_path), **ci}, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "asked").exists() == installs
    assert ("apt-get install chromium chromium-driver" in said) == (not installs)

"""What a newcomer meets first says the truth, and what must never slip in has not."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from transformers.utils import logging

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


def test_the_readme_snippet_runs(tmp_path, monkeypatch, capsys):
    from PIL import Image
    from tiny_checkpoints import tiny_config, tiny_model, write_original

    import llava.constants

    folder = write_original(tmp_path / "tiny-llava", tiny_model(tiny_config(num_hidden_layers=8)))
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llava.constants, "SHIPPED_MODEL_PATH", folder)
    chat, on_any_model = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(chat, "README.md", "exec"), names)
    assert "[" in capsys.readouterr().out.splitlines()[-1]
    pixels = names["process_images"]([names["image"]], names["image_processor"], names["model"].config)
    names["inputs"] = {"input_ids": names["ids"], "images": pixels}
    exec(compile(on_any_model, "README.md", "exec"), names)
    assert names["run"].traces[0].num_visual


def test_the_readme_config_is_the_published_one_and_its_table_is_complete():
    published, *others = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert PruningConfig.from_any(json.loads(published)) == PUBLISHED
    assert all(Method.from_any(json.loads(other)).name in METHODS for other in others)
    rows = dict(re.findall(r"^\| `(\w+)`[^|]* \|(.*)$", README, re.MULTILINE))
    assert set(PruningConfig.__dataclass_fields__) | set(METHODS) <= set(rows)
    for name, method in METHODS.items():
        assert method is PruningConfig or all(f"`{knob.name}`" in rows[name] for knob in fields(method))


def test_citation_and_package_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project
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

"""What `docs/serving.md` and the container files say is so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from serving_helpers import IMAGES

from llava.serve import api
from llava.serving.protocol import ChatRequest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_every_option_is_on_the_page(capsys):
    with pytest.raises(SystemExit):
        api.main(["--help"])
    known = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out)) - {"--help", "--debug"}  # every program has these
    written = set(re.findall(r"`(--[a-z0-9-]+)", PAGE.split("## Settings")[1].split("## Limits")[0]))
    assert written == known


def test_every_field_that_changes_an_answer_is_on_the_page():
    about = PAGE.split("## What a request may say")[1].split("## Settings")[0]
    refused = {"frequency_penalty", "presence_penalty"}
    missing = {name for name in ChatRequest.model_fields if name not in about} - refused
    assert not missing


def test_the_dockerfile_is_hadolint_clean():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "pip install -e '.[dev]' brings hadolint"
    checked = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_compose_file_starts_what_there_is():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    service = compose["services"]["visipruner"]
    args = api._arguments(service["command"])
    assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert int(service["stop_grace_period"].removesuffix("s")) > args.shutdown_timeout
    assert service["ports"] == [f"127.0.0.1:{args.port}:{args.port}"]
    assert args.api_key_file == Path("/run/secrets") / service["secrets"][0]
    assert set(service["secrets"]) == set(compose["secrets"])


def test_the_snippet_without_a_server_runs(tmp_path, monkeypatch, capsys):
    shutil.copy(IMAGES[0], tmp_path / "photo.jpg")
    with_client, from_python = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    compile(with_client, "serving.md", "exec")
    monkeypatch.chdir(tmp_path)
    exec(compile(from_python.replace("llava/assets", str(ROOT / "llava" / "assets")), "serving.md", "exec"), {})
    assert "executed" in capsys.readouterr().out

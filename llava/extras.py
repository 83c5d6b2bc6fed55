"""Packages that only some programs need: which extra brings them, and the command that installs it here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlparse

from packaging.requirements import Requirement

PROJECT = "llava-visipruner"


def missing_extra_of(error: ImportError) -> str | None:
    """The extra that brings the package that could not be imported; None if it belongs to none."""
    wanted = _module(error.name or "")
    found = (extra for extra, requirement in _requirements(_project()) if _module(requirement.name) == wanted)
    return next(found, None)


def install_command(extra: str) -> str:
    """What to type so that an extra is there, for the way this project was installed.

    An editable checkout is installed anew from its folder, a wheel or a repository from where it came; where that is
    not known, or is there no more, the extra's packages are named one by one.
    """
    return f"{pip()} install {_what_to_install(extra)}"


def _what_to_install(extra: str) -> str:
    project = _project()
    origin = json.loads((project.read_text("direct_url.json") if project else None) or "{}")
    url = origin.get("url", "")
    if "vcs_info" in origin:
        return shlex.quote(f"{PROJECT}[{extra}] @ {origin['vcs_info']['vcs']}+{url}")
    if url.startswith("file:") and (path := Path(unquote(urlparse(url).path))).exists():
        here = "." if path == Path.cwd() else str(path)
        flag = "-e " if origin.get("dir_info", {}).get("editable") else ""
        return flag + shlex.quote(f"{here}[{extra}]")
    needed = list(dict.fromkeys(map(_plain, _needed(project, extra))))
    return " ".join(map(shlex.quote, needed)) or shlex.quote(f".[{extra}]")


def _needed(project: Distribution | None, extra: str) -> Iterator[Requirement]:
    """The packages of an extra, those of extras that it names included."""
    for name, requirement in _requirements(project):
        if name == extra and requirement.name == PROJECT:
            for other in sorted(requirement.extras):
                yield from _needed(project, other)
        elif name == extra:
            yield requirement


def _requirements(project: Distribution | None) -> Iterator[tuple[str, Requirement]]:
    """Every requirement of an extra with the extra's name; not those of the developers', which name all others'."""
    if project is None:
        return
    requirements = [Requirement(line) for line in project.requires or []]
    of_extras = [each for each in requirements if each.marker and not each.marker.evaluate({"extra": ""})]
    for extra in project.metadata.get_all("Provides-Extra") or []:
        if extra != "dev":
            yield from ((extra, each) for each in of_extras if each.marker and each.marker.evaluate({"extra": extra}))


def _plain(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _project() -> Distribution | None:
    """This project's metadata; None where it is used from a folder that nobody installed."""
    # In the folder of an editable checkout there is a second one, of the build, which does not know where it came from.
    found = list(distributions(name=PROJECT))
    return next((each for each in found if each.read_text("direct_url.json")), next(iter(found), None))


def _module(name: str) -> str:
    return name.partition(".")[0].replace("-", "_").lower()


def pip() -> str:
    """pip of the environment that is running, which need not be the one on the PATH."""
    found = shutil.which("pip")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "pip"
    python = Path(sys.executable)
    shown = os.path.relpath(python) if python.is_relative_to(Path.cwd()) else str(python)
    return f"{shlex.quote(shown)} -m pip"

"""What the README tells people to type, run as it stands there."""

import json
import os
import re
import subprocess
from pathlib import Path

from helpers.fork_server import ROOT

import prepare

README = (ROOT / "README.md").read_text()


def stand_in(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_codex_may_write_git_and_the_cache_of_uv(tmp_path: Path):
    """Without the cache, `uv run` ends with exit code 2 in its sandbox; without .git, no run is recorded."""
    command = re.search(r"^codex .*?\n(?=```)", README, re.M | re.S)[0]
    stand_in(tmp_path / "codex", """printf '%s\\n' "$@" > arguments""")
    stand_in(tmp_path / "uv", """[ "$*" = "cache dir" ] && echo "/a home/.cache/uv\"""")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:-1] == ["--sandbox", "workspace-write", "--ask-for-approval", "never", "-c"]
    name, value = arguments[-1].split("=", 1)
    assert name == "sandbox_workspace_write.writable_roots"
    assert json.loads(value) == [".git", "/a home/.cache/uv"]


def test_the_settings_of_claude_code_are_json():
    permissions = json.loads(re.search(r"```json\n(.*?)```", README, re.S)[1])["permissions"]
    allowed = "\n".join(permissions["allow"])
    assert all(f"Edit(/{name})" in allowed for name in ("train.py", "notes.md"))
    assert "Bash(uv run train.py *)" in allowed and "Edit(/prepare.py)" in permissions["deny"]


def test_the_readme_says_how_a_folder_is_read():
    row = re.search(r"^\| a folder \| (.*) \|$", README, re.M)[1]
    assert tuple(re.findall(r"`(\.\w+)`", row)) == prepare.OWN_TYPES
    for sentence in (
        "names that begin with a dot are left out",
        "other types are skipped",
        "cut at blank lines, otherwise at line ends, otherwise at spaces",
    ):
        assert sentence in README


def test_the_readme_fits_on_220_lines():
    assert len(README.splitlines()) <= 220

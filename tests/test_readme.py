"""What the README tells people to type, run as it stands there."""

import fnmatch
import json
import os
import re
import subprocess
from pathlib import Path

from helpers.fork_server import ROOT

import prepare

README = (ROOT / "README.md").read_text()
PROGRAM = (ROOT / "program.md").read_text()


def stand_in(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_codex_may_write_git_and_the_cache_of_uv(tmp_path: Path):
    """Without the cache, `uv run` ends with exit code 2 in its sandbox; without .git, no run is recorded."""
    command = re.search(r"^codex .*?\n(?=```)", README, re.M | re.S)[0]
    stand_in(tmp_path / "codex", """printf '%s\\n' "$@" > arguments""")
    stand_in(tmp_path / "uv", """[ "$*" = "cache dir" ] && echo "/a home/.cache/uv\"""")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = f"git init -q && {command}"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:-1] == ["--sandbox", "workspace-write", "--ask-for-approval", "never", "-c"]
    name, value = arguments[-1].split("=", 1)
    assert name == "sandbox_workspace_write.writable_roots"
    assert json.loads(value) == [str(tmp_path / ".git"), "/a home/.cache/uv"]


def allowed(command: str, patterns: list[str]) -> bool:
    """Whether a pattern matches; `PREFIX *` does without arguments, too, and a redirection is none."""
    command = re.sub(r" *(2>&1|>>? [\w./]+)", "", command)
    return any(fnmatch.fnmatch(command, pattern.removesuffix(" *") + "*") for pattern in patterns)


def test_claude_code_may_run_what_program_md_says():
    """All but the background form and what several GPUs need; `echo` never asks."""
    permissions = json.loads(re.search(r"```json\n(.*?)```", README, re.S)[1])["permissions"]
    patterns = [rule[5:-1] for rule in permissions["allow"] if rule.startswith("Bash(")]
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", PROGRAM, re.M | re.S)
    scripts = [block for block in blocks if "nohup" not in block]
    scripts += re.findall(r"`((?:git|uv run|sed|head|cut) [^`]*)`", PROGRAM)
    commands = [command.strip() for script in scripts for command in re.split(r";|&&|\||\n", script)]
    asked = {command for command in commands if command and not command.startswith("echo ")}
    refused = {command for command in asked if not allowed(command, patterns)}
    assert len(asked) > 15
    assert refused == {"git worktree add -q ../autoresearch-N -b autoresearch/TAG-N"}
    assert not allowed("git push", patterns) and not allowed("rm -rf .git", patterns)
    edits = [rule for rule in permissions["allow"] if rule.startswith("Edit(")]
    assert edits == ["Edit(/train.py)", "Edit(/notes.md)"]


def test_the_readme_names_the_types_of_a_folder():
    row = re.search(r"^\| a folder \| (.*) \|$", README, re.M)[1]
    assert tuple(re.findall(r"`(\.\w+)`", row)) == prepare.OWN_TYPES


def test_the_readme_fits_on_220_lines():
    assert len(README.splitlines()) <= 220

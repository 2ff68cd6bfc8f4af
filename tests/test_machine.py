"""Shells and machines as a program may meet them: no home, no stdout, no matplotlib, other encodings."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers.lab import ROOT, Lab
from helpers.machine import NO_STDOUT, NOBODY, block, nobody, on_machine
from helpers.own import error_line, ready
from helpers.records import write_night
from helpers.script import load

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A repository after 40 runs."""
    return write_night(tmp_path_factory.mktemp("reported") / "lab", 40)[0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Lab:
    return Lab.create(tmp_path_factory.mktemp("machine") / "lab")


# == The report ==============================================================================================


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg"])
def test_the_chart_needs_no_backend(backend, reported, tmp_path):
    """As a notebook or a desktop sets it for whatever is started there."""
    chart = reported.folder / "progress.png"
    chart.unlink(missing_ok=True)
    first = block(forget=("matplotlib",))  # it reads the variable when it is imported
    job = on_machine(tmp_path / "job", reported, "prepare.py", "--report", first=first, MPLBACKEND=backend)
    assert (job.returncode, job.stderr) == (0, "")
    assert job.stdout.endswith(f"\nchart: {chart}\n") and chart.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_is_a_report(reported, tmp_path):
    chart = reported.folder / "progress.png"
    chart.unlink(missing_ok=True)
    job = on_machine(tmp_path / "job", reported, "prepare.py", "--report", first=block("matplotlib"))
    assert (job.returncode, job.stderr) == (0, "")
    assert job.stdout.startswith("40 experiments in ")
    assert job.stdout.endswith("\nno chart: matplotlib is not installed; uv sync brings it\n")
    assert not chart.exists()


def test_a_reader_may_have_seen_enough(reported):
    """One that takes a line, and one that has gone before there is any."""
    first_line = reported.sh("uv run prepare.py --report | head -1")
    assert first_line.errors == ""
    assert first_line.output.startswith("40 experiments in ") and first_line.output.count("\n") == 1
    assert reported.sh("uv run prepare.py --report | true").errors == ""
    # the shell's status is the report's: neither "make room" nor a traceback
    outcome = reported.sh("set -o pipefail; uv run prepare.py --report | true", check=False)
    assert outcome.code in (0, 1) and outcome.errors == ""


def test_only_a_full_cache_asks_for_room(reported, tmp_path):
    """Where a chart cannot be written, the remedy is about that file."""
    chart = reported.folder / "progress.png"
    chart.unlink(missing_ok=True)
    chart.mkdir()
    job = on_machine(tmp_path / "job", reported, "prepare.py", "--report")
    chart.rmdir()
    assert str(chart) in error_line(job) and "AUTORESEARCH_CACHE" not in job.stderr


# == Homes, users and streams ================================================================================


@pytest.mark.slow
@pytest.mark.skipif(not IS_ROOT, reason="only root can become a user whom nobody knows")
def test_without_a_home_the_cache_is_asked_for(corpus, lab, tmp_path):
    """HOME is unset and there is no entry in passwd, as in a container with --user."""
    with nobody(), pytest.raises(SystemExit, match="^error: there is no home.*; set AUTORESEARCH_CACHE$"):
        load(HOME=None, AUTORESEARCH_CACHE=None)
    env = {"first": NOBODY, "without": ("HOME", "USER", "LOGNAME"), "AUTORESEARCH_CACHE": tmp_path / "cache"}
    ready(on_machine(tmp_path / "prepared", lab, "prepare.py", "--data", corpus, **env))
    job = on_machine(tmp_path / "trained", lab, "train.py", **env)
    assert job.returncode == 0, job.stderr
    assert job.stderr == "" and re.search(r"^val_bpb: +\d", job.stdout, re.MULTILINE)


@pytest.mark.slow
def test_nobody_needs_to_listen(corpus, reported, tmp_path):
    """With stdout closed everything is done all the same."""
    env = {"AUTORESEARCH_CACHE": tmp_path / "cache"}
    chart = reported.folder / "progress.png"
    chart.unlink(missing_ok=True)
    for command in (("--data", corpus), ("--report",)):
        job = on_machine(tmp_path / command[0], reported, "prepare.py", *command, first=NO_STDOUT, **env)
        assert (job.returncode, job.stdout, job.stderr) == (0, "", "")
    assert chart.exists()
    job = on_machine(tmp_path / "again", reported, "prepare.py", "--data", corpus, **env)
    assert ready(job) and "nothing to do" in job.stdout


@pytest.mark.slow
def test_closed_streams_of_real_processes(corpus, tmp_path):
    """Closed by a shell, from the start of Python; a traceback would have nowhere to go."""
    lab = Lab.create(tmp_path / "lab")
    env = {"AUTORESEARCH_CACHE": str(tmp_path / "cache"), "PYTHON": sys.executable, "DATA": str(corpus)}
    for closed in (">&-", ">&- 2>&- <&-"):
        lab.sh(f'"$PYTHON" prepare.py --data "$DATA" {closed}', **env)
        lab.sh(f'"$PYTHON" train.py "with {closed}" {closed}', timeout=120, **env)
        lab.sh(f'"$PYTHON" prepare.py --report {closed}', **env)
        assert (lab.folder / "progress.png").exists()
        (lab.folder / "progress.png").unlink()
    found = [(row["status"], row["description"]) for row in lab.rows()]
    assert found == [("keep", "with >&-"), ("baseline", "with >&- 2>&- <&-")]
    shutil.copy(ROOT / "train.py", lab.folder)
    lab.sh('"$PYTHON" train.py >&-', timeout=120, **env)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_narrow_encoding_of_stdout_loses_no_run(encoding, tmp_path, cache):
    """Of Windows, or of an old locale: descriptions and folders have letters that it does not have."""
    lab = Lab.create(tmp_path / "größer 日本")
    first = f"import sys; sys.stdout.reconfigure(encoding={encoding!r}, errors='strict')"
    description = "größer, 大きい 🦜"
    job = on_machine(tmp_path / "trained", lab, "train.py", description, first=first)
    assert (job.returncode, job.stderr) == (0, "")
    assert re.search("^status: keep ", job.stdout, re.MULTILINE)
    job = on_machine(tmp_path / "reported", lab, "prepare.py", "--report", first=first)
    assert (job.returncode, job.stderr) == (0, "") and "chart: " in job.stdout
    assert [row["description"] for row in lab.rows()] == [description]


# == Descriptions ============================================================================================


@pytest.mark.slow
def test_a_description_of_5000_characters_is_cut(tmp_path, cache):
    """It fits into a line of results.tsv, of git and of a screen."""
    lab = Lab.create(tmp_path / "lab")
    words = " ".join(f"idea{number}" for number in range(700))
    assert len(words) > 5000
    outcome = lab.run(words)
    assert outcome.code == 0, outcome.errors
    assert "note: the description is cut after 200 characters\n" in outcome.output
    (row,) = lab.rows()
    assert row["description"] == words[:200].rstrip()
    assert max(map(len, lab.results.read_text().splitlines())) < 400
    subject = lab.git("log", "-1", "--format=%s", row["commit"])
    assert subject.endswith(row["description"]) and len(subject) < 260
    assert words[:200].rstrip() in lab.report().output
    assert words[:210] not in outcome.output

    exact = lab.run("x" * 200)
    assert "is cut" not in exact.output and lab.rows()[-1]["description"] == "x" * 200

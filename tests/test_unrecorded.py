"""Runs that leave no record: plain ones, on purpose, and experiments where git cannot record them."""

import re
import shutil
from pathlib import Path

import pytest
from helpers.lab import CRASH, Lab


@pytest.fixture(autouse=True)
def _data(cache: Path) -> None:
    """Every run here needs the prepared corpus."""


def as_it_is(lab: Lab) -> None:
    pass


def no_repository(lab: Lab) -> None:
    shutil.rmtree(lab.folder / ".git")
    lab.env["GIT_CEILING_DIRECTORIES"] = str(lab.folder.parent)


def no_commit(lab: Lab) -> None:
    shutil.rmtree(lab.folder / ".git")
    lab.git("init", "-q", "-b", "main")


def empty_branch(lab: Lab) -> None:
    (lab.folder / ".git" / "refs" / "heads" / "main").write_text("")  # after a power loss


def no_train_py(lab: Lab) -> None:
    lab.git("rm", "-q", "--cached", "train.py")
    lab.git("commit", "-qm", "without")


def no_git(lab: Lab) -> None:
    folder = lab.folder.parent / "bin"
    folder.mkdir()
    (folder / "uv").symlink_to(shutil.which("uv", path=lab.env["PATH"]))
    lab.env["PATH"] = str(folder)


def detached(lab: Lab) -> None:
    lab.git("checkout", "-q", "--detach")


def of_another_owner(lab: Lab) -> None:
    lab.env["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"


def linked_to_nothing(lab: Lab) -> None:
    folder = lab.folder.parent / "linked"
    lab.git("worktree", "add", "-q", str(folder), "-b", "gpu-1")
    lab.folder.rename(lab.folder.with_name("moved"))
    lab.__init__(folder)


def damaged(lab: Lab) -> None:
    (lab.folder / ".git" / "HEAD").write_text("\0" * 40)


def no_objects(lab: Lab) -> None:
    shutil.rmtree(lab.folder / ".git" / "objects")
    (lab.folder / ".git" / "objects").mkdir()


REFUSED = {  # what the one line says, with git's remedy where git has one
    no_repository: r"fatal: not a git repository .*",
    no_commit: r"fatal: ambiguous argument 'HEAD': unknown revision .*",
    empty_branch: r"fatal: .*HEAD.*",
    no_train_py: r"fatal: path '(\./)?train\.py' exists on disk, but not in 'HEAD'",
    no_git: r".*No such file or directory: 'git'",
    of_another_owner: r"fatal: detected dubious ownership .* git config --global --add safe\.directory .*",
    linked_to_nothing: r"fatal: not a git repository: .*worktrees/linked",
    damaged: r"fatal: .*",
    no_objects: r"(fatal|error): .*",
}


def name_of(situation) -> str:
    return situation.__name__


def cases(situations, *quick) -> list:
    """All of them; those that are not quick are left to the slow suite."""
    return [
        situation if situation in quick else pytest.param(situation, marks=pytest.mark.slow)
        for situation in situations
    ]


@pytest.mark.parametrize(
    "situation",
    cases(REFUSED, no_repository, empty_branch, no_git, of_another_owner, linked_to_nothing),
    ids=name_of,
)
def test_an_experiment_that_git_cannot_record_is_refused(tmp_path, situation):
    lab = Lab.create(tmp_path / "repository")
    situation(lab)
    outcome = lab.run("an idea")
    assert (outcome.code, outcome.output) == (1, "")
    remedy = "fix that, or run without a description, which records nothing"
    says = f"error: the run cannot be recorded: {REFUSED[situation]}; {remedy}\n"
    assert re.fullmatch(says, outcome.errors), outcome.errors
    assert not lab.results.exists()


def test_a_detached_head_is_refused_with_a_remedy(tmp_path):
    lab = Lab.create(tmp_path / "repository")
    detached(lab)
    outcome = lab.run("an idea")
    assert (outcome.code, outcome.output, lab.results.exists()) == (1, "", False)
    says = r"error: HEAD is on no branch, what is kept could be lost; make one: (git switch .*/)TAG\n"
    lab.sh(re.fullmatch(says, outcome.errors)[1] + "night")
    lab.edit(CRASH)
    assert lab.run("an idea").status == "crash", "now it is recorded"


@pytest.mark.parametrize(
    "situation", cases([as_it_is, no_repository, detached, damaged], as_it_is, no_repository), ids=name_of
)
def test_a_plain_run_prints_its_score(tmp_path, situation):
    lab = Lab.create(tmp_path / "repository")
    situation(lab)
    before = sorted(lab.folder.rglob("*"))
    outcome = lab.run()
    assert (outcome.code, outcome.errors, outcome.status) == (0, "", "")
    assert outcome.output.startswith("plain run, not recorded: small scale, 5 s, seed 42, ")
    assert re.search(r"^---\nval_bpb: +\d\.\d{6}$", outcome.output, re.M)
    assert [path for path in sorted(lab.folder.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_plain_run_may_fail_and_may_choose_its_seed(begun):
    lab = begun
    before = lab.record(), lab.results.read_bytes()
    outcome = lab.run(SEED="77")
    assert outcome.code == 0 and re.search("^seed: +77$", outcome.output, re.M)
    lab.edit(CRASH)
    outcome = lab.run("  ")
    assert outcome.code == 1 and "ZeroDivisionError" in outcome.errors and outcome.status == ""
    assert (lab.record(), lab.results.read_bytes()) == before

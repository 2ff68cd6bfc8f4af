"""The notebook: in real repositories, by the real command line; every printed command is run as it was printed."""

import contextlib
import io
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import BUDGET, COLUMNS, ROOT, TRAIN, Lab, Outcome

import prepare

BETTER, WORSE, OTHER = ("STEPS = 4 ", "STEPS = 7 "), ("STEPS = 4 ", "STEPS = 2 "), ("LR = 0.05", "LR = 0.06")
CRASH = ("for _ in range(STEPS):", "for _ in range(1 // 0):")
SUMMARY = "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth"
SUMMARY = f"{SUMMARY} startup_seconds eval_seconds seed fingerprint".split()


@pytest.fixture(scope="module", autouse=True)
def _data(cache: Path) -> None:
    """Every run here needs the prepared corpus."""


@pytest.fixture(scope="module")
def night(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, list[Outcome]]:
    """Baseline twice, the first one merged; then a candidate that is better, run once."""
    lab = Lab.create(tmp_path_factory.mktemp("night") / "repository")
    outcomes = [lab.run("baseline")]
    lab.sh(outcomes[0].next)
    outcomes.append(lab.run())
    lab.edit(BETTER)
    outcomes.append(lab.run("4 -> 7 steps"))
    return lab, outcomes


@pytest.fixture
def begun(night, tmp_path: Path) -> Lab:
    """A copy of that repository, with the branch's train.py; results.tsv knows two baselines and the candidate."""
    lab = Lab(Path(shutil.copytree(night[0].folder, tmp_path / "copy", symlinks=True)))
    lab.train.write_text(TRAIN)
    lab.git("update-index", "--refresh")
    return lab


def hold(lab: Lab, name: str = "hold") -> dict[str, str]:
    return {"RUN_HOLD": str(lab.folder.parent / name)}


def refs(lab: Lab) -> set[str]:
    """The hashes below refs/autoresearch."""
    return set(lab.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/autoresearch").split())


def test_the_log_begins_with_a_number_and_each_line_is_a_finished_experiment(night):
    lab, (first, second, candidate) = night
    rows = lab.rows()
    assert [row["status"] for row in rows] == ["keep", "baseline", "maybe"]
    assert [row["seed"] for row in rows] == ["42", "43", "42"]
    assert [row["description"] for row in rows] == ["baseline", "baseline", "4 -> 7 steps"]
    assert rows[0]["code"] == rows[1]["code"] != rows[2]["code"] == lab.git("hash-object", "train.py")[:12]
    assert len({row["fingerprint"] for row in rows}) == 1 and len({row["commit"] for row in rows}) == 3
    assert (first.status, first.next) == ("keep", f"git merge -q --ff-only --autostash {rows[0]['commit']}")
    assert (second.status, candidate.status) == ("baseline", "maybe")
    lab.sh(second.next)  # asks for nothing
    log = lab.git("log", "--format=%h %s").splitlines()
    assert log == [f"{rows[0]['commit']} val_bpb {rows[0]['val_bpb']}: baseline", log[1]] and log[1].endswith(" begin")
    assert lab.git("diff", "HEAD~", "HEAD") == ""


def test_a_run_prints_its_summary_and_the_commit_holds_all_of_it(night):
    lab, (first, *_) = night
    assert first.code == 0 and first.errors == ""
    summary = first.output.split("---\n")[1].splitlines()[: len(SUMMARY)]
    assert [line.split(":")[0] for line in summary] == SUMMARY
    values = {key: value.strip() for key, value in (line.split(":") for line in summary)}
    row, body = lab.rows()[0], lab.git("show", "-s", "--format=%b", lab.rows()[0]["commit"])
    assert re.fullmatch(r"\d\.\d{6}", values["val_bpb"]) and values["val_bpb"] == row["val_bpb"]
    assert (values["seed"], values["fingerprint"]) == (row["seed"], row["fingerprint"]) and values["num_steps"] == "4"
    timeless = [line for line in summary if not line.startswith(("total_", "peak_"))]
    assert len(timeless) == 10 and set(timeless) < set(body.splitlines())
    assert float(row["memory_gb"]) > 0.1 and int(row["seconds"]) < 60 and 0 < float(values["training_seconds"]) < 5


# -- a verdict's command, in every state in which git may be -----------------------------------------------------------


def staged(lab: Lab) -> None:
    lab.git("add", "train.py")


def others(lab: Lab) -> None:
    (lab.folder / "program.md").write_text("other direction\n")
    lab.git("add", "program.md")
    with open(lab.folder / ".gitignore", "a") as file:
        file.write("scratch\n")


def detached(lab: Lab) -> None:
    lab.git("checkout", "-q", "--detach")


def nobody(lab: Lab) -> None:
    detached(lab)
    lab.git("config", "--unset", "user.name")
    lab.git("config", "--unset", "user.email")
    lab.env |= {"HOME": str(lab.folder.parent), "EMAIL": ""}
    lab.git("config", "user.useConfigOnly", "true")


def executable(lab: Lab) -> None:
    lab.git("update-index", "--chmod=+x", "train.py")
    lab.git("commit", "-qm", "chmod")
    lab.train.chmod(0o755)


def linked(lab: Lab) -> None:
    executable(lab)
    folder = lab.folder.parent / "linked tree"
    lab.git("worktree", "add", "-q", str(folder), "-b", "gpu-1")
    shutil.copy(lab.results, folder)
    lab.__init__(folder)


def below(lab: Lab) -> None:
    outer = Lab.create(lab.folder.parent / "larger", sub="a b/research")
    shutil.copy(lab.results, outer.folder)
    lab.__init__(outer.folder)


def plain(lab: Lab) -> None:
    pass


SITUATIONS = [plain, staged, others, nobody, linked, below]  # nobody is detached, linked is executable


def put_in(lab: Lab, situation, change: tuple[str, str]) -> None:
    """Into a situation; `staged` is about the edit, all others come before it."""
    if situation is not staged:
        situation(lab)
    lab.edit(change)
    if situation is staged:
        staged(lab)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_keep_leaves_the_branch_at_the_experiment_and_nothing_to_commit(begun, situation):
    lab = begun
    branch = lab.git("rev-parse", "--symbolic-full-name", "HEAD")
    put_in(lab, situation, BETTER)
    parent, before, edits = lab.git("rev-parse", "HEAD"), lab.state(), lab.git("diff", "HEAD", "--", ":/", ":!train.py")
    outcome = lab.run("4 -> 7 steps")
    assert lab.state() == before, "the harness touches neither branch nor index nor work tree"
    row = lab.rows()[-1]
    assert (outcome.status, row["status"], row["seed"]) == ("keep", "keep", "43"), outcome.errors
    assert outcome.next == f"git merge -q --ff-only --autostash {row['commit']}"
    assert ("left alone" in outcome.output) == (situation is others)
    assert situation is not others or re.search(r"left alone: .*\.gitignore.* program.md", outcome.output)
    lab.sh(outcome.next)
    assert lab.git("rev-parse", "--short", "HEAD") == row["commit"] and lab.git("rev-parse", "HEAD~") == parent
    assert lab.git("diff", "HEAD", "--", ":/", ":!train.py") == edits and bool(edits) == (situation is others)
    assert lab.git("status", "--porcelain", "-uall", "--", ":/", ":!program.md", ":!.gitignore") == ""
    assert lab.git("diff", "HEAD~", "HEAD", "--stat").count("|") == 1 and lab.git("stash", "list") == ""
    assert lab.train.read_text() == TRAIN.replace(*BETTER)
    if situation in (plain, staged, others):
        assert lab.git("rev-parse", "--symbolic-full-name", "HEAD") == branch == "refs/heads/main"
    author = lab.git("show", "-s", "--format=%an %cn")
    assert author == ("autoresearch autoresearch" if situation is nobody else "Ada Ada")


@pytest.mark.parametrize(
    "situation",
    [*SITUATIONS[:3], *(pytest.param(situation, marks=pytest.mark.slow) for situation in SITUATIONS[3:])],
    ids=lambda situation: situation.__name__,
)
def test_discard_leaves_everything_as_before(begun, situation):
    lab = begun
    if situation is not staged:
        situation(lab)
    before = lab.state()
    put_in(lab, staged if situation is staged else plain, WORSE)
    outcome = lab.run("fewer steps")
    row = lab.rows()[-1]
    assert (outcome.status, outcome.next, row["status"]) == ("discard", "git restore -SW train.py", "discard")
    lab.sh(outcome.next)
    lab.git("update-index", "--refresh", "-q") if situation is not others else None
    after = lab.state()
    index = 6  # git may write its bytes anew; what they say is in the others
    assert after[:index] == before[:index] and after[index + 1 :] == before[index + 1 :]
    assert lab.saved(row["commit"]) == TRAIN.replace(*WORSE), "a failed experiment is never lost"
    subject = lab.git("show", "-s", "--format=%s", row["commit"])
    assert re.fullmatch(rf"val_bpb {row['val_bpb']} \(\+0\.\d{{6}}, 1 seed\): fewer steps", subject)


NASTY = "it's \"1e-3\" \\ $(touch oops) `touch oops` $HOME * ; \t\n\r\u2028 über 学 -> --flag 100%  "


def test_maybe_repeats_with_the_next_seed_whatever_the_description_is(begun):
    lab = begun
    lab.edit(OTHER)
    clean = " ".join(NASTY.split())
    status = (outcome := lab.run(NASTY)).status
    assert status == "maybe" and outcome.next == f"uv run train.py {shlex.quote(clean)}"
    outcome = lab.sh(outcome.next)
    first, second = lab.rows()[-2:]
    assert outcome.status in ("keep", "discard") and not (lab.folder / "oops").exists()
    assert (first["description"], second["description"]) == (clean, clean)
    assert (first["seed"], second["seed"]) == ("42", "43") and first["code"] == second["code"]
    baseline, mean = (sum(float(row["val_bpb"]) for row in rows) / 2 for rows in (lab.rows()[:2], (first, second)))
    subject = lab.git("show", "-s", "--format=%s", second["commit"])
    found = re.fullmatch(r"val_bpb (\S+) \((\S+), 2 seeds\): (.*)", subject)
    assert found[3] == clean
    assert float(found[1]) == pytest.approx(mean, abs=2e-6)
    assert float(found[2]) == pytest.approx(mean - baseline, abs=2e-6)


# -- what happens while a run is under way -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status, change, description", [("keep", BETTER, "4 -> 7 steps"), ("maybe", OTHER, "lr"), ("discard", WORSE, "few")]
)
@pytest.mark.slow
def test_an_edit_during_the_run_is_neither_measured_nor_lost(begun, status, change, description):
    lab, measured = begun, TRAIN.replace(*change)
    lab.edit(change)
    run = lab.start(description, **hold(lab)).reached()
    lab.edit(("WIDTH = 8", "WIDTH = 9"))
    outcome = run.released()
    row, edited = lab.rows()[-1], measured.replace("WIDTH = 8", "WIDTH = 9")
    assert lab.train.read_text() == edited
    assert outcome.status == status and "train.py was edited during the run" in outcome.output.splitlines()[-2]
    assert lab.saved(row["commit"]) == measured
    lab.sh(outcome.next)
    assert lab.train.read_text() == measured
    if status == "keep":
        assert lab.git("rev-parse", "--short", "HEAD") == row["commit"] and lab.git("status", "--porcelain") == ""
    if status == "maybe":
        assert [row["seed"] for row in lab.rows()[-2:]] == ["42", "43"]
    assert lab.git("show", "stash@{0}:train.py") + "\n" == edited


def test_a_version_that_was_staged_and_not_measured_is_not_lost(begun):
    lab = begun
    lab.edit(WORSE, ("WIDTH = 8", "WIDTH = 9"))
    lab.git("add", "train.py")
    kept = lab.git("rev-parse", ":train.py")
    lab.edit(("WIDTH = 9", "WIDTH = 8"))
    outcome = lab.run("fewer steps")
    assert outcome.status == "discard"
    lab.sh(outcome.next)
    assert lab.git("rev-parse", "stash@{0}^2:train.py") == kept
    assert lab.train.read_text() == TRAIN.replace(*WORSE)


@pytest.mark.parametrize("edited", [False, True])
def test_when_head_moved_during_the_run_the_measured_version_is_brought_back(begun, edited):
    lab = begun
    lab.edit(BETTER)
    run = lab.start("4 -> 7 steps", **hold(lab)).reached()
    (lab.folder / "program.md").write_text("other direction\n")
    lab.git("commit", "-qm", "a human was here", "program.md")
    head = lab.git("rev-parse", "HEAD")
    if edited:
        lab.edit(("WIDTH = 8", "WIDTH = 9"))
    outcome = run.released()
    row = lab.rows()[-1]
    assert (outcome.status, row["status"]) == ("keep", "keep") and "HEAD moved during the run" in outcome.output
    lab.sh(outcome.next)
    assert lab.git("rev-parse", "HEAD") == head and lab.train.read_text() == TRAIN.replace(*BETTER)
    assert lab.git("rev-parse", f"{row['commit']}~") == lab.git("rev-parse", "HEAD~")
    assert bool(lab.git("stash", "list")) == edited


def test_a_train_py_that_disappears_during_the_run_comes_back(begun):
    lab = begun
    lab.edit(WORSE)
    run = lab.start("fewer steps", **hold(lab)).reached()
    lab.train.unlink()
    outcome = run.released()
    assert (outcome.code, outcome.status) == (0, "discard")
    lab.sh(outcome.next)
    assert lab.train.read_text() == TRAIN.replace(*WORSE)


def test_a_second_run_in_one_work_tree_is_refused_in_one_line_and_leaves_no_trace(begun):
    lab = begun
    lab.edit(CRASH)
    lab.edit(("    tokenizer =", '    Path(os.environ["RUN_HOLD"]).touch(); time.sleep(60)\n    tokenizer ='))
    run = lab.start("first", **hold(lab)).reached()
    before = lab.results.read_bytes(), refs(lab)
    second = lab.run("second")
    assert second.code == 1 and second.output == ""
    refusal = "another run is at work here; wait until it has ended"
    assert second.errors == f"error: {lab.folder}/.git/autoresearch: {refusal}\n"
    assert (lab.results.read_bytes(), refs(lab)) == before
    run.killed()
    assert lab.run("third", **hold(lab, "x"), RUN_GRACE="0.1").status == "timeout", "the lock ends with its process"


def test_two_runs_in_two_worktrees_do_not_disturb_each_other(begun, tmp_path):
    one = begun
    one.git("worktree", "add", "-q", str(tmp_path / "two"), "-b", "gpu-1")
    two = Lab(tmp_path / "two")
    one.edit(BETTER)
    runs = [one.start("4 -> 7 steps", **hold(one, "h1")), two.start("baseline", **hold(one, "h2"))]
    outcomes = [run.released() for run in [run.reached() for run in runs]]
    assert [outcome.status for outcome in outcomes] == ["keep", "keep"]
    for lab, outcome in zip((one, two), outcomes, strict=True):
        lab.sh(outcome.next)
        assert lab.git("rev-parse", "--short", "HEAD") == lab.rows()[-1]["commit"]
        assert lab.git("status", "--porcelain") == ""
    assert (len(one.rows()), len(two.rows())) == (4, 1)
    assert refs(one) == refs(two) == {row["commit"] for row in one.rows() + two.rows()}


# -- runs without a score ----------------------------------------------------------------------------------------------

OOM = ("        break\n", '        raise torch.OutOfMemoryError("out of memory: tried to allocate 640 GiB")\n')
NAN = ("    evaluate_bpb(", "    model.lm_head.weight.data.fill_(float('nan'))\n    evaluate_bpb(")
LEAK = ("return self.lm_head(self.wte(inputs))", "return self.lm_head(self.wte(inputs.roll(-1, 1)))")
SILENT = ("    evaluate_bpb(model, tokenizer, 16)\n", "")
RESEED = ("    model = Model()", "    torch.manual_seed(7)\n    model = Model()")
BUDGETS = ("    model = Model()", "    import prepare; prepare.TIME_BUDGET = 600\n    model = Model()")
DEEP = (
    "    model = Model()",
    "    def dig(n):\n        return [dig, fill][n % 2](n - 1) if n else 1 / 0\n"
    "    def fill(n):\n        return [dig, fill][n % 2](n - 1) if n else 1 / 0\n    model = dig(200)",
)


@pytest.mark.parametrize(
    "status, change, says",
    [
        ("crash", CRASH, "ZeroDivisionError: integer division or modulo by zero"),
        ("crash", DEEP, "ZeroDivisionError: division by zero"),
        ("crash", OOM, "out of memory: tried to allocate 640 GiB"),
        ("invalid", NAN, "error: the model's logits are not finite; look for an overflow or a division by zero"),
        ("invalid", LEAK, "error: the prediction at position .* a model must see only the past of its own row"),
        ("invalid", SILENT, "error: the run ended without a score; call evaluate_bpb once, after the training"),
        ("invalid", RESEED, "error: torch's seed is 7, not 42; leave seeds to the harness"),
        ("invalid", BUDGETS, "error: a constant of prepare.py was changed: TIME_BUDGET is 600, not .*"),
    ],
    ids="crash deep out-of-memory nan leak no-score reseeded budget".split(),
)
def test_a_run_without_a_score_has_a_row_and_a_commit_with_nan(begun, status, change, says):
    lab = begun
    lab.edit(change)
    before = lab.state()
    outcome = lab.run("an idea")
    assert lab.state() == before
    row = lab.rows()[-1]
    assert (outcome.code, outcome.status, row["status"], row["val_bpb"]) == (1, status, status, "nan")
    assert re.search(f"^(torch.OutOfMemoryError: )?{says}$", outcome.errors, re.M), outcome.errors
    assert len((outcome.output + outcome.errors).splitlines()) <= 40
    message = lab.git("show", "-s", "--format=%B", row["commit"])
    assert message.startswith(f"val_bpb nan ({status}): an idea\n\nval_bpb:          nan\n")
    assert re.search(says, message) and lab.saved(row["commit"]) == TRAIN.replace(*change)
    assert outcome.next == "git restore -SW train.py"
    lab.sh(outcome.next)
    assert lab.git("status", "--porcelain") == "" and lab.train.read_text() == TRAIN


def test_a_file_that_does_not_start_has_no_row(begun):
    lab = begun
    before = lab.results.read_bytes(), refs(lab)
    for text in ("def broken(:\n", "import nothing_like_this\n" + TRAIN):
        lab.train.write_text(text)
        outcome = lab.run("an idea")
        assert outcome.code == 1 and outcome.status == "" and "Error" in outcome.errors
    assert (lab.results.read_bytes(), refs(lab)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_interrupted_is_settled_as_killed(begun, number):
    lab = begun
    lab.edit(BETTER)
    run = lab.start("4 -> 7 steps", **hold(lab)).reached()
    running = lab.rows()[-1]
    assert (running["status"], running["val_bpb"], running["seed"]) == ("running", "nan", "43")
    assert lab.saved(running["commit"]) == TRAIN.replace(*BETTER)
    run.process.send_signal(number)
    outcome = run.wait()
    row = lab.rows()[-1]
    assert (outcome.code, outcome.status, row["status"], row["val_bpb"]) == (1, "killed", "killed", "nan")
    assert outcome.errors == "error: interrupted, so there is no score; start the run again\n"
    assert lab.saved(row["commit"]) == TRAIN.replace(*BETTER)
    assert refs(lab) == {row["commit"] for row in lab.rows()}, "the stand-in is gone"


def test_a_run_that_was_killed_is_settled_by_the_next_start(begun):
    lab = begun
    lab.edit(BETTER)
    lab.start("power loss", **hold(lab)).reached().killed()
    assert lab.rows()[-1]["status"] == "running"
    lab.train.write_text(TRAIN.replace(*CRASH))
    lab.run("next")
    killed, last = lab.rows()[-2:]
    assert (killed["status"], killed["val_bpb"], killed["description"]) == ("killed", "nan", "power loss")
    assert (last["status"], last["description"]) == ("crash", "next")
    assert lab.git("show", "-s", "--format=%s", killed["commit"]) == "val_bpb nan (killed): power loss"
    assert lab.saved(killed["commit"]) == TRAIN.replace(*BETTER)
    assert refs(lab) == {row["commit"] for row in lab.rows()}


def test_a_running_row_of_another_clone_does_not_stop_a_run(begun):
    lab = begun
    lab.results.write_text(re.sub(r"\w{7}(\t\S+\t\S+\t)maybe", r"0123abc\1running", lab.results.read_text()))
    lab.edit(CRASH)
    assert lab.run("next").status == "crash"
    assert [(row["commit"], row["status"]) for row in lab.rows()[2:]][0] == ("0123abc", "killed")
    assert len(lab.rows()) == 4


def test_the_watchdog_ends_a_hang_and_settles_it(begun):
    lab = begun
    lab.edit(("    for _ in run.steps():", "    time.sleep(600)  # the hang\n    for _ in run.steps():"))
    began = time.monotonic()
    outcome = lab.run("a hang", RUN_GRACE="0.5")
    assert time.monotonic() - began < 20
    row = lab.rows()[-1]
    assert (outcome.code, outcome.status, row["status"], row["val_bpb"]) == (1, "timeout", "timeout", "nan")
    line = 1 + lab.train.read_text().splitlines().index("    time.sleep(600)  # the hang")
    assert f'train.py", line {line} in train' in outcome.errors, "the stacks show where it hangs"
    assert f"error: not done in {BUDGET + 0.5} s" in outcome.errors
    assert len((outcome.output + outcome.errors).splitlines()) <= 40
    assert "# the hang" in lab.saved(row["commit"])
    lab.sh(outcome.next)
    assert lab.git("status", "--porcelain") == ""


# -- what a run is compared with ---------------------------------------------------------------------------------------


def test_a_candidate_without_a_baseline_is_unjudged_until_the_printed_command_has_measured_one(tmp_path):
    lab = Lab.create(tmp_path / "new")
    lab.edit(BETTER)
    outcome = lab.run("4 -> 7 steps")
    assert outcome.status == "unjudged" and "cannot be judged" in outcome.output.splitlines()[0]
    assert outcome.next in outcome.output.splitlines()[0], "said at the start, too"
    assert re.fullmatch(r"val_bpb \S+ \(unjudged\): .*", lab.git("log", "-1", "--format=%s", lab.rows()[0]["commit"]))
    baseline = lab.sh(outcome.next)
    assert baseline.status == "keep" and lab.train.read_text() == TRAIN.replace(*BETTER)
    lab.sh(baseline.next)  # the branch gets its first number beneath the edit
    assert lab.git("log", "-1", "--format=%s").endswith(": baseline")
    assert lab.train.read_text() == TRAIN.replace(*BETTER)
    outcome = lab.run("4 -> 7 steps")
    assert outcome.status == "keep" and [row["seed"] for row in lab.rows()] == ["42", "42", "43"]
    lab.sh(outcome.next)
    assert lab.git("status", "--porcelain") == ""


@pytest.mark.slow
def test_the_command_for_the_unjudged_gives_the_edit_back_also_if_the_baseline_crashes(tmp_path):
    lab = Lab.create(tmp_path / "new")
    lab.edit(CRASH)
    lab.git("commit", "-qam", "begin with a crash")
    lab.edit((CRASH[1], CRASH[0]), OTHER)
    mended = lab.train.read_text()
    outcome = lab.run("mended")
    assert outcome.status == "unjudged"
    lab.sh(outcome.next, check=False)
    assert lab.train.read_text() == mended and lab.git("stash", "list") == ""
    outcome = lab.run("mended")
    assert outcome.status == "keep", "where the branch's code never had a score, any score is a beginning"
    lab.sh(outcome.next)
    assert lab.git("status", "--porcelain") == "" and lab.train.read_text() == mended


@pytest.mark.parametrize("edited", [False, True], ids=["as committed", "edited since"])
@pytest.mark.slow
def test_what_was_committed_by_hand_is_given_back_to_be_judged(begun, edited):
    lab = begun
    measured = lab.git("rev-parse", "HEAD")
    lab.edit(OTHER)
    lab.git("commit", "-qam", "by hand")
    if edited:
        lab.edit(("WIDTH = 8", "WIDTH = 9"))
    text = lab.train.read_text()
    outcome = lab.run("an idea")
    short = lab.git("rev-parse", "--short", measured)
    assert (outcome.status, outcome.next) == ("unjudged", f"git reset --soft {short}")
    lab.sh(outcome.next)
    assert lab.git("rev-parse", "HEAD") == measured and lab.train.read_text() == text
    outcome = lab.run("an idea")
    assert outcome.status in ("keep", "discard") and lab.rows()[-1]["seed"] == "43"
    lab.sh(outcome.next)
    assert lab.git("status", "--porcelain") == ""


@pytest.mark.slow
def test_seeds_are_the_lowest_that_this_code_has_not_finished_and_old_ones_can_be_reproduced(begun):
    lab = begun
    again = lab.run("again", SEED="43")
    assert again.status == "baseline"
    assert again.output.count("left alone") == 0
    same = "val_bpb status seed code fingerprint".split()
    assert [lab.rows()[-1][name] for name in same] == [lab.rows()[1][name] for name in same]
    lab.train.write_text(TRAIN.replace("    evaluate_bpb(", '    assert "CRASH" not in os.environ\n    evaluate_bpb('))
    assert lab.run("x", CRASH="1").status == lab.run("x", CRASH="1").status == "crash"
    assert lab.run("x", CRASH="1", SEED="77").status == "crash"
    assert [row["seed"] for row in lab.rows()[-3:]] == ["42", "42", "77"], "a crash finishes no seed"
    bad = lab.run("x", SEED="-1")
    assert (bad.code, bad.errors) == (1, "error: SEED is '-1', not a whole number; unset it\n")
    assert len(lab.rows()) == 7


def rewrite(lab: Lab, scores: dict[int, float]) -> None:
    """Give the rows of results.tsv other scores."""
    rows = lab.rows()
    for i, score in scores.items():
        rows[i]["val_bpb"] = f"{score:.6f}"
    lab.results.write_text("".join("\t".join(fields) + "\n" for fields in (COLUMNS, *(row.values() for row in rows))))


@pytest.mark.slow
def test_reruns_never_turn_a_discard_into_a_keep_and_a_seed_counts_once(begun):
    lab = begun
    lab.edit(BETTER)
    lab.run("4 -> 7 steps")
    rewrite(lab, {2: 9.0, 3: 9.0})  # two bad runs, on record
    for seed in ("42", "43", ""):
        outcome = lab.run("4 -> 7 steps", **({"SEED": seed} if seed else {}))
        assert outcome.status == "discard", "however good the later ones are"
    assert lab.rows()[-1]["seed"] == "44" and float(lab.rows()[-1]["val_bpb"]) < float(lab.rows()[0]["val_bpb"])


def test_a_score_of_another_fingerprint_is_nothing_to_compare_with(begun):
    lab = begun
    with open(lab.folder / "prepare.py", "a") as file:
        file.write("# another version\n")
    lab.git("commit", "-qm", "new version", "prepare.py")
    outcome = lab.run("baseline")
    assert outcome.status == "keep" and lab.rows()[-1]["seed"] == "42"
    assert lab.rows()[-1]["fingerprint"] != lab.rows()[0]["fingerprint"]


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_prepare_py_that_differs_from_heads_is_refused_before_the_training(begun):
    lab = begun
    lab.edit(CRASH)
    with open(lab.folder / "prepare.py", "a") as file:
        file.write("# mine\n")
    before = lab.results.read_bytes(), refs(lab), lab.state()
    outcome = lab.run("an idea")
    assert outcome.code == 1 and outcome.output == "" and outcome.errors.count("\n") == 1
    command = re.search("error: prepare.py differs from HEAD's.*; (git .*)", outcome.errors)[1]
    assert (lab.results.read_bytes(), refs(lab), lab.state()) == before
    lab.sh(command)
    assert lab.run("an idea").status == "crash", "now it starts"
    lab.sh("git stash pop -q")
    assert (lab.folder / "prepare.py").read_text().endswith("# mine\n")


@pytest.mark.parametrize("trouble", ["no repository", "no commit", "no train.py", "no git"])
def test_without_git_only_the_score_is_printed(tmp_path, trouble):
    lab = Lab.create(tmp_path / "new")
    if trouble == "no git":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "uv").symlink_to(shutil.which("uv", path=lab.env["PATH"]))
        lab.env["PATH"] = str(tmp_path / "bin")
    elif trouble == "no train.py":
        lab.git("rm", "-q", "--cached", "train.py")
        lab.git("commit", "-qm", "without")
    else:
        shutil.rmtree(lab.folder / ".git")
        lab.env["GIT_CEILING_DIRECTORIES"] = str(tmp_path)
        if trouble == "no commit":
            lab.git("init", "-q")
    outcome = lab.run("a run")
    assert outcome.code == 0 and outcome.errors == "" and outcome.status == "" and not lab.results.exists()
    assert re.search(r"^val_bpb: +\d\.\d{6}$", outcome.output, re.M)
    assert re.match(r"note: the score is printed and not recorded: .*\n---\n", outcome.output)
    lab.train.write_text(TRAIN.replace(*CRASH))
    outcome = lab.run("a run")
    assert outcome.code == 1 and "ZeroDivisionError" in outcome.errors and outcome.status == ""


def good_row(i: int, **more: str) -> dict[str, str]:
    row = (f"{i + 0xABC0000:x}", f"1.{i:06}", "1.0", "discard", f"idea {i}", "42", f"{i:012x}", "0123abcd", "380")
    return dict(zip(COLUMNS, row, strict=True)) | more


HEADER = "\t".join(COLUMNS) + "\n"
LINES = ["\t".join(good_row(i).values()) + "\n" for i in range(3)]
DAMAGE = {
    "half a line at the end": (HEADER + "".join(LINES) + LINES[0][:20], 5, [0, 1, 2]),
    "a cut-off number at the end": (HEADER + "".join(LINES)[:-2], 4, [0, 1]),
    "half a line in the middle": (HEADER + LINES[0] + LINES[1][:30] + "\n" + LINES[2], 3, [0, 2]),
    "two lines in one": (HEADER + LINES[0] + LINES[1].strip() + LINES[2], 3, [0]),
    "a foreign header": ("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n" + "".join(LINES), 1, [0, 1, 2]),
    "a foreign file": ("commit\tval_bpb\tmemory_gb\tstatus\tdescription\na1b2c3d\t0.99\t44.0\tkeep\tbase\n", 1, []),
    "no header": ("".join(LINES), 1, [0, 1, 2]),
    "Windows line ends": ((HEADER + "".join(LINES)).replace("\n", "\r\n"), 1, [0, 1, 2]),
    "one Windows line end": (HEADER + LINES[0] + LINES[1].replace("\n", "\r\n") + LINES[2], 3, [0, 1, 2]),
    "spaces instead of tabs": (HEADER + LINES[0] + LINES[1].replace("\t", "  ") + LINES[2], 3, [0, 2]),
    "a conflict marker": (HEADER + "<<<<<<< HEAD\n" + "".join(LINES), 2, [0, 1, 2]),
    "no number": (HEADER + LINES[0] + LINES[1].replace("1.000001", "1.0.1"), 3, [0]),
    "not UTF-8": (HEADER + LINES[0] + LINES[1].replace("idea", "id\udcff"), 3, [0]),
    "zeros after a power loss": (HEADER + LINES[0] + "\0" * 40, 3, [0]),
    "nothing": ("", 1, []),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_results_tsv_is_reported_with_the_line_and_set_aside(tmp_path, monkeypatch, capsys, damage):
    text, line, good = DAMAGE[damage]
    raw = text.encode("utf-8", "surrogateescape")
    monkeypatch.setattr(prepare, "RESULTS", results := tmp_path / "results.tsv")
    results.write_bytes(raw)
    assert prepare.read_results() == [good_row(i) for i in good]
    said = capsys.readouterr().out
    assert re.fullmatch(rf"note: .*results.tsv .*\bline {line}\b.*{len(good)} good rows.*\n", said)
    assert results.read_bytes() == raw and len(list(tmp_path.iterdir())) == 1, "looking changes nothing"
    assert prepare.read_results(set_aside=True) == [good_row(i) for i in good]
    (aside,) = (path for path in tmp_path.iterdir() if path != results)
    assert aside.read_bytes() == raw and aside.name in capsys.readouterr().out
    assert results.read_text() == HEADER + "".join(LINES[i] for i in good)
    assert prepare.read_results(set_aside=True) == [good_row(i) for i in good]
    assert capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 2


def test_results_are_read_as_they_were_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "RESULTS", tmp_path / "results.tsv")
    assert prepare.read_results() == []
    rows = [good_row(0), good_row(1, val_bpb="nan", description=""), good_row(2, description="'\"\\ \x00 \x1b ü 学 ")]
    prepare.write_results(rows)
    assert prepare.read_results(set_aside=True) == rows
    assert capsys.readouterr().out == ""


NO_ROWS = st.text() | st.sampled_from([LINES[0][:30], LINES[0].upper(), HEADER.strip(), "\t"])


@given(st.lists(st.integers(0, 99) | NO_ROWS))
@settings(max_examples=300, deadline=None)
def test_good_rows_are_read_in_whatever_company(tmp_path_factory, lines):
    good = [good_row(i) for i in lines if isinstance(i, int)]
    raw = HEADER + "".join("\t".join(good_row(i).values()) + "\n" if isinstance(i, int) else f"{i}\n" for i in lines)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(prepare, "RESULTS", tmp_path_factory.mktemp("fuzz") / "results.tsv")
        prepare.RESULTS.write_bytes(raw.encode("utf-8", "replace"))
        assert prepare.read_results(set_aside=True) == prepare.read_results() == good
    assert ("damaged in line" in said.getvalue()) == (len(good) < len(lines))


def test_a_run_keeps_the_good_rows_of_a_damaged_results_tsv_and_the_damaged_file(begun):
    lab = begun
    with open(lab.results, "a") as file:
        file.write("3262a31\t3.30")
    damaged = lab.results.read_bytes()
    lab.edit(WORSE)
    outcome = lab.run("fewer steps")
    assert outcome.status == "discard" and "damaged in line 5" in outcome.output
    assert [row["status"] for row in lab.rows()] == ["keep", "baseline", "maybe", "discard"]
    (aside,) = lab.folder.glob("results.tsv.*")
    assert aside.read_bytes() == damaged
    lab.sh(outcome.next)
    assert lab.git("status", "--porcelain") == ""


def test_a_results_tsv_that_cannot_be_written_stops_the_run_before_the_training(begun):
    lab = begun
    lab.results.unlink()
    lab.results.mkdir()
    outcome = lab.run("an idea")
    assert outcome.code == 1 and "results.tsv" in outcome.errors and "---" not in outcome.output


# -- the morning report ------------------------------------------------------------------------------------------------


def morning(folder: Path, count: int, crashes_only: bool = False) -> tuple[Lab, list[dict[str, str]]]:
    """A repository after `count` runs: each tenth or so crashed, some were kept; returns the rows that were."""
    lab = Lab.create(folder)
    rng, rows, kept, level = random.Random(count), [], [], 1.15
    for i in range(count):
        row = good_row(i)
        if crashes_only or (i and rng.random() < 0.1):
            row |= {"val_bpb": "nan", "status": "crash"}
        elif i == 0 or rng.random() < 0.15:
            level -= abs(rng.gauss(0, 0.004)) * (i > 0)
            lab.git("commit", "-q", "--allow-empty", "-m", f"val_bpb {level:.6f}")
            row |= {"val_bpb": f"{level:.6f}", "status": "keep", "commit": lab.git("rev-parse", "--short", "HEAD")}
            kept.append(row)
        else:
            row["val_bpb"] = f"{3.2 if i == 7 else level + abs(rng.gauss(0, 0.006)):.6f}"
        rows.append(row)
    lines = (COLUMNS, *(row.values() for row in rows))
    lab.results.write_text("".join("\t".join(fields) + "\n" for fields in lines))
    return lab, kept


def png_size(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and raw[-8:-4] == b"IEND"
    assert len(raw) > 10_000
    return struct.unpack(">II", raw[16:24])


@pytest.mark.parametrize("count, crashes_only", [(1, False), (3, False), (40, False), (150, False), (5, True)])
def test_the_report_counts_compares_and_draws(tmp_path, count, crashes_only):
    lab, kept = morning(tmp_path / "night", count, crashes_only)
    before = lab.results.read_bytes(), lab.state()
    outcome = lab.sh("uv run prepare.py --report")
    assert (lab.results.read_bytes(), lab.state()) == before
    assert png_size(lab.folder / "progress.png") == (1440, 720)
    failed = sum(row["val_bpb"] == "nan" for row in lab.rows())
    first, second, *rest = outcome.output.splitlines()
    hours = count * 380 / 3600
    assert first == f"{count} experiments in {hours:.1f} hours of running, {count / hours:.1f} per hour"
    dropped = count - failed - len(kept)
    assert second == f"{len(kept)} kept, {dropped} dropped or repeated, {failed} without a score"
    assert rest[-1] == f"chart: {lab.folder / 'progress.png'}"
    if crashes_only:
        assert kept == [] and failed == 5 and "->" not in outcome.output
        return
    values = [float(row["val_bpb"]) for row in kept]
    assert rest[0].startswith(f"val_bpb {values[0]:.6f} -> {min(values):.6f} ({min(values) - values[0]:+.6f}, ")
    table = rest[2 : 2 + len(kept)]
    for line, row, value, before in zip(table, kept, values, [None, *values], strict=False):
        gain = f"{value - before:+.6f}" if before else "-"
        assert line.split(maxsplit=3) == [row["commit"], f"{value:.6f}", gain, row["description"]]
    assert len(kept) > count / 20 and (count < 40 or failed)


@pytest.mark.slow
def test_the_report_of_a_real_night_names_what_is_pending_and_takes_means_over_seeds(begun):
    lab = begun
    outcome = lab.sh("uv run prepare.py --report")
    rows = lab.rows()
    mean = (float(rows[0]["val_bpb"]) + float(rows[1]["val_bpb"])) / 2
    assert f"\n{rows[0]['commit']}  {mean:.6f}          -  baseline\n" in outcome.output
    assert f"\npending: {rows[2]['commit']}  {rows[2]['val_bpb']}  maybe: 4 -> 7 steps\n" in outcome.output
    lab.edit(BETTER)
    keep = lab.run("4 -> 7 steps")
    lab.sh("git commit -q --allow-empty -m unrelated")
    pending = f"pending: {lab.rows()[-1]['commit']}  {lab.rows()[-1]['val_bpb']}  keep: 4 -> 7 steps\n"
    assert pending in lab.sh("uv run prepare.py --report").output
    lab.git("reset", "-q", "--soft", "HEAD~")
    lab.sh(keep.next)
    outcome = lab.sh("uv run prepare.py --report")
    assert "pending" not in outcome.output and "2 kept, 2 dropped or repeated, 0 without a score" in outcome.output


def test_the_report_before_the_first_run_says_what_to_do(tmp_path):
    lab = Lab.create(tmp_path / "new")
    outcome = lab.sh("uv run prepare.py --report", check=False)
    assert (outcome.code, outcome.output) == (1, "")
    assert outcome.errors == f"error: {lab.results}: no experiments yet; run: uv run train.py baseline\n"
    lab.results.write_text(HEADER)
    assert lab.sh("uv run prepare.py --report", check=False).code == 1


def test_the_report_works_without_git_and_with_odd_descriptions(tmp_path):
    lab, _ = morning(tmp_path / "night", 3)
    shutil.rmtree(lab.folder / ".git")
    lab.results.write_text(lab.results.read_text().replace("idea 1", r"cost $O(n^2$ {x_1} \frac ü 学"))
    outcome = lab.sh("uv run prepare.py --report", GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert "\n0 kept, 3 dropped or repeated" in outcome.output and outcome.errors == ""
    assert png_size(lab.folder / "progress.png") == (1440, 720)


@pytest.mark.slow
def test_a_run_of_its_own_process_does_the_same(tmp_path):
    lab = Lab.create(tmp_path / "new")
    (lab.folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "short.py", lab.folder / "tests")
    command = [sys.executable, "tests/short.py", "0.5", "train.py", "baseline"]
    env = lab.env | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=lab.folder, env=env, capture_output=True, text=True, timeout=120)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert (outcome.code, outcome.status, outcome.errors) == (0, "keep", "")
    lab.sh(outcome.next)
    assert lab.git("log", "-1", "--format=%s") == f"val_bpb {lab.rows()[0]['val_bpb']}: baseline"
    assert os.listdir(lab.folder / ".git" / "refs" / "autoresearch") == [lab.rows()[0]["commit"]]

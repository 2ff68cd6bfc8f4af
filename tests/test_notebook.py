"""The notebook: in real repositories, by the real command line; every printed command is run as printed."""

import re
import shlex
import signal
import threading
import time

import pytest
from helpers.lab import BETTER, CRASH, OTHER, TRAIN, WORSE, Lab, Outcome
from helpers.records import blob, record, write_records

MORE_EDITS = ("WIDTH = 8", "WIDTH = 9")
SUMMARY = (
    "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M "
    "depth startup_seconds eval_seconds seed fingerprint"
).split()


def hold(lab: Lab) -> dict[str, str]:
    return {"RUN_HOLD": str(lab.folder.parent / f"hold-{lab.folder.name}")}


def test_a_night_is_a_table_and_the_kept_ones_a_log(night):
    lab, (first, second, candidate) = night
    rows = lab.rows()
    assert [row["status"] for row in rows] == ["keep", "baseline", "maybe"]
    assert [row["seed"] for row in rows] == ["42", "43", "42"]
    assert [row["description"] for row in rows] == ["baseline", "baseline", "4 -> 7 steps"]
    assert [row["code"] for row in rows] == [
        blob(text)[:12] for text in (TRAIN, TRAIN, TRAIN.replace(*BETTER))
    ]
    assert [(row["steps"], row["branch"]) for row in rows] == [("4", "main"), ("4", "main"), ("7", "main")]
    assert len({row["fingerprint"] for row in rows}) == 1
    assert len({row["commit"] for row in rows}) == 3
    assert (first.status, first.next) == ("keep", f"git merge -q --ff-only --autostash {rows[0]['commit']}")
    assert (second.status, second.next) == ("baseline", "# edit train.py")
    assert (candidate.status, candidate.next) == ("maybe", "uv run train.py '4 -> 7 steps'")
    log = lab.git("log", "--format=%h %s").splitlines()
    assert len(log) == 2 and log[1].endswith(" begin")
    assert log[0] == f"{rows[0]['commit']} val_bpb {rows[0]['val_bpb']}: baseline"
    assert lab.git("diff", "HEAD~", "HEAD") == ""


def test_the_commit_holds_the_whole_summary(night):
    lab, (first, *_) = night
    assert first.code == 0 and first.errors == ""
    assert first.output.startswith("experiment: small scale, 5 s, seed 42, ")
    summary = first.output.split("---\n")[1].splitlines()[: len(SUMMARY)]
    values = {}
    for line in summary:
        key, value = line.split(":")
        values[key] = value.strip()
    assert list(values) == SUMMARY
    row = lab.rows()[0]
    assert re.fullmatch(r"\d\.\d{6}", values["val_bpb"]) and values["val_bpb"] == row["val_bpb"]
    assert values["num_steps"] == row["steps"] == "4"
    assert (values["seed"], values["fingerprint"]) == (row["seed"], row["fingerprint"])
    assert 0 < float(values["training_seconds"]) < 5
    assert float(row["memory_gb"]) > 0.1 and int(row["seconds"]) < 60
    timeless = {line for line in summary if not line.startswith(("total_", "peak_"))}
    assert len(timeless) == 10
    assert timeless < set(lab.git("show", "-s", "--format=%b", row["commit"]).splitlines())


# -- a verdict's command, in every state in which git may be -----------------------------------------------


def plain(lab: Lab) -> None:
    pass


def staged(lab: Lab) -> None:
    lab.git("add", "train.py")


def others(lab: Lab) -> None:
    (lab.folder / "program.md").write_text("other direction\n")
    lab.git("add", "program.md")
    with open(lab.folder / ".gitignore", "a") as file:
        file.write("scratch\n")


def nobody(lab: Lab) -> None:
    lab.git("config", "--unset", "user.name")
    lab.git("config", "--unset", "user.email")
    lab.git("config", "user.useConfigOnly", "true")
    lab.env |= {"HOME": str(lab.folder.parent), "EMAIL": ""}


def linked_executable(lab: Lab) -> None:
    lab.git("update-index", "--chmod=+x", "train.py")
    lab.git("commit", "-qm", "chmod")
    lab.train.chmod(0o755)
    folder = lab.folder.parent / "linked tree"
    lab.git("worktree", "add", "-q", str(folder), "-b", "gpu-1")
    lab.__init__(folder)


def below(lab: Lab) -> None:
    outer = Lab.create(lab.folder.parent / "larger", sub="a b/research")
    outer.git("fetch", "-q", str(lab.folder), "+refs/autoresearch/*:refs/autoresearch/*")
    lab.__init__(outer.folder)


def put_in(lab: Lab, situation, change: tuple[str, str]) -> None:
    """Into a situation; `staged` is about the edit, all others come before it."""
    if situation is not staged:
        situation(lab)
    lab.edit(change)
    if situation is staged:
        staged(lab)


SITUATIONS = [plain, staged, others, nobody, linked_executable, below]


def name_of(situation) -> str:
    return situation.__name__


@pytest.mark.parametrize("situation", SITUATIONS, ids=name_of)
def test_keep_leaves_nothing_to_commit(begun, situation):
    lab = begun
    put_in(lab, situation, BETTER)
    branch = lab.git("symbolic-ref", "HEAD")
    parent = lab.git("rev-parse", "HEAD")
    before = lab.state()
    edits = lab.git("diff", "HEAD", "--", ":/", ":!train.py")
    outcome = lab.run("4 -> 7 steps")
    assert lab.state() == before, "the harness touches neither branch nor index nor work tree"
    row = lab.rows()[-1]
    assert (outcome.status, row["status"], row["seed"]) == ("keep", "keep", "43"), outcome.errors
    assert outcome.next == f"git merge -q --ff-only --autostash {row['commit']}"
    assert ("left alone" in outcome.output) == (situation is others)
    assert situation is not others or re.search(r"left alone: .*\.gitignore.* program.md", outcome.output)

    lab.sh(outcome.next)
    assert lab.git("rev-parse", "--short", "HEAD") == row["commit"]
    assert lab.git("rev-parse", "HEAD~") == parent and lab.git("symbolic-ref", "HEAD") == branch
    assert lab.git("diff", "HEAD", "--", ":/", ":!train.py") == edits
    assert bool(edits) == (situation is others)
    assert lab.git("status", "--porcelain", "-uall", "--", ":/", ":!program.md", ":!.gitignore") == ""
    assert lab.git("diff", "HEAD~", "HEAD", "--stat").count("|") == 1
    assert lab.git("stash", "list") == "" and lab.edited() == []
    assert lab.train.read_text() == TRAIN.replace(*BETTER)
    author = lab.git("show", "-s", "--format=%an %cn")
    assert author == ("autoresearch autoresearch" if situation is nobody else "Ada Ada")


@pytest.mark.parametrize(
    "situation",
    [
        plain,
        staged,
        others,
        *(pytest.param(situation, marks=pytest.mark.slow) for situation in SITUATIONS[3:]),
    ],
    ids=name_of,
)
def test_discard_leaves_everything_as_before(begun, situation):
    lab = begun
    if situation is not staged:
        situation(lab)
    before = lab.state()
    put_in(lab, staged if situation is staged else plain, WORSE)
    outcome = lab.run("fewer steps")
    row = lab.rows()[-1]
    assert (outcome.status, row["status"]) == ("discard", "discard")
    assert outcome.next == "git restore -SW train.py"
    lab.sh(outcome.next)
    assert lab.state()[:-1] == before[:-1], "git may write the index anew; what it says is in the others"
    assert lab.edited() == []
    assert lab.saved(row["commit"]) == TRAIN.replace(*WORSE), "a failed experiment is never lost"
    subject = lab.git("show", "-s", "--format=%s", row["commit"])
    assert re.fullmatch(rf"val_bpb {row['val_bpb']} \(\+0\.\d{{6}}, 1 seed\): fewer steps", subject)


NASTY = 'it\'s "1e-3" \\ $(touch oops) `touch oops` $HOME * ; \t\n\r\u2028 status: keep 学 \udcff -> 1%  '


def test_maybe_repeats_whatever_the_description(begun):
    lab = begun
    lab.edit(OTHER)
    clean = " ".join(NASTY.replace("\udcff", "?").split())
    outcome = lab.run(NASTY)
    assert (outcome.status, outcome.next) == ("maybe", f"uv run train.py {shlex.quote(clean)}")
    outcome = lab.sh(outcome.next)
    first, second = lab.rows()[-2:]
    assert outcome.status == "keep" and not (lab.folder / "oops").exists()
    assert first["description"] == second["description"] == clean
    assert (first["seed"], second["seed"]) == ("42", "43") and first["code"] == second["code"]
    baseline, mean = (
        sum(float(row["val_bpb"]) for row in rows) / 2 for rows in (lab.rows()[:2], lab.rows()[-2:])
    )
    subject = lab.git("show", "-s", "--format=%s", second["commit"])
    found = re.fullmatch(r"val_bpb (\S+) \((\S+), 2 seeds\): (.*)", subject)
    assert found[3] == clean
    assert float(found[1]) == pytest.approx(mean, abs=2e-6)
    assert float(found[2]) == pytest.approx(mean - baseline, abs=2e-6)


def test_a_long_description_is_cut_with_a_note(begun):
    lab = begun
    lab.edit(CRASH)
    outcome = lab.run("word " * 1000)
    assert outcome.output.startswith("note: the description is cut after 200 characters\n")
    assert lab.rows()[-1]["description"] == ("word " * 40).strip()


def test_commands_work_in_the_folder_of_the_user(begun):
    lab = begun
    below(lab)
    sub = lab.folder / "it's a sub"
    sub.mkdir()
    lab.edit(WORSE)
    outcome = lab.sh('cd it*sub && uv run ../train.py "fewer steps"')
    assert outcome.next == f"cd {shlex.quote(str(lab.folder))} && git restore -SW train.py"
    lab.sh(f"cd it*sub && {outcome.next}")
    assert lab.train.read_text() == TRAIN and lab.is_clean()
    lab.edit(BETTER)
    outcome = lab.sh('cd / && uv run "$OLDPWD/train.py" better')
    lab.sh(f"cd / && {outcome.next}")
    assert lab.git("log", "-1", "--format=%s").endswith(": better") and lab.is_clean()


def test_a_baseline_from_another_folder_has_a_next_command(begun):
    lab = begun
    outcome = lab.sh('cd .. && uv run "$OLDPWD/train.py" baseline')
    assert outcome.status == "baseline"
    lab.sh(f"cd .. && {outcome.next}")


def test_a_repository_of_sha256_hashes(tmp_path, cache):
    lab = Lab.create(tmp_path / "sha256", "--object-format=sha256")
    outcome = lab.run("baseline")
    assert outcome.status == "keep", outcome.errors
    lab.sh(outcome.next)
    assert lab.is_clean()


def test_git_dir_of_a_hook_is_ignored(begun, tmp_path):
    lab = begun
    other = Lab.create(tmp_path / "other")
    before = other.state()
    lab.edit(CRASH)
    places = {"GIT_DIR": f"{other.folder}/.git", "GIT_WORK_TREE": str(other.folder)}
    outcome = lab.run("an idea", **places, GIT_INDEX_FILE=f"{other.folder}/.git/index")
    assert outcome.status == "crash" and lab.record()[-1]["status"] == "crash"
    assert other.state() == before and other.record() == []


# -- what happens while a run is under way -----------------------------------------------------------------


@pytest.mark.parametrize("status, change", [("keep", BETTER), ("maybe", OTHER), ("discard", WORSE)])
def test_an_edit_during_a_run_is_not_lost(begun, status, change):
    lab = begun
    measured = TRAIN.replace(*change)
    edited = measured.replace(*MORE_EDITS)
    lab.edit(change)
    run = lab.start("an idea", **hold(lab)).reached()
    lab.edit(MORE_EDITS)
    outcome = run.released()
    row = lab.rows()[-1]
    assert outcome.status == status and lab.saved(row["commit"]) == measured
    assert lab.train.read_text() == edited and lab.edited() == [edited]
    name = f"train.py.edited-{blob(edited)[:7]}"
    said = outcome.output.splitlines()[-2]
    assert said == f"train.py was edited meanwhile; the edit is saved as {name}"
    lab.sh(outcome.next)
    assert lab.train.read_text() == (TRAIN if status == "discard" else measured)
    assert lab.git("stash", "list") == "" and lab.edited() == [edited]
    assert lab.is_clean() == (status != "maybe"), "what was saved is ignored"
    if status == "keep":
        assert lab.git("rev-parse", "--short", "HEAD") == row["commit"]
    if status == "maybe":
        assert [row["seed"] for row in lab.rows()[-2:]] == ["42", "43"]


@pytest.mark.parametrize("status, change", [("keep", BETTER), ("discard", WORSE)])
def test_a_staged_version_is_not_lost(begun, status, change):
    lab = begun
    measured = TRAIN.replace(*change)
    lab.edit(change, MORE_EDITS)
    lab.git("add", "train.py")
    lab.edit((MORE_EDITS[1], MORE_EDITS[0]))
    outcome = lab.run("an idea")
    assert outcome.status == status
    lab.sh(outcome.next)
    assert lab.edited() == [measured.replace(*MORE_EDITS)]
    assert lab.train.read_text() == (measured if status == "keep" else TRAIN)
    assert lab.is_clean()


@pytest.mark.parametrize("edited", [False, True])
def test_head_may_move_during_a_run(begun, edited):
    lab = begun
    lab.edit(BETTER)
    run = lab.start("4 -> 7 steps", **hold(lab)).reached()
    (lab.folder / "program.md").write_text("other direction\n")
    lab.git("commit", "-qm", "a human was here", "program.md")
    head = lab.git("rev-parse", "HEAD")
    if edited:
        lab.edit(MORE_EDITS)
    outcome = run.released()
    row = lab.rows()[-1]
    assert (outcome.status, row["status"]) == ("keep", "keep")
    assert "HEAD moved during the run" in outcome.next
    lab.sh(outcome.next)
    assert lab.git("rev-parse", "HEAD") == head and lab.train.read_text() == TRAIN.replace(*BETTER)
    assert lab.git("rev-parse", f"{row['commit']}~") == lab.git("rev-parse", "HEAD~")
    assert lab.edited() == [TRAIN.replace(*BETTER).replace(*MORE_EDITS)] * edited
    assert lab.git("stash", "list") == ""


def test_a_deleted_train_py_comes_back(begun):
    lab = begun
    lab.edit(WORSE)
    run = lab.start("fewer steps", **hold(lab)).reached()
    lab.train.unlink()
    outcome = run.released()
    assert (outcome.code, outcome.status) == (0, "discard")
    lab.sh(outcome.next)
    assert lab.train.read_text() == TRAIN and lab.is_clean()


def test_a_second_run_in_one_work_tree_is_refused(begun):
    lab = begun
    lab.edit(WORSE)
    run = lab.start("first", **hold(lab)).reached()
    before = lab.results.read_bytes(), lab.record()
    second = lab.run("second")
    assert (second.code, second.output) == (1, "")
    refusal = "another run is at work here; wait until it has ended"
    assert second.errors == f"error: {lab.folder}/.git/autoresearch: {refusal}\n"
    assert (lab.results.read_bytes(), lab.record()) == before
    run.killed()
    lab.train.write_text(TRAIN.replace(*CRASH))
    assert lab.run("third").status == "crash", "the lock ends with its process"


# -- runs without a score ----------------------------------------------------------------------------------

OOM = ("        break\n", '        raise torch.OutOfMemoryError("tried to allocate 640 GiB")\n')
NAN = ("    evaluate_bpb(", "    model.lm_head.weight.data.fill_(float('nan'))\n    evaluate_bpb(")
LEAK = ("return self.lm_head(self.wte(inputs))", "return self.lm_head(self.wte(inputs.roll(-1, 1)))")
SILENT = ("    evaluate_bpb(model, tokenizer, 2)\n", "")
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
        ("crash", OOM, "torch.OutOfMemoryError: tried to allocate 640 GiB"),
        ("invalid", NAN, "error: the model's logits are not finite; look for .*"),
        ("invalid", LEAK, "error: the prediction at position .* must see only the past of its own row"),
        ("invalid", SILENT, "error: the run ended without a score; call evaluate_bpb once, .*"),
        ("invalid", RESEED, "error: torch's seed is 7, not 42; leave seeds to the harness"),
        ("invalid", BUDGETS, "error: a constant of prepare.py was changed: TIME_BUDGET is 600, not 5; .*"),
    ],
    ids="crash deep out-of-memory nan leak no-score reseeded budget".split(),
)
def test_a_run_without_a_score_is_recorded(begun, status, change, says):
    lab = begun
    lab.edit(change)
    before = lab.state()
    outcome = lab.run("an idea")
    assert lab.state() == before
    row = lab.rows()[-1]
    assert (outcome.code, outcome.status) == (1, status)
    assert (row["status"], row["val_bpb"]) == (status, "nan")
    assert re.search(f"^{says}$", outcome.errors, re.M), outcome.errors
    assert len((outcome.output + outcome.errors).splitlines()) <= 40
    message = lab.git("show", "-s", "--format=%B", row["commit"])
    assert message.startswith(f"val_bpb nan ({status}): an idea\n\nval_bpb: nan\n")
    assert re.search(says, message) and lab.saved(row["commit"]) == TRAIN.replace(*change)
    assert outcome.next == "git restore -SW train.py"
    lab.sh(outcome.next)
    assert lab.is_clean() and lab.train.read_text() == TRAIN


def test_a_file_that_does_not_start_has_no_record(begun):
    lab = begun
    before = lab.results.read_bytes(), lab.record()
    for text in ("def broken(:\n", "import nothing_like_this\n" + TRAIN):
        lab.train.write_text(text)
        outcome = lab.run("an idea")
        assert outcome.code == 1 and outcome.status == "" and "Error" in outcome.errors
    assert (lab.results.read_bytes(), lab.record()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_stops_a_run(begun, number):
    lab = begun
    lab.edit(BETTER)
    run = lab.start("4 -> 7 steps", **hold(lab)).reached()
    row = lab.rows()[-1]
    assert (row["status"], row["val_bpb"], row["seed"]) == ("unfinished", "nan", "43")
    assert row["commit"] == lab.record()[-1]["commit"]
    assert lab.saved(row["commit"]) == TRAIN.replace(*BETTER)
    run.process.send_signal(number)
    outcome = run.wait()
    row = lab.rows()[-1]
    assert (outcome.code, outcome.status) == (1, "stopped")
    assert (row["status"], row["val_bpb"], row["seed"]) == ("stopped", "nan", "43")
    assert outcome.errors == "error: interrupted, so there is no score; start the run again\n"
    assert lab.saved(row["commit"]) == TRAIN.replace(*BETTER)
    assert len(lab.record()) == 4 and lab.record()[-1]["commit"] == row["commit"]
    lab.sh(outcome.next)
    assert lab.is_clean()


def test_the_watchdog_ends_a_hang(begun):
    lab = begun
    lab.edit(("    for _ in run.steps():", "    time.sleep(600)  # the hang\n    for _ in run.steps():"))
    began = time.monotonic()
    outcome = lab.run("a hang", RUN_LIMIT="1")
    assert time.monotonic() - began < 20
    row = lab.rows()[-1]
    assert (outcome.code, outcome.status) == (1, "timeout")
    assert (row["status"], row["val_bpb"]) == ("timeout", "nan")
    line = 1 + lab.train.read_text().splitlines().index("    time.sleep(600)  # the hang")
    assert f'train.py", line {line} in train' in outcome.errors, "the stacks show where it hangs"
    assert "error: not done in 1.0 s" in outcome.errors
    assert len((outcome.output + outcome.errors).splitlines()) <= 40
    assert "# the hang" in lab.saved(row["commit"])
    lab.sh(outcome.next)
    assert lab.is_clean()


# -- what a run is compared with ---------------------------------------------------------------------------


def test_the_unjudged_are_told_to_measure_a_baseline(tmp_path, cache):
    lab = Lab.create(tmp_path / "new")
    lab.edit(BETTER)
    outcome = lab.run("4 -> 7 steps")
    assert outcome.status == "unjudged" and "cannot be judged" in outcome.output.splitlines()[0]
    (row,) = lab.rows()
    bring_back = f"git restore -s {row['commit']} train.py"
    assert outcome.next == f"git restore -SW train.py && {{ uv run train.py baseline; {bring_back}; }}"
    subject = lab.git("log", "-1", "--format=%s", row["commit"])
    assert re.fullmatch(r"val_bpb \S+ \(unjudged\): 4 -> 7 steps", subject)
    baseline = lab.sh(outcome.next)
    assert baseline.status == "keep" and lab.train.read_text() == TRAIN.replace(*BETTER)
    lab.sh(baseline.next)  # the branch gets its first number beneath the edit
    assert lab.git("log", "-1", "--format=%s").endswith(": baseline")
    assert lab.train.read_text() == TRAIN.replace(*BETTER) and lab.git("stash", "list") == ""
    outcome = lab.run("4 -> 7 steps")
    assert outcome.status == "keep"
    assert [row["seed"] for row in lab.rows()] == ["42", "42", "43"]
    lab.sh(outcome.next)
    assert lab.is_clean()


def test_a_baseline_may_crash(tmp_path, cache):
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
    assert lab.is_clean() and lab.train.read_text() == mended


@pytest.mark.parametrize("status", ["reproduced", "stopped"])
def test_only_a_failed_baseline_makes_any_score_a_beginning(tmp_path, cache, status):
    """A baseline that somebody stopped, or whose seed somebody chose, says nothing against measuring one."""
    lab = Lab.create(tmp_path / "new")
    seed = {"SEED": "42"} if status == "reproduced" else {}
    run = lab.start("baseline", **hold(lab), **seed).reached()
    if status == "stopped":
        run.process.send_signal(signal.SIGINT)
        outcome = run.wait()
    else:
        outcome = run.released()
    assert outcome.status == status
    lab.edit(WORSE)
    outcome = lab.run("fewer steps")
    assert outcome.status == "unjudged" and "uv run train.py baseline" in outcome.next


def test_what_was_recorded_is_not_said_to_be_lost(begun):
    """Something that goes wrong after the record was written is another error."""
    lab = begun
    lab.edit(BETTER)
    run = lab.start("4 -> 7 steps", **hold(lab)).reached()
    lab.edit(MORE_EDITS)
    (lab.folder / f"train.py.edited-{blob(lab.train.read_text())[:7]}").mkdir()
    outcome = run.released()
    assert lab.record()[-1]["status"] == "keep"
    assert "not recorded" not in outcome.errors


@pytest.mark.parametrize("edited", [False, True], ids=["as committed", "edited since"])
def test_what_was_committed_by_hand_is_given_back(begun, edited):
    lab = begun
    measured = lab.git("rev-parse", "HEAD")
    lab.edit(OTHER)
    lab.git("commit", "-qam", "by hand")
    if edited:
        lab.edit(MORE_EDITS)
    text = lab.train.read_text()
    outcome = lab.run("an idea")
    short = lab.git("rev-parse", "--short", measured)
    assert (outcome.status, outcome.next) == ("unjudged", f"git reset --soft {short}")
    lab.sh(outcome.next)
    assert lab.git("rev-parse", "HEAD") == measured and lab.train.read_text() == text
    outcome = lab.run("an idea")
    assert outcome.status == "keep" and lab.rows()[-1]["seed"] == "43"
    lab.sh(outcome.next)
    assert lab.is_clean()


def test_a_crash_finishes_no_seed(begun):
    lab = begun
    lab.edit(CRASH)
    for seed in ({}, {}, {"SEED": "77"}):
        assert lab.run("x", **seed).status == "crash"
    assert [row["seed"] for row in lab.rows()[-3:]] == ["42", "42", "77"]


@pytest.mark.parametrize("seed", ["-1", "4.5", "", "1234567890"])
def test_a_bad_seed_is_an_error(begun, seed):
    lab = begun
    bad = lab.run("x", SEED=seed)
    assert (bad.code, bad.errors) == (1, f"error: SEED is {seed!r}, not a whole number; unset it\n")
    assert len(lab.record()) == 3


def test_a_chosen_seed_is_never_judged(begun):
    lab = begun
    outcome = lab.run("again", SEED="43")
    assert (outcome.status, outcome.next) == ("reproduced", "# edit train.py")
    again, row = lab.rows()[-1], lab.rows()[1]
    assert [again[name] for name in ("val_bpb", "seed", "code", "fingerprint")] == [
        row[name] for name in ("val_bpb", "seed", "code", "fingerprint")
    ]
    lab.run("a baseline of its own", SEED="99")
    lab.edit(BETTER)
    outcome = lab.run("4 -> 7 steps", SEED="43")
    assert (outcome.status, outcome.next) == ("reproduced", "git restore -SW train.py")
    judged = lab.run("4 -> 7 steps")
    assert judged.status == "keep" and lab.rows()[-1]["seed"] == "43", "the next seed is still free"
    rows = lab.rows()
    baselines = [float(row["val_bpb"]) for row in rows[:2]]
    candidates = [float(rows[2]["val_bpb"]), float(rows[-1]["val_bpb"])]
    gain = (sum(baselines) - sum(candidates)) / 2
    found = re.search(r"^gain (\S+), standard error \S+, 2 seeds against 2$", judged.output, re.M)
    assert float(found[1]) == pytest.approx(gain, abs=2e-6)


def test_reruns_never_turn_a_discard_into_a_keep(begun):
    lab = begun
    train = TRAIN.replace(*BETTER)
    bad = {"train": train, "val_bpb": "9.000000", "fingerprint": lab.rows()[0]["fingerprint"]}
    lab.git(
        "update-ref", "-d", lab.git("for-each-ref", "--format=%(refname)", "refs/autoresearch").split()[2]
    )
    assert [row["status"] for row in lab.record()] == ["keep", "baseline"]
    write_records(lab, [record(1, **bad), record(2, **bad, seed="43")])
    lab.edit(BETTER)
    outcome = lab.run("4 -> 7 steps")
    row = lab.rows()[-1]
    assert outcome.status == "discard", "however good the later ones are"
    assert row["seed"] == "44" and float(row["val_bpb"]) < float(lab.rows()[-2]["val_bpb"])


def test_another_fingerprint_does_not_compare(begun):
    lab = begun
    with open(lab.folder / "prepare.py", "a") as file:
        file.write("# another version\n")
    lab.git("commit", "-qm", "new version", "prepare.py")
    outcome = lab.run("baseline")
    assert outcome.status == "keep" and lab.rows()[-1]["seed"] == "42"
    assert lab.rows()[-1]["fingerprint"] != lab.rows()[0]["fingerprint"]


def test_an_edited_prepare_py_is_refused(begun):
    lab = begun
    lab.edit(CRASH)
    with open(lab.folder / "prepare.py", "a") as file:
        file.write("# mine\n")
    before = lab.results.read_bytes(), lab.record(), lab.state()
    outcome = lab.run("an idea")
    assert outcome.code == 1 and outcome.output == "" and outcome.errors.count("\n") == 1
    command = re.search("error: prepare.py differs from HEAD's, .*; (mv .*)", outcome.errors)[1]
    assert (lab.results.read_bytes(), lab.record(), lab.state()) == before
    lab.sh(command)
    assert (lab.folder / "prepare.py.edited").read_text().endswith("# mine\n")
    assert lab.git("status", "--porcelain") == "M train.py"
    assert lab.run("an idea").status == "crash", "now it starts"


# -- work trees --------------------------------------------------------------------------------------------


def worktree(lab: Lab, number: int) -> Lab:
    folder = lab.folder.parent / f"tree {number}"
    lab.git("worktree", "add", "-q", str(folder), "-b", f"gpu-{number}")
    return Lab(folder)


def test_two_work_trees_share_their_runs(begun):
    one = begun
    two = worktree(one, 2)
    one.edit(BETTER)
    runs = [one.start("4 -> 7 steps", **hold(one)).reached(), two.start("baseline", **hold(two)).reached()]
    outcomes = [run.released() for run in runs]
    assert [outcome.status for outcome in outcomes] == ["keep", "baseline"]
    for lab, outcome in zip((one, two), outcomes, strict=True):
        lab.sh(outcome.next)
        assert lab.is_clean()
    assert one.record() == two.record()
    assert [(row["seed"], row["branch"]) for row in two.rows()[-2:]] == [("43", "main"), ("44", "gpu-2")]
    assert {row["commit"] for row in two.rows()} == {row["commit"] for row in two.record()}
    two.edit(BETTER)
    outcome = two.run("what the other one has")
    assert outcome.status == "keep" and two.rows()[-1]["seed"] == "44", "its two seeds count here"
    assert len(two.rows()) == 6


def test_two_work_trees_may_measure_the_baseline_at_once(tmp_path, cache):
    one = Lab.create(tmp_path / "one")
    labs = [one, worktree(one, 2)]
    edits = []
    for lab, change in zip(labs, (BETTER, OTHER), strict=True):
        lab.edit(change)
        edits.append(lab.train.read_text())

    def both(commands: list[str]) -> list[Outcome]:
        outcomes = {}

        def run(lab: Lab, command: str) -> None:
            outcomes[lab] = lab.sh(command)

        threads = [threading.Thread(target=run, args=pair) for pair in zip(labs, commands, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [outcomes[lab] for lab in labs]

    candidates = both(["uv run train.py better", "uv run train.py other"])
    assert [outcome.status for outcome in candidates] == ["unjudged", "unjudged"]
    baselines = both([outcome.next for outcome in candidates])
    assert {outcome.status for outcome in baselines} <= {"keep", "baseline"}
    assert [lab.train.read_text() for lab in labs] == edits
    both([outcome.next for outcome in baselines])
    assert [lab.train.read_text() for lab in labs] == edits
    outcomes = both(["uv run train.py better", "uv run train.py other"])
    assert [outcome.status for outcome in outcomes] == ["keep", "keep"]
    both([outcome.next for outcome in outcomes])
    assert all(lab.is_clean() and lab.edited() == [] for lab in labs)
    assert len(one.record()) == 6


def test_runs_are_fetched_from_another_clone(begun, tmp_path):
    here = begun
    there = Lab.copy(here, tmp_path / "there")
    here.edit(CRASH)
    here.run("only here")
    there.edit(BETTER)
    assert there.run("only there").status == "keep"
    mine = here.record()
    here.git("fetch", "-q", "--no-prune", str(there.folder), "+refs/autoresearch/*:refs/autoresearch/*")
    both = here.record()
    assert [row["description"] for row in both[3:]] == ["only here", "only there"]
    assert [row for row in both if row in mine] == mine
    here.train.write_text(TRAIN.replace(*BETTER))
    assert here.run("4 -> 7 steps").status == "keep"
    assert here.rows()[-1]["seed"] == "44", "two seeds are finished, one of them there"
    assert here.saved(both[-1]["commit"]) == TRAIN.replace(*BETTER)

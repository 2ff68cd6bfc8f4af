"""The notebook: in real repositories, by the real command line; every printed command is run as printed."""

import re
import shlex
import signal
import threading
import time

import pytest
from helpers.lab import BETTER, CRASH, OTHER, SLIGHT, TRAIN, WORSE, Lab, Outcome, shown
from helpers.records import blob, record, write_records

from prepare import SIGMA

slow = pytest.mark.slow
MORE_EDITS = ("WIDTH = 8", "WIDTH = 9")
SUMMARY = (
    "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M "
    "depth startup_seconds eval_seconds seed fingerprint attention"
).split()


def hold(lab: Lab) -> dict[str, str]:
    return {"RUN_HOLD": str(lab.folder.parent / f"hold-{lab.folder.name}")}


def test_a_night_is_a_table_and_the_kept_ones_a_log(night):
    lab, (first, second, candidate) = night
    rows = lab.rows()
    assert [row["status"] for row in rows] == ["keep", "baseline", "maybe"]
    assert [row["seed"] for row in rows] == ["42", "43", "42"]
    assert [row["description"] for row in rows] == ["baseline", "baseline", "rate 0.054"]
    assert [row["code"] for row in rows] == [
        blob(text)[:12] for text in (TRAIN, TRAIN, TRAIN.replace(*SLIGHT))
    ]
    assert [(row["steps"], row["branch"]) for row in rows] == 3 * [("4", "main")]
    assert len({row["fingerprint"] for row in rows}) == 1
    assert len({row["commit"] for row in rows}) == 3
    assert (first.status, first.next) == ("keep", f"git merge -q --ff-only --autostash {rows[0]['commit']}")
    assert (second.status, second.next) == ("baseline", "# edit train.py")
    assert (candidate.status, candidate.next) == ("maybe", "uv run train.py 'rate 0.054'")
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
    assert len(timeless) == 11
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


def cases(*quick) -> list:
    """All situations, of which some belong to the default suite."""
    return [
        situation if situation in quick else pytest.param(situation, marks=slow) for situation in SITUATIONS
    ]


def name_of(situation) -> str:
    return situation.__name__


@pytest.mark.parametrize("situation", cases(others), ids=name_of)
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
    assert (outcome.status, row["status"]) == ("keep", "keep"), outcome.errors
    assert (row["seed"], row["steps"]) == ("42", "7"), "at first sight"
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


@pytest.mark.parametrize("situation", cases(staged), ids=name_of)
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


@pytest.mark.slow
def test_maybe_repeats_whatever_the_description(begun):
    lab = begun
    lab.edit(OTHER)
    clean = " ".join(NASTY.replace("\udcff", "?").split())
    outcome = lab.run(NASTY)
    assert (outcome.status, outcome.next) == ("maybe", f"uv run train.py {shlex.quote(clean)}")
    assert outcome.compared() == (shown(lab.rows()[-1:]), shown(lab.rows()[:2]))
    outcome = lab.sh(outcome.next)
    first, second = lab.rows()[-2:]
    assert outcome.status == "keep" and not (lab.folder / "oops").exists()
    assert first["description"] == second["description"] == clean
    assert (first["seed"], second["seed"]) == ("42", "43") and first["code"] == second["code"]
    assert outcome.compared() == (shown([first, second]), shown(lab.rows()[:2]))
    assert "times as many steps" not in outcome.output

    baselines = [float(row["val_bpb"]) for row in lab.rows()[:2]]
    candidates = [float(first["val_bpb"]), float(second["val_bpb"])]
    gain = (sum(baselines) - sum(candidates)) / 2
    squares = ((baselines[0] - baselines[1]) ** 2 + (candidates[0] - candidates[1]) ** 2) / 2
    sigma = ((4 * SIGMA**2 + squares) / 6) ** 0.5
    said = re.search(r"; gain (\S+), sigma (\S+)$", outcome.output, re.M)
    assert float(said[1]) == pytest.approx(gain, abs=2e-6)
    assert float(said[2]) == pytest.approx(sigma, abs=6e-5)
    subject = lab.git("show", "-s", "--format=%s", second["commit"])
    found = re.fullmatch(r"val_bpb (\S+) \((\S+), 2 seeds\): (.*)", subject)
    assert found[3] == clean
    assert float(found[1]) == pytest.approx(sum(candidates) / 2, abs=2e-6)
    assert float(found[2]) == pytest.approx(-gain, abs=2e-6)


def test_a_long_description_is_cut_with_a_note(begun):
    lab = begun
    lab.edit(CRASH)
    outcome = lab.run("word " * 1000)
    assert outcome.output.startswith("note: the description is cut after 200 characters\n")
    assert lab.rows()[-1]["description"] == ("word " * 40).strip()


@pytest.mark.slow
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
    assert outcome.next == "# edit train.py", "a comment leads nowhere"
    lab.sh(outcome.next)


@slow
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


@pytest.mark.parametrize(
    "status, change",
    [pytest.param("keep", BETTER, marks=slow), pytest.param("maybe", OTHER, marks=slow), ("discard", WORSE)],
)
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


@slow
def test_a_stopped_baseline_is_run_again_unedited(begun):
    lab = begun
    run = lab.start("baseline", **hold(lab)).reached()
    lab.edit(MORE_EDITS)
    run.process.send_signal(signal.SIGINT)
    outcome = run.wait()
    assert outcome.status == "stopped"
    lab.sh(outcome.next)
    rows = lab.rows()[-2:]
    assert rows[0]["code"] == rows[1]["code"] and lab.edited() == [TRAIN.replace(*MORE_EDITS)]


@pytest.mark.parametrize("status, change", [("keep", BETTER), pytest.param("discard", WORSE, marks=slow)])
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


@pytest.mark.parametrize("edited", [pytest.param(False, marks=slow), True])
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


FAILURES = {  # status, change, and a line that is said
    "crash": ("crash", CRASH, "ZeroDivisionError: integer division or modulo by zero"),
    "deep": ("crash", DEEP, "ZeroDivisionError: division by zero"),
    "out of memory": ("crash", OOM, "torch.OutOfMemoryError: tried to allocate 640 GiB"),
    "nan": ("invalid", NAN, "error: the model's logits are not finite; look for .*"),
    "leak": (
        "invalid",
        LEAK,
        "error: the prediction at position .* must see only the past of its own row",
    ),
    "no score": (
        "invalid",
        SILENT,
        "error: the run ended without a score; call evaluate_bpb once, .*",
    ),
    "reseeded": ("invalid", RESEED, "error: torch's seed is 7, not 42; leave seeds to the harness"),
    "budget": (
        "invalid",
        BUDGETS,
        "error: a constant of prepare.py was changed: TIME_BUDGET is 600, not 5; .*",
    ),
}
QUICK = ("deep", "no score")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=slow) for name in FAILURES]
)
def test_a_run_without_a_score_is_recorded(begun, name):
    status, change, says = FAILURES[name]
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


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=slow), signal.SIGINT], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_stops_a_run(begun, number):
    lab = begun
    lab.edit(BETTER)
    run = lab.start("4 -> 7 steps", **hold(lab)).reached()
    row = lab.rows()[-1]
    assert (row["status"], row["val_bpb"], row["seed"]) == ("unfinished", "nan", "42")
    assert row["commit"] == lab.record()[-1]["commit"]
    assert lab.saved(row["commit"]) == TRAIN.replace(*BETTER)
    run.process.send_signal(number)
    outcome = run.wait()
    row = lab.rows()[-1]
    assert (outcome.code, outcome.status) == (1, "stopped")
    assert (row["status"], row["val_bpb"], row["seed"]) == ("stopped", "nan", "42")
    assert outcome.errors == "error: interrupted, so there is no score; start the run again\n"
    assert lab.saved(row["commit"]) == TRAIN.replace(*BETTER)
    assert len(lab.record()) == 4 and lab.record()[-1]["commit"] == row["commit"]
    assert lab.sh(outcome.next).status == "keep"
    assert [row["status"] for row in lab.record()[-2:]] == ["stopped", "keep"]


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


@pytest.mark.slow
def test_the_unjudged_are_told_to_measure_a_baseline(tmp_path, cache):
    lab = Lab.create(tmp_path / "new")
    lab.edit(MORE_EDITS)
    lab.git("stash")
    old_entry = lab.git("stash", "list")
    lab.edit(BETTER)
    outcome = lab.run("4 -> 7 steps")
    assert outcome.status == "unjudged" and "cannot be judged" in outcome.output.splitlines()[0]
    (row,) = lab.rows()
    bring_back = f"git restore -s {row['commit']} train.py"
    assert outcome.next == f"git restore -SW train.py && {{ uv run train.py baseline; {bring_back}; }}"
    subject = lab.git("log", "-1", "--format=%s", row["commit"])
    assert re.fullmatch(r"val_bpb \S+ \(unjudged\): 4 -> 7 steps", subject)
    lab.git("restore", "train.py")  # somebody is faster
    baseline = lab.sh(outcome.next)
    assert baseline.status == "keep" and lab.train.read_text() == TRAIN.replace(*BETTER)
    lab.sh(baseline.next)  # the branch gets its first number beneath the edit
    assert lab.git("log", "-1", "--format=%s").endswith(": baseline")
    assert lab.train.read_text() == TRAIN.replace(*BETTER)
    assert old_entry != "" and lab.git("stash", "list") == old_entry, "it is nobody's business"
    outcome = lab.run("4 -> 7 steps")
    assert outcome.status == "keep" and "; gain " in outcome.output
    assert [row["seed"] for row in lab.rows()] == ["42", "42", "43"]
    lab.sh(outcome.next)
    assert lab.git("status", "--porcelain", "-uall") == ""


@slow
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


@slow
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
    """Something may go wrong after the record was written: here nothing can be saved under that name."""
    lab = begun
    lab.edit(BETTER)
    run = lab.start("4 -> 7 steps", **hold(lab)).reached()
    lab.edit(MORE_EDITS)
    (lab.folder / f"train.py.edited-{blob(lab.train.read_text())[:7]}").mkdir()
    outcome = run.released()
    assert lab.record()[-1]["status"] == lab.rows()[-1]["status"] == "keep"
    assert (outcome.code, outcome.status, outcome.errors) == (0, "keep", "")
    assert outcome.next == "# look after train.py yourself"
    assert re.search("^the run is recorded, but: .*Is a directory", outcome.output, re.M)


@pytest.mark.parametrize(
    "edited", [pytest.param(False, marks=slow), True], ids=["as committed", "edited since"]
)
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


def test_an_unknown_option_is_no_description(begun):
    bad = begun.run("--descrption")
    remedy = "a description does not begin with --, see train.py --help"
    assert (bad.code, bad.errors) == (1, f"error: there is no option --descrption; {remedy}\n")
    assert len(begun.record()) == 3


@pytest.mark.slow
def test_a_chosen_seed_hides_no_commit_by_hand(begun):
    lab = begun
    measured = lab.git("rev-parse", "--short", "HEAD")
    lab.edit(OTHER)
    lab.git("commit", "-qam", "by hand")
    assert lab.run("an idea", SEED="7").status == "reproduced"
    outcome = lab.run("an idea")
    assert (outcome.status, outcome.next) == ("unjudged", f"git reset --soft {measured}")


@pytest.mark.slow
def test_who_took_fewer_steps_is_told_what_to_do(begun):
    lab = begun
    lab.edit(WORSE)
    outcome = lab.run("fewer steps")
    assert outcome.compared() == (shown(lab.rows()[-1:]), shown(lab.rows()[:2]))
    says = "0.50 times as many steps .*: unless the idea takes or saves time, .* is decided, .*: (uv run .*)"
    again = re.fullmatch(says, outcome.output.splitlines()[-2])[1]
    lab.sh(outcome.next)
    outcome = lab.sh(again)
    assert (outcome.status, lab.rows()[-1]["seed"]) == ("baseline", "44")
    assert "times as many steps" not in outcome.output


@slow
@pytest.mark.parametrize("steps, is_told", [(94, True), (95, False), (105, False), (106, True)])
def test_a_twentieth_of_the_steps_is_no_difference(begun, steps, is_told):
    lab = begun
    baseline = {"train": TRAIN, "code": blob(TRAIN), "fingerprint": lab.rows()[0]["fingerprint"]}
    write_records(lab, [record(number, seed=str(42 + number), **baseline) for number in range(2)])
    lab.edit(WORSE, ("num_steps=STEPS", f"num_steps={steps}"))
    outcome = lab.run("an idea")
    assert outcome.compared()[1].endswith("(100 and 100 steps)")
    assert (f"{steps / 100:.2f} times as many steps " in outcome.output) == is_told


@pytest.mark.slow
def test_a_crash_finishes_no_seed(begun):
    lab = begun
    lab.edit(CRASH)
    for seed in ({}, {}, {"SEED": "77"}):
        assert lab.run("x", **seed).status == "crash"
    assert [row["seed"] for row in lab.rows()[-3:]] == ["42", "42", "77"]


@pytest.mark.parametrize(
    "seed", ["-1", *(pytest.param(seed, marks=slow) for seed in ("4.5", "", "1234567890"))]
)
def test_a_bad_seed_is_an_error(begun, seed):
    lab = begun
    bad = lab.run("x", SEED=seed)
    assert (bad.code, bad.errors) == (1, f"error: SEED is {seed!r}, not 1 to 9 digits; unset it\n")
    assert len(lab.record()) == 3


@pytest.mark.slow
def test_a_chosen_seed_is_never_judged(begun):
    lab = begun
    outcome = lab.run("a baseline of its own", SEED="99")
    assert (outcome.status, outcome.next) == ("reproduced", "# edit train.py")
    lab.edit(SLIGHT)
    outcome = lab.run("rate 0.054", SEED="43")
    assert (outcome.code, outcome.status, outcome.next) == (0, "reproduced", "git restore -SW train.py")
    assert outcome.output.splitlines()[-2] == "SEED is set, so this run is not judged"
    judged = lab.run("rate 0.054")
    assert judged.status == "keep" and lab.rows()[-1]["seed"] == "43", "the next seed is still free"
    rows = lab.rows()
    assert [(row["status"], row["seed"]) for row in rows[3:5]] == [("reproduced", "99"), ("reproduced", "43")]
    assert rows[4]["val_bpb"] == rows[5]["val_bpb"]
    assert judged.compared() == (shown([rows[2], rows[5]]), shown(rows[:2])), "without the other two"


def test_reruns_never_turn_a_discard_into_a_keep(begun):
    lab = begun
    baseline = lab.rows()[0]
    bad = {
        "train": TRAIN.replace(*BETTER),
        "val_bpb": "9.000000",
        "fingerprint": baseline["fingerprint"],
    }
    write_records(lab, [record(1, **bad), record(2, **bad, seed="43")])
    lab.edit(BETTER)
    outcome = lab.run("4 -> 7 steps")
    row = lab.rows()[-1]
    assert outcome.status == "discard", "however good the later ones are"
    assert row["seed"] == "44" and float(row["val_bpb"]) < float(baseline["val_bpb"])


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
    aside = lab.folder / f"prepare.py.edited-{blob((lab.folder / 'prepare.py').read_text())[:7]}"
    assert (lab.results.read_bytes(), lab.record(), lab.state()) == before
    lab.sh(command)
    assert aside.read_text().endswith("# mine\n")
    assert lab.git("status", "--porcelain") == "M train.py"
    assert lab.run("an idea").status == "crash", "now it starts"


# -- work trees --------------------------------------------------------------------------------------------


def worktree(lab: Lab, number: int) -> Lab:
    folder = lab.folder.parent / f"tree {number}"
    lab.git("worktree", "add", "-q", str(folder), "-b", f"gpu-{number}")
    return Lab(folder)


@slow
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
    assert [(row["seed"], row["branch"]) for row in two.rows()[-2:]] == [("42", "main"), ("44", "gpu-2")]
    assert {row["commit"] for row in two.rows()} == {row["commit"] for row in two.record()}
    two.edit(BETTER)
    outcome = two.run("what the other one has")
    assert outcome.status == "keep" and two.rows()[-1]["seed"] == "43", "its seed counts here"
    assert len(two.rows()) == 6


@pytest.mark.slow
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
    assert all(lab.edited() == [] and lab.git("stash", "list") == "" for lab in labs)
    assert [row["status"] for row in one.record()][:2] == ["unjudged", "unjudged"]
    assert len(one.record()) == 4


@pytest.mark.slow
def test_a_night_survives_its_work_tree(begun):
    one = begun
    two = worktree(one, 2)
    two.edit(BETTER)
    two.sh(two.run("4 -> 7 steps").next)
    there = two.report().output
    branches = ["branch main: 3 runs, 1 kept", "branch gpu-2: 1 runs, 1 kept"]
    for line in branches:
        assert f"\n{line}, 0.0000 bpb an hour\n" in there
    assert "2 kept on the last corpus and budget, 2 others" in there, "along its own history"
    one.git("worktree", "remove", str(two.folder))
    assert not two.folder.exists()
    here = one.report().output
    for line in branches:
        assert f"\n{line}, 0.0000 bpb an hour\n" in here
    assert "1 kept on the last corpus and budget, 3 others" in here
    assert [row["branch"] for row in one.rows()] == ["main", "main", "main", "gpu-2"]
    assert one.saved(one.rows()[-1]["commit"]) == TRAIN.replace(*BETTER)


def test_a_night_survives_git_clean(begun):
    lab = begun
    known = lab.results.read_text()
    lab.edit(CRASH)
    for command in ("uv run prepare.py --report", "! uv run train.py next"):
        lab.sh("git clean -qfdX")
        assert not lab.results.exists()
        lab.sh(command)
        assert lab.results.read_text().startswith(known)
    assert [row["status"] for row in lab.rows()] == ["keep", "baseline", "maybe", "crash"]


@slow
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
    assert here.rows()[-1]["seed"] == "43", "one seed is finished there"
    assert here.saved(both[-1]["commit"]) == TRAIN.replace(*BETTER)

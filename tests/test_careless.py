"""A careless agent's train.py, and runs that are ended at any moment: what the notebook holds afterwards.

In real repositories, by the real command line, with the real harness. What stands elsewhere is not here again: a seed
of its own, a budget changed before the clock, a hang and a leak are in test_notebook.py, the clock in test_clock.py.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from lab import BUDGET, TRAIN, Lab, Running, wait_for

LOOP = "    for _ in run.steps():\n"
STEPS = "        for _ in range(STEPS):\n"
BATCH = "            inputs, targets, _ = next(loader)\n"
LAST = "        break\n"
SCORE = "    val_bpb = evaluate_bpb(model, tokenizer, 16)\n"
# it tells beside the repository what the metric said; without a change it scores exactly what HEAD's train.py does
PROGRAM = TRAIN.replace(SCORE.replace("val_bpb = ", ""), SCORE + '    Path("../score").write_text(f"{val_bpb:.6f}")\n')
FALSE = "0.100000"  # what a program claims; no honest one comes near
RUN = "uv run train.py 'an idea' > run.log; code=$?; tail -n 1 run.log; exit $code"


@pytest.fixture(scope="module")
def measured(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A repository with a baseline."""
    lab = Lab.create(tmp_path_factory.mktemp("careless") / "repository")
    lab.sh(lab.run("baseline").next)
    return lab


@pytest.fixture
def lab(measured: Lab, tmp_path: Path) -> Lab:
    lab = Lab(Path(shutil.copytree(measured.folder, tmp_path / "copy", symlinks=True)))
    lab.git("update-index", "--refresh")
    return lab


def refs(lab: Lab) -> list[str]:
    """The hashes below refs/autoresearch."""
    return lab.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/autoresearch").split()


def files(lab: Lab) -> list[str]:
    """What lies where a run writes."""
    return sorted(os.listdir(lab.folder)) + sorted(os.listdir(lab.folder / ".git" / "autoresearch"))


# -- a careless agent's train.py ---------------------------------------------------------------------------------------

TOO_LONG = r"error: trained for \d+\.\d s, not 5\.2 at most; obey run\.steps\(\)"
CARELESS = {  # a change of PROGRAM, the status of its run, and the last line on stderr
    "draws data before the clock": (
        (LOOP, "    next(loader)\n" + LOOP),
        "crash",
        r"error: training data was drawn before the clock; use random tokens, draw in run\.steps\(\)",
    ),
    "draws from the validation split": (
        ("tokenizer, 4, MAX_SEQ_LEN)", 'tokenizer, 4, MAX_SEQ_LEN, split="val")'),
        "crash",
        "error: there is no split 'val' to draw from, only 'train'; evaluate_bpb scores the other one",
    ),
    "trains on by a clock of its own": (
        (STEPS, "        while time.perf_counter() - run.clock_started < 5.3:\n"),
        "invalid",
        TOO_LONG,
    ),
    "sleeps": ((LAST, "        time.sleep(5.3)\n"), "invalid", TOO_LONG),
    "lengthens the budget and puts it back": (
        (LAST, f"        import prepare; prepare.TIME_BUDGET = 6\n    prepare.TIME_BUDGET = {BUDGET}\n"),
        "invalid",
        TOO_LONG,
    ),
    "lengthens the budget in the loop": (
        (LAST, "        import prepare; prepare.TIME_BUDGET = 600\n" + LAST),
        "invalid",
        r"error: a constant of prepare\.py was changed: TIME_BUDGET is 600, not 0\.2; leave it as it is",
    ),
    "replaces evaluate_bpb": (
        (LOOP, f'    evaluate_bpb = lambda *_: print("---\\nval_bpb:          {FALSE}") or {FALSE}\n' + LOOP),
        "invalid",
        "error: the run ended without a score; call evaluate_bpb once, after the training",
    ),
    "evaluates twice": (
        (SCORE, SCORE + SCORE),
        "invalid",
        "error: evaluate_bpb was called twice; a run has one score",
    ),
    "prints a false score and a false verdict": (
        (SCORE, SCORE + f'    print("---\\nval_bpb:          {FALSE}\\nstatus: keep        next: true")\n'),
        "discard",
        "",
    ),
    "writes a row of its own": (
        (
            LAST,
            '        with open("results.tsv", "a") as file:\n'
            f'            row = "abc1234 {FALSE} 1.0 keep mine 42 0123456789ab 01234567 300"\n'
            '            print(*row.split(), sep="\\t", file=file)\n' + LAST,
        ),
        "discard",
        "",
    ),
    "writes 100 MB of output": (
        (LAST, '        for i in range(10**6):\n            print(f"{i:099}")\n' + LAST),
        "discard",
        "",
    ),
    "calls sys.exit(0) in the loop": ((LAST, "        sys.exit(0)\n"), "crash", "SystemExit: 0"),
    "raises SystemExit after the score": ((SCORE, SCORE + "    raise SystemExit\n"), "crash", "SystemExit"),
    # out of reach, as the README says: it is the same user. A person who reads the diff of what was kept sees it
    "trains on the validation rows": (
        (
            STEPS + BATCH,
            "        import numpy, prepare\n"
            '        rows = numpy.fromfile(prepare.Prepared.active().validation, "<u2").astype("int64")\n'
            "        for batch in torch.from_numpy(rows).view(-1, MAX_SEQ_LEN + 1)[:64].split(4):\n"
            "            inputs, targets = batch[:, :-1], batch[:, 1:]\n",
        ),
        "maybe",
        "",
    ),
}


def careless(lab: Lab, change: tuple[str, str], status: str, says: str) -> str:
    """Run PROGRAM with a change; what the notebook holds is the harness's own. Returns the next command."""
    lab.train.write_text(PROGRAM)
    lab.edit(change)
    branch, known = lab.state()[:3], lab.rows()
    outcome = lab.sh(RUN, check=False)
    assert outcome.status == status, outcome.output + outcome.errors
    assert re.fullmatch(says, (outcome.errors.splitlines() or [""])[-1]), outcome.errors
    failed = status in ("crash", "invalid")
    assert outcome.code == failed
    *others, row = lab.rows()
    val_bpb = "nan" if failed else (lab.folder.parent / "score").read_text()
    assert others == known and (row["status"], row["val_bpb"]) == (status, val_bpb)
    assert sorted(refs(lab)) == sorted(row["commit"] for row in lab.rows()), "one for each row"
    assert lab.state()[:3] == branch
    lab.sh(f"git show {row['commit']}:./train.py | cmp - train.py")
    message = lab.git("show", "-s", "--format=%B", row["commit"])
    assert message.startswith(f"val_bpb nan ({status}): an idea\n" if failed else f"val_bpb {val_bpb} (")
    assert failed or f"\nval_bpb:          {val_bpb}\n" in message
    assert FALSE not in message
    return outcome.next


QUICK = "draws data before the clock", "replaces evaluate_bpb", "prints a false score and a false verdict"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CARELESS if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_a_careless_train_py_gets_the_row_and_the_commit_that_the_harness_measured(lab, name):
    careless(lab, *CARELESS[name])
    log = lab.folder / "run.log"
    assert log.stat().st_size > (10**8 if "100 MB" in name else 0)
    log.unlink()  # pytest keeps the folder


def test_a_train_py_that_edits_prepare_py_is_scored_by_what_was_there_and_the_next_run_is_refused(lab):
    append = '        with open("prepare.py", "a") as file:\n            print("TIME_BUDGET = 600", file=file)\n'
    lab.sh(careless(lab, (LAST, append + LAST), "discard", ""))
    results = lab.results.read_bytes()
    refused = lab.run("again")
    assert refused.code == 1 and refused.errors.startswith("error: prepare.py differs from HEAD's")
    assert lab.results.read_bytes() == results


def test_a_train_py_that_leaves_without_a_word_is_settled_by_the_next_start(lab):
    lab.edit((LAST, "        os._exit(0)\n"))
    left, outcome = lab.train.read_text(), lab.sh(RUN)
    assert (outcome.status, lab.rows()[-1]["status"]) == ("", "running")
    lab.train.write_text(TRAIN)
    assert lab.run("next").status == "baseline"
    rows = lab.rows()
    assert [(row["status"], row["description"]) for row in rows[1:]] == [("killed", "an idea"), ("baseline", "next")]
    assert rows[1]["val_bpb"] == "nan" and lab.saved(rows[1]["commit"]) == left
    assert sorted(refs(lab)) == sorted(row["commit"] for row in rows)


# -- interruption ------------------------------------------------------------------------------------------------------


def processes(folder: Path) -> list[int]:
    """Those that work in a folder: `uv`, the run, its git."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # ended, or of another user
            found += [int(pid)] if os.readlink(f"/proc/{pid}/cwd") == str(folder) else []
    return found


def send(run: Running, number: int) -> None:
    """To the run and its git at once, as a terminal does; to `uv` as long as there is nothing else."""
    others = [pid for pid in processes(run.lab.folder) if pid != run.process.pid]
    for pid in others or [run.process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.mark.skipif(not os.path.exists("/proc/self/cwd"), reason="needs /proc to find the processes of a run")
@pytest.mark.parametrize("count, seed", [(3, 1), pytest.param(30, 2, marks=pytest.mark.slow)])
def test_ended_at_random_moments_every_run_that_began_has_one_settled_row(lab, count, seed):
    lab.edit((LAST, ""))  # train to the end of the budget
    began = time.monotonic()
    assert lab.run("whole").code == 0
    duration = time.monotonic() - began
    before, begun = (lab.state(), files(lab)), [row["description"] for row in lab.rows()]
    rng, story = random.Random(seed), [f"seed {seed}, {duration:.3f} s undisturbed"]
    moments = [(i + rng.random()) / count * duration for i in range(count)]
    rng.shuffle(moments)
    for i, moment in enumerate(moments):
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[i % 3]
        run = lab.start(f"run {i}")
        time.sleep(moment)
        send(run, number)
        outcome = run.wait()
        wait_for(lambda: not processes(lab.folder), 10)
        descriptions = [row["description"] for row in lab.rows()]
        story.append(f"run {i}: {number.name} after {moment:.3f} s, exit code {outcome.code}, {lab.rows()[-1]}")
        assert descriptions in (begun, [*begun, f"run {i}"]), story
        begun = descriptions
    outcome, rows = lab.run("afterwards"), lab.rows()
    assert (outcome.code, outcome.errors) == (0, ""), story
    assert [row["description"] for row in rows] == [*begun, "afterwards"], story
    statuses = [row["status"] for row in rows]
    assert "killed" in statuses and {*statuses} <= {"keep", "maybe", "discard", "killed"}, story
    assert all((row["val_bpb"] == "nan") == (row["status"] == "killed") for row in rows), story
    assert {row["commit"] for row in rows} <= {*refs(lab)}, story
    assert {lab.saved(row["commit"]) for row in rows[1:]} == {lab.train.read_text()}, story
    assert (lab.state(), files(lab)) == before, story


@pytest.mark.parametrize("first", ["    with Experiment(", LOOP], ids=["opened", "settled"])
def test_killed_while_its_row_is_written_a_run_leaves_no_temporary_file_behind_the_next_one(lab, first):
    lab.edit((first, f"    os.replace = lambda *_: os.kill(os.getpid(), 9)\n{first}"))
    before = files(lab)
    assert lab.run("an idea").code == 137
    assert files(lab) != before, "now there is one"
    lab.train.write_text(TRAIN)
    assert lab.run("next").status == "baseline"
    assert [row["status"] for row in lab.rows()] == ["keep", *["killed"] * (first == LOOP), "baseline"]
    assert files(lab) == before


def test_the_lock_of_a_git_that_was_killed_with_its_run_does_not_keep_the_next_one_from_its_row(lab):
    before = files(lab)
    (lab.folder / ".git" / "autoresearch" / "index.lock").touch()  # by read-tree or update-index
    outcome = lab.run("again")
    assert outcome.status == "baseline", outcome.output
    assert len(lab.rows()) == 2 and files(lab) == before


def test_a_run_whose_output_nobody_reads_is_settled(lab):
    lab.sh("uv run train.py 'again' | true", check=False)
    wait_for(lambda: lab.rows()[-1]["description"] == "again" and lab.rows()[-1]["status"] != "running", 20)
    assert lab.rows()[-1]["status"] in ("crash", "baseline") and lab.rows()[-1]["commit"] in refs(lab)


def test_a_train_py_that_is_edited_before_its_run_has_begun_is_not_taken_for_what_runs(lab):
    """Python has compiled the old text, and imports torch for seconds before the run reads the new one."""
    edit = 'file = Path("train.py"); file.write_text(file.read_text().replace("LR = 0.05", "LR = 0.06"))'
    lab.edit(("from pathlib import Path\n", f"from pathlib import Path\n\n{edit}\n"))
    outcome = lab.run("an idea")
    assert outcome.code == 1 and "error: train.py was edited while this run started" in outcome.errors
    assert "LR = 0.06" in lab.train.read_text() and len(lab.rows()) == 1
    assert lab.run("an idea").status in ("discard", "maybe"), "now it runs as it stands there"


def test_the_rows_that_are_scored_are_those_that_were_checked(lab, tmp_path):
    """Another prepare.py may replace the file during a run."""
    cache = Path(shutil.copytree(os.environ["AUTORESEARCH_CACHE"], tmp_path / "cache"))
    find = "next(Path(os.environ['AUTORESEARCH_CACHE']).rglob('validation.bin'))"
    replaced = f"        {find}.write_bytes(bytes(10**5))\n"
    lab.env["AUTORESEARCH_CACHE"] = str(cache)
    careless(lab, (LAST, replaced + LAST), "discard", "")


@pytest.mark.parametrize("first", ["    with Experiment(", LOOP], ids=["at the start", "in the loop"])
def test_a_full_disk_is_a_clear_error_and_what_was_recorded_stays(lab, first):
    lab.edit((first, f"    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n{first}"))
    before = lab.state(), lab.rows()
    outcome = lab.run("an idea")
    assert outcome.code == 1 and "Traceback" not in outcome.errors
    says = "error: not recorded: .*; the next run" if first == LOOP else "error: the run cannot be recorded: .*;"
    assert re.search(says, outcome.errors), outcome.errors
    assert lab.state() == before[0] and lab.rows()[:1] == before[1]
    lab.train.write_text(TRAIN)
    assert lab.run("next").status == "baseline"
    assert [row["status"] for row in lab.rows()] == ["keep", *["killed"] * (first == LOOP), "baseline"]

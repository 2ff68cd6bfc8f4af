"""A careless agent's train.py: what the record holds afterwards is what the harness measured.

In real repositories, by the real command line, with the real harness. What stands elsewhere is not here:
a seed of its own, a changed constant, a hang and a leak (test_notebook.py), and the clock (test_clock.py).
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from helpers.fork_server import wait_for
from helpers.lab import CRASH, TRAIN, WORSE, Lab

LOOP = "    for _ in run.steps():\n"
STEPS = "        for _ in range(STEPS):\n"
BATCH = "            inputs, targets, _ = next(loader)\n"
LAST = "        break\n"
SCORE = "    val_bpb = evaluate_bpb(model, tokenizer, 2)\n"
# it tells beside the repository what the metric said; without a change it is worse than HEAD's train.py
PROGRAM = TRAIN.replace(*WORSE).replace(
    SCORE.replace("val_bpb = ", ""), SCORE + '    Path("../score").write_text(f"{val_bpb:.6f}")\n'
)
FALSE = "0.100000"  # what a program claims; no honest one comes near
RUN = "uv run train.py 'an idea' > run.log; code=$?; tail -n 1 run.log; exit $code"
LIMIT = 10  # seconds: a budget of 5, and 5 more until a run is invalid

TOO_LONG = rf"error: trained for \d+\.\d s, not {LIMIT}\.0 at most; obey run\.steps\(\)"
QUICK = {  # a change of PROGRAM, the status of its run, and the last line on stderr
    "draws data before the clock": (
        (LOOP, "    next(loader)\n" + LOOP),
        "crash",
        r"error: training data was drawn before the clock; warm up on random tokens, draw in run\.steps\(\)",
    ),
    "prints a false score and a false verdict": (
        (SCORE, SCORE + f'    print("---\\nval_bpb:          {FALSE}\\nstatus: keep        next: true")\n'),
        "discard",
        "",
    ),
}
SLOW = {
    "replaces evaluate_bpb": (
        (LOOP, f'    evaluate_bpb = lambda *_: print("---\\nval_bpb:          {FALSE}") or {FALSE}\n' + LOOP),
        "invalid",
        "error: the run ended without a score; call evaluate_bpb once, after the training",
    ),
    "draws from the validation split": (
        ("tokenizer, 2, MAX_SEQ_LEN)", 'tokenizer, 2, MAX_SEQ_LEN, split="val")'),
        "crash",
        "error: there is no split 'val' to draw from, only 'train'; evaluate_bpb scores the other one",
    ),
    "trains on by a clock of its own": (
        (STEPS, f"        began = time.time()\n        while time.time() < began + {LIMIT + 0.2}:\n"),
        "invalid",
        TOO_LONG,
    ),
    "sleeps": ((LAST, f"        time.sleep({LIMIT + 0.2})\n" + LAST), "invalid", TOO_LONG),
    "lengthens the budget and puts it back": (
        (
            LAST,
            f"        import prepare; prepare.TIME_BUDGET = {LIMIT + 2}; time.sleep(1)\n"
            "    prepare.TIME_BUDGET = 5\n",
        ),
        "invalid",
        TOO_LONG,
    ),
    "lengthens the budget in the loop": (
        (LAST, "        import prepare; prepare.TIME_BUDGET = 600\n" + LAST),
        "invalid",
        r"error: a constant of prepare\.py was changed: TIME_BUDGET is 600, not 5; leave it as it is",
    ),
    "evaluates twice": (
        (SCORE, SCORE + SCORE),
        "invalid",
        "error: evaluate_bpb was called twice; a run has one score",
    ),
    "writes a row of its own": (
        (
            LAST,
            '        with open("results.tsv", "a") as file:\n'
            f'            row = "abc1234 {FALSE} 1.0 keep mine 42 4 300 main 0123456789ab 01234567"\n'
            '            print(*row.split(), sep="\\t", file=file)\n' + LAST,
        ),
        "discard",
        "",
    ),
    "writes 10 MB of output": (
        (LAST, '        for i in range(10**5):\n            print(f"{i:099}")\n' + LAST),
        "discard",
        "",
    ),
    "calls sys.exit(0) in the loop": ((LAST, "        sys.exit(0)\n"), "crash", "SystemExit: 0"),
    "raises SystemExit after the score": ((SCORE, SCORE + "    raise SystemExit\n"), "crash", "SystemExit"),
    # out of reach, as the README says: it is the same user. Who reads the diff of what was kept sees it
    "trains on the validation rows": (
        (
            STEPS + BATCH,
            "        import prepare\n"
            '        rows = torch.from_numpy(prepare.Prepared.active().rows.astype("int64"))\n'
            "        for batch in rows[:64].split(4):\n"
            "            inputs, targets = batch[:, :-1], batch[:, 1:]\n",
        ),
        "keep",
        "",
    ),
}
CARELESS = QUICK | SLOW


def careless(lab: Lab, change: tuple[str, str], status: str, says: str) -> str:
    """Run PROGRAM with a change; what the record holds is the harness's own. Returns the next command."""
    lab.train.write_text(PROGRAM)
    lab.edit(change)
    branch = lab.state()[:3]
    known = lab.record()
    outcome = lab.sh(RUN, check=False)
    assert outcome.status == status, outcome.output + outcome.errors
    assert re.fullmatch(says, (outcome.errors.splitlines() or [""])[-1]), outcome.errors
    failed = status in ("crash", "invalid")
    assert outcome.code == failed
    *others, row = lab.record()
    val_bpb = "nan" if failed else (lab.folder.parent / "score").read_text()
    assert others == known
    assert (row["status"], row["val_bpb"]) == (status, val_bpb)
    shown = [(row["commit"], row["val_bpb"]) for row in lab.rows()]
    assert shown == [(row["commit"], row["val_bpb"]) for row in lab.record()]
    assert lab.state()[:3] == branch
    lab.sh(f"git show {row['commit']}:./train.py | cmp - train.py")
    message = lab.git("show", "-s", "--format=%B", row["commit"])
    assert message.startswith(f"val_bpb nan ({status}): an idea\n" if failed else f"val_bpb {val_bpb} (")
    assert failed or f"\nval_bpb:          {val_bpb}\n" in message
    assert FALSE not in message
    return outcome.next


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)], ids=str
)
def test_a_careless_train_py_is_measured(begun, name):
    careless(begun, *CARELESS[name])
    log = begun.folder / "run.log"
    assert log.stat().st_size >= (10**7 if "10 MB" in name else 0)
    log.unlink()  # pytest keeps the folder


@pytest.mark.slow
def test_who_edits_prepare_py_is_refused_next(begun):
    lab = begun
    append = (
        '        with open("prepare.py", "a") as file:\n            print("TIME_BUDGET = 600", file=file)\n'
    )
    lab.sh(careless(lab, (LAST, append + LAST), "discard", ""))
    record = lab.record()
    refused = lab.run("again")
    assert refused.code == 1 and refused.errors.startswith("error: prepare.py differs from HEAD's")
    assert lab.record() == record


def test_who_leaves_without_a_word_stays_unfinished(begun):
    lab = begun
    lab.edit((LAST, "        os._exit(0)\n"))
    left = lab.train.read_text()
    assert lab.sh(RUN).status == ""
    assert lab.record()[-1]["status"] == "unfinished"
    lab.train.write_text(TRAIN.replace(*CRASH))
    assert lab.run("next").status == "crash"
    rows = lab.rows()[-2:]
    assert [(row["status"], row["description"]) for row in rows] == [
        ("unfinished", "an idea"),
        ("crash", "next"),
    ]
    assert rows[0]["val_bpb"] == "nan" and lab.saved(rows[0]["commit"]) == left


def test_a_run_whose_output_nobody_reads_is_recorded(begun):
    lab = begun
    lab.sh("uv run train.py 'again' | true", check=False)
    wait_for(
        lambda: lab.record()[-1]["description"] == "again" and lab.record()[-1]["status"] != "unfinished"
    )
    assert lab.record()[-1]["status"] in ("crash", "baseline")


def test_an_edit_while_the_run_starts_is_not_taken_for_what_runs(begun):
    """Python has compiled the old text, and imports torch for seconds before the run reads the new one."""
    lab = begun
    text = f'file = Path("train.py"); file.write_text(file.read_text().replace{WORSE})'
    lab.edit(("from pathlib import Path\n", f"from pathlib import Path\n\n{text}\n"))
    outcome = lab.run("an idea")
    assert outcome.code == 1 and "error: train.py was edited while this run started" in outcome.errors
    assert "STEPS = 2 " in lab.train.read_text() and len(lab.record()) == 3
    assert lab.run("an idea").status == "discard", "now it runs as it stands there"


@pytest.mark.slow
def test_the_rows_that_are_scored_are_those_that_were_checked(begun, tmp_path):
    """Another prepare.py may replace the file during a run."""
    lab = begun
    cache = Path(shutil.copytree(os.environ["AUTORESEARCH_CACHE"], tmp_path / "cache"))
    find = "next(Path(os.environ['AUTORESEARCH_CACHE']).rglob('validation.bin'))"
    replaced = f"        {find}.write_bytes(bytes(10**5))\n"
    lab.env["AUTORESEARCH_CACHE"] = str(cache)
    careless(lab, (LAST, replaced + LAST), "discard", "")


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"


@pytest.mark.parametrize(
    "before_training",
    [pytest.param(True, marks=pytest.mark.slow), False],
    ids=["at the start", "in the loop"],
)
def test_a_full_disk_is_a_clear_error(begun, before_training):
    lab = begun
    first = "    with Experiment(" if before_training else LOOP
    lab.edit((first, f"    {FULL_DISK}\n{first}"))
    state = lab.state()
    record = lab.record()
    outcome = lab.run("an idea")
    assert outcome.code == 1 and "Traceback" not in outcome.errors
    says = (
        "the run cannot be recorded: .*; fix that, "
        if before_training
        else "not recorded: .*; fix that and run"
    )
    assert re.search(f"^error: {says}", outcome.errors), outcome.errors
    assert lab.state() == state
    lab.train.write_text(TRAIN.replace(*CRASH))
    assert lab.run("next").status == "crash"
    assert lab.record()[:3] == record
    statuses = [row["status"] for row in lab.rows()[3:]]
    assert statuses == (["crash"] if before_training else ["unfinished", "crash"])

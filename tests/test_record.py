"""The record: a commit for each run, whatever happens to results.tsv, to the run or to other objects."""

import contextlib
import io
import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers.fork_server import wait_for
from helpers.lab import BETTER, COLUMNS, CRASH, OTHER, SLIGHT, TRAIN, WORSE, Lab, Running, shown
from helpers.records import record, ref, text_of, write_records

import prepare

LAST = "        break\n"


def hold(lab: Lab) -> dict[str, str]:
    return {"RUN_HOLD": str(lab.folder.parent / "hold")}


def as_shown(record: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows that results.tsv should have."""
    return [{name: row[name] for name in COLUMNS} | {"code": row["code"][:12]} for row in record]


# -- results.tsv is a view ---------------------------------------------------------------------------------


def spreadsheet(text: str) -> str:
    """As one saves it: other line ends, quotes, numbers and a byte order mark."""
    fields = [line.split("\t") for line in text.splitlines()]
    lines = ["\t".join(f'"{field.replace(".", ",")}"' for field in line) for line in fields]
    return "\ufeff" + "\r\n".join(lines)


# what somebody makes of the text, and whether it counts as a file of another program
HARM = {
    "deleted": (lambda text: None, False),
    "cut in half": (lambda text: text[: 2 * len(text) // 3], False),
    "a false score": (lambda text: text.replace("\tbaseline\t", "\tkeep\t").replace("\t3.", "\t0."), False),
    "garbage behind it": (lambda text: text + "\0\0\0\n<<<<<<< HEAD\n\udcff", False),
    "Windows line ends": (lambda text: text.replace("\n", "\r\n"), True),
    "a spreadsheet": (spreadsheet, True),
    "another header": (lambda text: "commit\tval_bpb\nabc1234\t0.99\n", True),
    "emptied": (lambda text: "", True),
}


JUDGED = ("deleted", "a false score")


QUICK = ("deleted", "a spreadsheet")


@pytest.mark.parametrize(
    "harm", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HARM]
)
def test_results_tsv_is_whole_after_a_run(begun, harm):
    lab = begun
    change, is_foreign = HARM[harm]
    lab.edit(SLIGHT)
    if harm not in JUDGED:
        lab.edit(
            ("    evaluate_bpb(", "    sys.exit()\n    evaluate_bpb(")
        )  # spares the time of the evaluation
    run = lab.start("rate 0.054", **hold(lab)).reached()
    harmed = change(lab.results.read_text())
    lab.results.unlink()
    if harmed is not None:
        lab.results.write_bytes(harmed.encode("utf-8", "surrogateescape"))
    outcome = run.released()
    assert outcome.status == ("keep" if harm in JUDGED else "crash")
    if harm in JUDGED:
        record = lab.record()
        assert outcome.compared() == (shown(record[2:]), shown(record[:2]))
    assert lab.rows() == as_shown(lab.record()) and len(lab.rows()) == 4
    aside = list(lab.folder.glob("results.tsv.*"))
    assert ("written by something else" in outcome.output) == is_foreign
    assert len(aside) == is_foreign
    if is_foreign:
        assert aside[0].read_bytes() == harmed.encode() and aside[0].name in outcome.output
    lab.sh(outcome.next)
    assert lab.is_clean()


def test_the_report_brings_results_tsv_back(begun):
    before = begun.results.read_bytes()
    begun.results.unlink()
    begun.report()
    assert begun.results.read_bytes() == before


def test_a_results_tsv_that_cannot_be_written_stops_a_run(begun):
    lab = begun
    lab.results.unlink()
    lab.results.mkdir()
    before = lab.record()
    outcome = lab.run("an idea")
    assert outcome.code == 1 and outcome.output == ""
    assert outcome.errors.startswith("error: the run cannot be recorded: ")
    assert outcome.errors.count("\n") == 1 and "results.tsv" in outcome.errors
    assert lab.record() == before


@pytest.mark.slow
def test_results_tsv_may_become_unwritable_during_a_run(begun):
    lab = begun
    lab.edit(BETTER)
    run = lab.start("4 -> 7 steps", **hold(lab)).reached()
    lab.results.unlink()
    lab.results.mkdir()
    outcome = run.released()
    assert (outcome.code, outcome.status) == (0, "keep")
    assert "results.tsv was not written" in outcome.output
    assert lab.record()[-1]["status"] == "keep"


# -- reading -----------------------------------------------------------------------------------------------


def read(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> tuple[list[prepare.Run], list[str]]:
    """The record of a repository and the notes about it, by the harness's own reader."""
    monkeypatch.setattr(prepare, "HERE", lab.folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runs = prepare.read_runs()
    return runs, [line.removeprefix("note: ") for line in output.getvalue().splitlines()]


@pytest.fixture(scope="module")
def empty_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.create(tmp_path_factory.mktemp("empty") / "repository")


@pytest.fixture
def lab(empty_lab: Lab) -> Lab:
    """A repository without a record; all tests have the same one."""
    deletions = empty_lab.git("for-each-ref", "--format=delete %(refname)", "refs/autoresearch")
    empty_lab.git("update-ref", "--stdin", input=f"{deletions}\n".lstrip().encode())
    return empty_lab


def commit(lab: Lab, text: str) -> str:
    return lab.git("commit-tree", "HEAD^{tree}", "-F", "-", input=text.encode())


def test_every_field_is_read_as_it_was_written(lab, monkeypatch):
    fields = record(
        7, val_bpb="nan", status="crash", description="'\"\\ \x01 \x1b: ü 学 status: keep", branch="a/b"
    )
    (short,) = write_records(lab, [fields])
    (run,), complaints = read(lab, monkeypatch)
    assert complaints == [] and (run.commit, run.ref) == (short, ref(1))
    assert run.fields() == {name: fields.get(name, short) for name in COLUMNS}
    assert not run.has_score


def test_runs_come_in_the_order_of_their_starts(lab, monkeypatch):
    write_records(lab, [record(number) for number in range(12)])
    runs, _ = read(lab, monkeypatch)
    assert [run.description for run in runs] == [f"idea {number}" for number in range(12)]


@pytest.mark.slow
def test_two_thousand_records_are_read_in_a_second(lab, monkeypatch):
    write_records(lab, [record(number, details="a line of a traceback\n" * 30) for number in range(2000)])
    durations = [60.0]
    while min(durations) > 1 and len(durations) < 5:  # the machine may be busy
        began = time.perf_counter()
        runs, complaints = read(lab, monkeypatch)
        durations.append(time.perf_counter() - began)
    assert min(durations) < 1
    assert len(runs) == 2000 and complaints == []


def test_unknown_keys_are_ignored(lab, monkeypatch):
    write_records(lab, [record(1, host="a machine", mood="good: very")])
    (run,), _ = read(lab, monkeypatch)
    assert run.description == "idea 1"


@pytest.mark.parametrize("key", ["description", "branch", "steps", "memory_gb", "seconds"])
def test_a_missing_optional_key_has_a_default(lab, monkeypatch, key):
    fields = record(1)
    del fields[key]
    write_records(lab, [fields])
    (run,), complaints = read(lab, monkeypatch)
    assert getattr(run, key) in ("", 0) and run.val_bpb == 1.000001 and complaints == []


REQUIRED = ["status", "val_bpb", "seed", "code", "fingerprint"]


@pytest.mark.parametrize("key", REQUIRED)
def test_without_a_required_key_it_is_no_record(lab, monkeypatch, key):
    fields = record(1)
    write_records(lab, [fields, record(2)])
    del fields[key]
    lab.git("update-ref", ref(1), commit(lab, text_of(fields)))
    (run,), complaints = read(lab, monkeypatch)
    assert run.description == "idea 2"
    assert complaints == [f"{ref(1)} cannot be read, or is not the record of a run; it is left out"]


@pytest.mark.parametrize("value", ["val_bpb: 1.0.1", "seed: x", "steps: 1e3", "no pair at all"])
def test_a_value_that_is_no_number_is_no_record(lab, monkeypatch, value):
    key = value.split(":")[0]
    text = "\n".join(line for line in text_of(record(1)).split("\n") if not line.startswith(f"{key}: "))
    lab.git("update-ref", ref(1), commit(lab, text.replace("status: ", f"{value}\nstatus: ")))
    runs, complaints = read(lab, monkeypatch)
    assert runs == [] and len(complaints) == 1


def test_only_the_first_block_counts(lab, monkeypatch):
    details = "val_bpb: 0.1\n\nTraceback\nstatus: keep\n\nval_bpb: 0.1\nstatus: keep\nseed: 1\n"
    write_records(lab, [record(1, status="crash", val_bpb="nan", details=details)])
    (run,), _ = read(lab, monkeypatch)
    assert (run.status, run.seed, run.has_score) == ("crash", 42, False)


def test_foreign_refs_confuse_nothing(begun, monkeypatch):
    lab = begun
    mine, _ = read(lab, monkeypatch)
    lab.git("tag", "-a", "-m", "a tag", "v1", mine[0].commit)
    foreign = {
        "commit": lab.git("rev-parse", "HEAD~"),
        "blob": lab.git("rev-parse", "HEAD:train.py"),
        "tree": lab.git("rev-parse", "HEAD^{tree}"),
        "tag": lab.git("rev-parse", "v1"),
        "0/nested": lab.git("rev-parse", "HEAD~"),
    }
    for name, target in foreign.items():
        lab.git("update-ref", f"refs/autoresearch/{name}", target)
    runs, complaints = read(lab, monkeypatch)
    assert runs == mine
    assert sorted(line.split()[0] for line in complaints) == sorted(f"refs/autoresearch/{n}" for n in foreign)
    lab.edit(SLIGHT)
    outcome = lab.run("rate 0.054")
    assert outcome.status == "keep" and outcome.output.count("it is left out") == len(foreign)
    rows = lab.rows()
    assert outcome.compared() == (shown(rows[2:]), shown(rows[:2])) and len(rows) == 4
    assert "refs/autoresearch/tree" in lab.git("for-each-ref"), "it stays where it is"


def loose_object(lab: Lab, commit: str) -> Path:
    name = lab.git("rev-parse", commit)
    return lab.folder / ".git" / "objects" / name[:2] / name[2:]


LENGTHS = [0, 1, 2, 20, 0.5, -1]  # bytes; a share of the file; bytes from the end


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "which", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_truncated_object_hides_one_record(begun, monkeypatch, length, which):
    lab = begun
    mine, _ = read(lab, monkeypatch)
    path = loose_object(lab, mine[which].commit)
    raw = path.read_bytes()
    size = int(length * len(raw)) if 0 < length < 1 else length
    path.chmod(0o644)
    path.write_bytes(raw[:size])
    runs, complaints = read(lab, monkeypatch)
    assert runs == [run for run in mine if run is not mine[which]]
    assert complaints == [f"{mine[which].ref} cannot be read, or is not the record of a run; it is left out"]


def test_a_git_that_does_not_start_is_no_damaged_record(monkeypatch):
    """As when there is no memory for a process: otherwise all runs would be forgotten in one verdict."""

    def no_more_processes(*_, **__):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(prepare.subprocess, "run", no_more_processes)
    with pytest.raises(BlockingIOError):
        prepare.read_objects(["1234567", "89abcde"])


def test_a_run_goes_on_beside_a_truncated_object(begun):
    lab = begun
    hidden = lab.record()[1]
    path = loose_object(lab, hidden["commit"])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:50])
    lab.edit(SLIGHT)
    outcome = lab.run("rate 0.054")
    rows = lab.rows()
    assert outcome.status == "keep" and outcome.compared() == (shown(rows[1:]), shown(rows[:1]))
    assert outcome.output.count("it is left out") == 1
    assert [row["description"] for row in rows] == ["baseline", "rate 0.054", "rate 0.054"]
    path.write_bytes(b"")
    lab.git("update-ref", "refs/heads/still-works", "HEAD")


# -- interruption ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_stays_unfinished(begun):
    lab = begun
    lab.edit(BETTER)
    lab.start("power loss", **hold(lab)).reached().killed()
    (hold_file,) = hold(lab).values()
    Path(hold_file).unlink()
    *others, killed = lab.record()
    assert (killed["status"], killed["val_bpb"]) == ("unfinished", "nan")
    assert lab.rows()[-1]["status"] == "unfinished"
    assert lab.saved(killed["commit"]) == TRAIN.replace(*BETTER)
    outcome = lab.run("4 -> 7 steps")
    assert outcome.status == "keep", "judged as if nothing had happened"
    assert lab.record()[:-1] == [*others, killed] and len(lab.rows()) == 5
    assert lab.git("show", "-s", "--format=%s", killed["commit"]) == "val_bpb nan (unfinished): power loss"


def processes(folder: Path) -> list[int]:
    """Those that work in a folder: `uv`, the run, its git."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # ended, or of another user
            if os.readlink(f"/proc/{pid}/cwd") == str(folder):
                found.append(int(pid))
    return found


def send(run: Running, number: int) -> None:
    """To the run and its git at once, as a terminal does; to `uv` as long as there is nothing else."""
    others = [pid for pid in processes(run.lab.folder) if pid != run.process.pid]
    for pid in others or [run.process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def files(lab: Lab) -> list[str]:
    """What lies where a run writes."""
    return sorted(os.listdir(lab.folder)) + sorted(os.listdir(lab.folder / ".git" / "autoresearch"))


EVERY_WAY = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/cwd"), reason="needs /proc to find the processes of a run")
@pytest.mark.parametrize(
    "count, signals",
    [
        (20, [signal.SIGKILL]),
        (30, EVERY_WAY),
    ],
    ids=["20 kills", "30 signals"],
)
def test_ended_at_random_moments(begun, count, signals):
    lab = begun
    lab.edit(OTHER)
    began = time.monotonic()
    assert lab.run("whole").status == "maybe"
    duration = time.monotonic() - began
    state, known_files, record = lab.state(), files(lab), lab.record()
    rng = random.Random(count)
    story = [f"{duration:.3f} s undisturbed"]
    moments = [(number + rng.random()) / count * 1.1 * duration for number in range(count)]
    rng.shuffle(moments)
    ends = []
    for number, moment in enumerate(moments):
        signal_number = signals[number % len(signals)]
        run = lab.start(f"run {number}")
        time.sleep(moment)
        send(run, signal_number)
        outcome = run.wait()
        wait_for(lambda: not processes(lab.folder), 10)
        *others, last = lab.record()
        story.append(f"run {number}: {signal_number.name} after {moment:.3f} s, {outcome.code}, {last}")
        if last["description"] == f"run {number}":
            assert others == record, story
            record = [*others, last]
            ends.append(last["status"])
        else:
            assert [*others, last] == record, story
    assert "unfinished" in ends, story
    assert {*ends} <= {"unfinished", "keep", "discard", *(["stopped"] if len(signals) > 1 else [])}, story
    assert all((row["val_bpb"] == "nan") == (row["status"] in ("unfinished", "stopped")) for row in record), (
        story
    )
    assert {lab.saved(row["commit"]) for row in record[3:]} == {lab.train.read_text()}, story

    outcome = lab.run("afterwards")
    assert (outcome.code, outcome.errors, outcome.status) == (0, "", "keep"), story
    finished = [row["seed"] for row in record[3:] if row["val_bpb"] != "nan"]
    assert finished == [str(42 + number) for number in range(len(finished))], story
    assert lab.rows()[-1]["seed"] == str(42 + len(finished)), story
    assert lab.rows() == as_shown(lab.record()) and len(lab.rows()) == len(record) + 1, story
    assert (lab.state(), files(lab)) == (state, known_files), story


@pytest.mark.slow
@pytest.mark.parametrize(
    "at, is_recorded", [pytest.param("    with Experiment(", False, marks=pytest.mark.slow), (LAST, True)]
)
def test_killed_while_it_writes_results_tsv(begun, at, is_recorded):
    lab = begun
    before = files(lab)
    indent = at[: len(at) - len(at.lstrip())]
    lab.edit(WORSE, (at, f"{indent}os.replace = lambda *_: os.kill(os.getpid(), 9)\n{at}"))
    assert lab.run("an idea").code == 137
    assert files(lab) != before, "now there is a temporary file"
    assert [row["status"] for row in lab.record()[3:]] == ["discard"] * is_recorded
    lab.train.write_text(TRAIN.replace(*CRASH))
    assert lab.run("next").status == "crash"
    assert lab.rows() == as_shown(lab.record()) and len(lab.rows()) == 4 + is_recorded
    assert files(lab) == before


def test_what_a_killed_git_leaves_behind_is_removed(begun):
    lab = begun
    before = files(lab)
    left = lab.folder / ".git" / "autoresearch" / "left.tmp"
    left.mkdir()
    (left / "index.lock").touch()  # by read-tree or update-index
    lab.edit(CRASH)
    assert lab.run("again").status == "crash"
    assert files(lab) == before

"""The morning report, over nights that were written as records, and over a real one."""

import shutil
import struct
from pathlib import Path

import pytest
from conftest import run
from helpers.lab import BETTER, COLUMNS, SLIGHT, TRAIN, Lab, shown
from helpers.records import record, write_night, write_records


def png_size(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and raw[-8:-4] == b"IEND"
    assert len(raw) > 10_000
    return struct.unpack(">II", raw[16:24])


@pytest.mark.parametrize(
    "count, only_crashes",
    [
        pytest.param(1, False, marks=pytest.mark.slow),
        (40, False),
        (5, True),
        pytest.param(150, False, marks=pytest.mark.slow),
    ],
    ids=["one run", "40 runs", "crashes", "150 runs"],
)
def test_the_report_counts_compares_and_draws(tmp_path, count, only_crashes):
    lab, records = write_night(tmp_path / "night", count, only_crashes)
    before = lab.state()
    outcome = lab.report()
    assert lab.state() == before
    assert lab.rows() == [
        {name: row[name] for name in COLUMNS} | {"code": row["code"][:12]} for row in records
    ]
    assert png_size(lab.folder / "progress.png") == (1440, 720)

    kept = [row for row in records if row["status"] == "keep"]
    failed = sum(row["val_bpb"] == "nan" for row in records)
    first, second, *rest = outcome.output.splitlines()
    hours = count * 380 / 3600
    assert first == f"{count} experiments in {hours:.1f} hours of running, {count / hours:.1f} per hour"
    others = count - failed - len(kept)
    kept_here = f"{len(kept)} kept on the last corpus and budget"
    assert second == f"{kept_here}, {others} others, {failed} without a score"
    assert rest[-1] == f"chart: {lab.folder / 'progress.png'}"
    assert len(outcome.output.splitlines()) <= 40
    if only_crashes:
        assert "branch main: 5 runs, 0 kept\n" in outcome.output, "no gain to speak of"
        assert kept == [] and failed == 5 and "->" not in outcome.output
        return
    values = [float(row["val_bpb"]) for row in kept]
    best = min(values)
    assert rest[0].startswith(f"val_bpb {values[0]:.6f} -> {best:.6f} ({best - values[0]:+.6f}, ")
    expected = []
    for row, value, before in zip(kept, values, [None, *values], strict=False):
        gain = f"{value - before:+.6f}" if before else "-"
        expected.append([row["commit"], f"{value:.6f}", gain, row["description"]])
    listed = [line.split(maxsplit=3) for line in rest if line[:7] in {row["commit"] for row in kept}]
    assert listed == expected[-20:]
    pace = (values[0] - best) / hours
    assert f"branch main: {count} runs, {len(kept)} kept, {pace:.4f} bpb an hour\n" in outcome.output
    assert ("the last 20 of" in outcome.output) == (len(kept) > 20)
    assert len(kept) > count / 20 and (count < 40 or failed)


@pytest.mark.slow
def test_the_report_of_a_real_night(begun):
    lab = begun
    rows = lab.rows()
    mean = (float(rows[0]["val_bpb"]) + float(rows[1]["val_bpb"])) / 2
    outcome = lab.report()
    assert f"\n{rows[0]['commit']}  {mean:.6f}          -  baseline\n" in outcome.output, "over both seeds"
    assert f"\npending: {rows[2]['commit']}  {rows[2]['val_bpb']}  maybe: rate 0.054\n" in outcome.output
    lab.edit(SLIGHT)
    lab.sh(lab.run("rate 0.054").next)
    outcome = lab.report()
    assert "pending" not in outcome.output
    assert "2 kept on the last corpus and budget, 2 others, 0 without a score" in outcome.output
    values = [float(row["val_bpb"]) for row in lab.rows()]
    hours = max(sum(float(row["seconds"]) for row in lab.rows()) / 3600, 1e-3)
    pace = (mean - (values[2] + values[3]) / 2) / hours
    assert f"branch main: 4 runs, 2 kept, {pace:.4f} bpb an hour\n" in outcome.output, "of the means of seeds"


@pytest.fixture(scope="module")
def kept(night, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A night with a second candidate, which was kept at first sight."""
    lab = Lab.copy(night[0], tmp_path_factory.mktemp("kept") / "repository")
    lab.edit(BETTER)
    lab.sh(lab.run("4 -> 7 steps").next)
    return lab


def amend(lab: Lab) -> None:
    lab.git("commit", "-q", "--amend", "-m", "better words")


def rebase(lab: Lab) -> None:
    lab.git("branch", "night")
    lab.git("reset", "-q", "--hard", "HEAD~3")
    (lab.folder / "notes").write_text("meanwhile\n")
    lab.git("add", "notes")
    lab.git("commit", "-qm", "meanwhile")
    lab.git("rebase", "-q", "main", "night")


def squash(lab: Lab) -> None:
    lab.git("branch", "night")
    lab.git("reset", "-q", "--hard", "HEAD~2")
    lab.git("merge", "-q", "--squash", "night")
    lab.git("commit", "-qm", "a night")


def cherry_pick(lab: Lab) -> None:
    lab.git("branch", "night")
    lab.git("reset", "-q", "--hard", "HEAD~1")
    (lab.folder / "notes").write_text("meanwhile\n")
    lab.git("add", "notes")
    lab.git("commit", "-qm", "meanwhile")
    lab.git("cherry-pick", "night")


@pytest.mark.slow
@pytest.mark.parametrize(
    "rewrite",
    [
        squash,
        amend,
        rebase,
        cherry_pick,
    ],
    ids=lambda rewrite: rewrite.__name__,
)
def test_codes_count_and_not_hashes(kept, tmp_path, rewrite):
    lab = Lab.copy(kept, tmp_path / "copy")
    commit = lab.rows()[-1]["commit"]
    assert lab.git("rev-parse", "--short", "HEAD") == commit
    if rewrite is rebase:
        lab.git("commit", "-q", "--allow-empty", "-m", "unrelated")
    rewrite(lab)
    assert commit not in lab.git("log", "--format=%h"), "another hash"
    assert lab.train.read_text() == TRAIN.replace(*BETTER)
    outcome = lab.report()
    (line,) = (line for line in outcome.output.splitlines() if line.startswith(commit))
    assert line.endswith("4 -> 7 steps") and "2 kept" in outcome.output
    lab.edit(("STEPS = 7 ", "STEPS = 2 "))
    outcome = lab.run("fewer steps")
    assert outcome.status == "discard"
    assert outcome.compared() == (shown(lab.rows()[-1:]), shown(lab.rows()[3:4]))
    lab.sh(outcome.next)
    assert lab.is_clean()


def test_the_report_before_the_first_run(tmp_path, cache):
    lab = Lab.create(tmp_path / "new")
    outcome = lab.report(check=False)
    assert (outcome.code, outcome.output) == (1, "")
    assert outcome.errors == f"error: {lab.folder}: no experiments yet; run: uv run train.py baseline\n"
    assert not lab.results.exists()


def test_the_report_needs_a_repository(tmp_path, cache):
    lab = Lab.create(tmp_path / "new")
    shutil.rmtree(lab.folder / ".git")
    outcome = lab.report(check=False, GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert (outcome.code, outcome.output) == (1, "")
    assert outcome.errors.startswith("error: there is no record to report: fatal: not a git repository")


def test_the_report_draws_odd_descriptions(tmp_path, cache):
    lab = Lab.create(tmp_path / "night")
    odd = r"cost $O(n^2$ {x_1} \frac ü _a_ $$"
    write_records(lab, [record(1, status="keep", description=odd), record(2)], merged=True)
    outcome = lab.report()
    assert odd in outcome.output and outcome.errors == ""
    assert png_size(lab.folder / "progress.png") == (1440, 720)


def test_the_report_leaves_out_what_does_not_compare(tmp_path, cache):
    lab = Lab.create(tmp_path / "night")
    others = [record(number, fingerprint="another", status="keep") for number in range(3)]
    write_records(lab, [*others, record(3, status="keep"), record(4)], merged=True)
    output = lab.report().output
    assert "3 of them do not compare with the last one here" in output
    assert "1 kept on the last corpus and budget, 4 others, 0 without a score" in output


def keep(number: int, val_bpb: float, branch: str, **more: str) -> dict[str, str]:
    return record(number, status="keep", val_bpb=f"{val_bpb:.6f}", branch=branch, **more)


def branch_lines(outcome) -> list[str]:
    return [line for line in outcome.output.splitlines() if line.startswith("branch ")]


def test_branches_can_be_compared(tmp_path, cache):
    lab = Lab.create(tmp_path / "night")
    runs = [
        keep(1, 1.2, "ours"),
        keep(2, 1.2, "theirs"),
        keep(3, 1.1, "ours"),
        record(4, val_bpb="nan", status="crash", branch="theirs"),
        record(5, branch="ours"),
        record(6, val_bpb="nan", status="crash", branch="nobody's"),
    ]
    write_records(lab, [row | {"seconds": "1800"} for row in runs])
    outcome = lab.report()
    assert branch_lines(outcome) == [
        "branch ours: 3 runs, 2 kept, 0.0667 bpb an hour",  # 0.1 in three half hours
        "branch theirs: 2 runs, 1 kept, 0.0000 bpb an hour",
        "branch nobody's: 1 runs, 0 kept",
    ]


@pytest.mark.slow
def test_a_branch_gains_only_where_scores_compare(tmp_path, cache):
    lab = Lab.create(tmp_path / "night")
    runs = [
        keep(1, 3.0, "main", fingerprint="a budget of 5 s"),
        keep(2, 1.2, "main"),
        keep(3, 1.1, "main"),
    ]
    write_records(lab, [row | {"seconds": "1800"} for row in runs], merged=True)
    outcome = lab.report()
    assert branch_lines(outcome) == ["branch main: 3 runs, 3 kept, 0.1000 bpb an hour"]
    assert "1.200000 -> 1.100000" in outcome.output


def pending(lab: Lab) -> list[str]:
    lines = [line for line in lab.report().output.splitlines() if line.startswith("pending")]
    return [line.split(maxsplit=3)[3] for line in lines]


@pytest.mark.slow
def test_what_another_branch_kept_is_not_pending(tmp_path, cache):
    lab = Lab.create(tmp_path / "night")
    first = keep(1, 1.2, "main")
    write_records(lab, [first], merged=True)
    more = [keep(2, 1.1, "theirs"), keep(3, 1.15, "main"), record(4, status="maybe", branch="theirs")]
    write_records(lab, [first, *more])
    assert pending(lab) == ["keep: idea 3"]
    lab.git("switch", "-c", "without-runs")
    assert pending(lab) == []


@pytest.mark.slow
def test_what_is_merged_is_not_pending(tmp_path, cache):
    """Two work trees measured one baseline with one seed: the second does not count and is merged."""
    lab = Lab.create(tmp_path / "night")
    first = keep(1, 1.2, "theirs")
    second = keep(2, 1.2, "main", train=first["train"])
    write_records(lab, [first], merged=True)
    write_records(lab, [first, second, record(3, status="maybe", branch="main")])
    assert pending(lab) == ["maybe: idea 3"]


@pytest.mark.slow
def test_the_report_fits_on_a_screen(tmp_path, cache):
    lab = Lab.create(tmp_path / "night")
    merged = [keep(number, 1.3 - number / 1000, "main") for number in range(30)]
    write_records(lab, merged, merged=True)
    others = [keep(100 + number, 1.1, f"tree-{number % 12}") for number in range(60)]
    never_merged = [keep(200 + number, 1.1, "main") for number in range(30)]
    elsewhere = [keep(300, 3.0, "main", fingerprint="another")]
    write_records(lab, [*elsewhere, *merged, *others, *never_merged])
    lab.results.write_text("a table of something else\n")
    outcome = lab.report()
    assert "121 experiments" in outcome.output
    assert "1 of them do not compare" in outcome.output and "the last 20 of 30" in outcome.output
    assert len(branch_lines(outcome)) == 8
    assert len(outcome.output.splitlines()) <= 40


@pytest.mark.slow
def test_without_matplotlib_there_is_a_line(begun):
    (begun.folder / "matplotlib.py").write_text("raise ImportError\n")
    result = run("prepare.py", "--report", cwd=begun.folder, env=begun.env)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("\n\nno chart: matplotlib is not installed; uv sync brings it\n")
    assert not (begun.folder / "progress.png").exists()

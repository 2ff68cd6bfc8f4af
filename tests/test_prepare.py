"""prepare.py's command line: its corpora, its downloads, its cache, and what becomes of them when something goes wrong.

`forks.run` is the real script in a real process (see forks.py); where the interpreter's start matters, conftest.run.
"""

import contextlib
import fcntl
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run, write_corpus
from forks import Forks, Job
from hub import CLIMBMIX, CLIMBMIX_VALIDATION, TINYSTORIES, Hub, parquet
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare

# code that runs in the process before the script does
NO_WAITING = "import time; time.sleep = lambda seconds: print(f'slept {seconds}')"
IMPATIENT = """
from requests.adapters import HTTPAdapter
send = HTTPAdapter.send
def impatient(self, *args, timeout=None, **options):
    print(f"timeout {timeout}")
    return send(self, *args, timeout=timeout and 0.2, **options)
HTTPAdapter.send = impatient
"""
AFTER_NEXT_NEW_FILE = """
import os, resource, signal
replace, once = os.replace, iter([True])  # two threads may finish together
def replace_and_then(source, target):
    new = not os.path.exists(target) and "active" not in str(target)
    replace(source, target)
    if new and next(once, False):
        {}
os.replace = replace_and_then
"""
DISK_FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
# root may write everywhere, except without its capabilities
NOT_ROOT = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0, ctypes.get_errno()
"""
NOT_ROOT = NOT_ROOT if os.geteuid() == 0 else ""


SLOW = pytest.mark.slow


# == What the tests share ==============================================================================================


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture(scope="module")
def passages(corpus: Path) -> list[str]:
    """Distinct documents of 1,500 characters of real text."""
    text = "".join(path.read_text("utf-8") for path in sorted(corpus.iterdir()))
    return sorted({text[i : i + 1500] for i in range(0, len(text), 1500)})


@pytest.fixture(scope="module")
def shards(passages: list[str]) -> dict[str, bytes]:
    """Eight training shards and the validation shard, each of several MB, nearly all of it ballast."""
    files = {CLIMBMIX.format(i): parquet(passages[100 * i : 100 * i + 100], ballast=2_500_000) for i in range(8)}
    return files | {CLIMBMIX_VALIDATION: parquet(passages[900:1000], ballast=2_500_000)}


@pytest.fixture
def hub(shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "*")
    with Hub() as hub:
        hub.files |= shards
        yield hub


@pytest.fixture(scope="module")
def small(passages: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About the smallest folder that can be prepared."""
    return jsonl(tmp_path_factory.mktemp("small") / "own", passages[:1000])


def jsonl(folder: Path, documents: list[str], name: str = "texts.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def ready(result: Job | subprocess.CompletedProcess) -> str:
    """The fingerprint that a prepare.py printed, which must have succeeded without a word on stderr."""
    assert (result.returncode, result.stderr) == (0, ""), (result.stdout, result.stderr)
    return re.search(r"^ready: .*fingerprint (\w+)", result.stdout, re.MULTILINE)[1]


def error_line(result: Job | subprocess.CompletedProcess) -> str:
    """The one line on stderr of a prepare.py, which must have failed as it should."""
    assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert "ready" not in result.stdout
    return result.stderr


def active(cache: Path) -> prepare.Prepared:
    """The active folder, after its files were checked against the manifest."""
    prepared = prepare.Prepared.read(cache / (cache / "active-small").read_text())
    prepared.verify()
    return prepared


def state(folder: Path) -> dict[str, object]:
    """What every file below a folder holds; locks say nothing, nor does the order of keys in a manifest."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {
        str(path.relative_to(folder)): json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
        for path in paths
    }


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


def documents(cache: Path, split: str) -> list[str]:
    """What the active folder's shards of a split hold, in order."""
    paths = sorted(active(cache).folder.glob(f"shards*/{split}_*.parquet"))
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]


def closed_port() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# == Command line ======================================================================================================

MISTAKES = {
    "unknown corpus": (["--data", "no-such"], r"no-such.*climbmix.*tinystories.*python.*folder"),
    "a file": (["--data", "prepare.py"], r"prepare\.py.*folder"),
    "no corpus": (["--data", ""], "folder"),
    "a line end": (["--data", "no\nsuch"], "folder"),
    "an endless name": (["--data", "x" * 5000], "folder"),
    "no shards": (["--data", "climbmix", "--num-shards", "0"], r"0.*1 to 6,?542"),
    "fewer than none": (["--data", "climbmix", "--num-shards", "-1"], r"-1.*1 to 6,?542"),
    "too many shards": (["--data", "climbmix", "--num-shards", "6543"], r"6,?543.*1 to 6,?542"),
    "no number": (["--data", "climbmix", "--num-shards", "ten"], r"--num-shards.*'ten'.*help"),
    "shards of what": (["--data", "python", "--num-shards", "3"], r"--num-shards.*climbmix.*python"),
    "no workers": (["--data", "climbmix", "--download-workers", "0"], r"--download-workers.*0.*1"),
    "unknown option": (["--dtaa", "python"], r"--dtaa.*help"),
    "surplus": (["python"], r"python.*help"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_command_line_is_named_and_leaves_nothing_behind(mistake, forks, tmp_path):
    arguments, expected = MISTAKES[mistake]
    line = error_line(forks.run(*arguments, env={"AUTORESEARCH_CACHE": tmp_path / "cache"}))
    assert re.search(expected, line), line
    assert not (tmp_path / "cache").exists()


@given(st.lists(st.sampled_from(["--data", "--num-shards", "--download-workers", "climbmix", "no-such"]) | st.text()))
@settings(max_examples=100, deadline=None)
def test_no_arguments_at_all_lead_to_a_traceback(tmp_path_factory, arguments):
    folder, errors = tmp_path_factory.mktemp("fuzz"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(prepare, "CACHE", folder / "cache")
        patch.setattr(time, "sleep", lambda seconds: None)
        patch.setenv("HF_ENDPOINT", closed_port())
        patch.setenv("NO_PROXY", "*")
        patch.chdir(folder)
        assert prepare.main([argument.replace("\0", "") for argument in arguments]) == 1
    assert re.fullmatch(r"error: [^\n]+\n", errors.getvalue())


def test_an_unknown_scale_is_an_error_not_a_guess(forks, tmp_path):
    line = error_line(forks.run(env={"AUTORESEARCH_CACHE": tmp_path, "AUTORESEARCH_SCALE": "medium"}))
    assert "'medium'" in line and "full or small" in line


@pytest.mark.slow
def test_the_command_itself_fails_with_one_line_and_keeps_what_was_prepared(cache_copy, small):
    """A few of the others' claims once more, from the start of the interpreter on, several at a time."""
    before, offline = state(cache_copy), {"HF_ENDPOINT": closed_port(), "NO_PROXY": "*"}
    script = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path('prepare.py', run_name='__main__')"
    commands = {
        r"shard_06542.*refused.*HF_ENDPOINT.*again": (["prepare.py", "--data", "climbmix"], offline),
        r"File too large.*room": (["-c", f"{DISK_FULL}; {script}", "prepare.py", "--data", small], {}),
    }
    outcomes = {}

    def work(expected: str) -> None:
        command, env = commands[expected]
        outcomes[expected] = run(*command, env={"AUTORESEARCH_CACHE": str(cache_copy), **env})

    threads = [threading.Thread(target=work, args=(expected,)) for expected in commands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, result in outcomes.items():
        assert re.search(expected, error_line(result)), result.stderr
    assert len(outcomes) == len(commands) and before.items() <= state(cache_copy).items()
    active(cache_copy)


# == Downloads =========================================================================================================


def test_climbmix_fetches_the_validation_shard_first_and_later_only_what_is_missing(hub, forks, tmp_path):
    env = {"AUTORESEARCH_CACHE": str(tmp_path), "HF_ENDPOINT": hub.endpoint + "/"}
    two = ready(forks.run("--data", "climbmix", "--num-shards", 2, env=env))
    first, *others = hub.names()
    assert (first, sorted(others)) == (CLIMBMIX_VALIDATION, [CLIMBMIX.format(0), CLIMBMIX.format(1)])
    stored = {path.name: path.read_bytes() for path in tmp_path.rglob("shard_*.parquet")}
    assert stored == {name.rpartition("/")[2]: hub.files[name] for name in (first, *others)}
    assert len(active(tmp_path).tokens) == 2 and not temporaries(tmp_path)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = run("prepare.py", "--data", "climbmix", "--num-shards", "2", env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ready(again) == two and "nothing to do" in again.stdout and hub.names() == []
    # a promise about wall time, on a machine that does nothing else
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6

    three = ready(forks.run("--data", "climbmix", "--num-shards", 3, env=env))
    assert hub.names() == [CLIMBMIX.format(2)] and three != two and len(active(tmp_path).tokens) == 3
    assert ready(forks.run("--data", "climbmix", "--num-shards", 2, env=env)) == two
    assert hub.names() == [] and len(active(tmp_path).tokens) == 2


PASSING = {  # a server's manners, and the statuses of its answers until the shard is there
    "cut": (["cut"], [200, 206]),
    "cut again and again": (["cut"] * 3, [200, 206, 206, 206]),
    "cut, and the server knows no ranges": (["cut", "no ranges"], [200, 200]),
    "chunked": (["chunked"], [200]),
    "no length": (["no length"], [200]),
    "more than announced": (["more than announced"], [200]),
    "redirected and cut": (["redirect", "redirect"], [302, 200, 302, 206]),
    "500 three times": (["500"] * 3, [500, 500, 500, 200]),
}


@pytest.mark.slow
def test_a_server_that_fails_for_a_while_costs_only_time(hub, forks, tmp_path):
    """Each shard meets another failure, all in one run; a broken one goes on where it broke."""
    names = {manner: CLIMBMIX.format(i) for i, manner in enumerate(PASSING)}
    hub.manners = {names[manner]: iter(manners) for manner, (manners, _) in PASSING.items()}
    hub.manners["cdn/" + names["redirected and cut"]] = iter(["cut"])
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    ready(forks.run("--data", "climbmix", "--num-shards", len(PASSING), env=env))
    for manner, (_, statuses) in PASSING.items():
        requests = [request for request in hub.requests if request.name.removeprefix("cdn/") == names[manner]]
        assert [request.status for request in requests] == statuses, manner
        started = [int(request.range[len("bytes=") : -1]) for request in requests if request.status == 206]
        assert all(0 < a <= b for a, b in itertools.pairwise([*started, 2**60])), (manner, started)
    for path in tmp_path.rglob("shard_*.parquet"):
        name = CLIMBMIX_VALIDATION if "06542" in path.name else CLIMBMIX.format(int(path.stem[-5:]))
        assert path.read_bytes() == hub.files[name], path.name


def test_a_connection_that_is_reset_or_refused_is_tried_again(hub, forks, tmp_path):
    hub.manners = {CLIMBMIX_VALIDATION: iter(["no answer", "reset", "reset"]), CLIMBMIX.format(0): iter(["429", "503"])}
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    result = forks.run("--data", "climbmix", "--num-shards", 1, env=env, first=NO_WAITING)
    ready(result)
    assert "slept 3\n" in result.stdout  # as the answer 429 said
    assert {path.read_bytes() for path in tmp_path.rglob("shard_*.parquet")} == {
        hub.files[CLIMBMIX_VALIDATION],
        hub.files[CLIMBMIX.format(0)],
    }


@pytest.mark.parametrize("answer", ["fine", "partial from the start"])
def test_a_resumed_download_is_never_put_together_from_two_files(answer, hub, forks, tmp_path):
    """The file is another one when its rest is fetched; or the server sends all of it and calls it the rest."""
    name, new = CLIMBMIX.format(0), hub.files[CLIMBMIX.format(1)]

    def manners() -> Iterator[str]:
        yield "cut"
        if answer == "fine":
            hub.files[name] = new
        yield from itertools.repeat(answer)

    hub.manners[name] = manners()
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    result = forks.run("--data", "climbmix", "--num-shards", 1, env=env, first=NO_WAITING)
    assert len([request for request in hub.requests if request.name == name and request.range]) >= 1
    stored = [path.read_bytes() for path in tmp_path.rglob("shard_00000.parquet")]
    if answer == "fine":
        ready(result)
        assert stored == [new]
    else:
        assert stored in ([], [hub.files[name]]), "the shard holds its beginning twice"


FAILING = {
    "no answer": "aborted|reset|disconnected|closed",
    "404": "404",
    "403": "403",
    "429": "429",
    "500": "500",
    "cut": r"[\d,]+ of [\d,]+ bytes",
    "reset": r"[\d,]+ of [\d,]+ bytes",
    "chunked, cut": "cut off",
    "no length, cut": "parquet",
    "announced too short": "parquet",
    "html": "parquet",
    "no column text": "no column 'text'.*'words'",
    "stalled": r"[\d,]+ of [\d,]+ bytes",
    "hold": "timed out|timeout",
    "redirect to itself": "redirect",
}


@pytest.mark.parametrize("manner", FAILING)
def test_a_failing_download_names_shard_cause_and_remedy_and_is_all_that_is_missing(
    manner, hub, forks, tmp_path, passages
):
    failing, good = CLIMBMIX.format(0), hub.files.copy()
    if manner == "no column text":
        hub.files[failing] = parquet(passages[:100], column="words")
    else:
        hub.manners[failing] = itertools.repeat(manner)
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    first = NO_WAITING + (IMPATIENT if manner in ("hold", "stalled") else "")
    result = forks.run("--data", "climbmix", "--num-shards", 1, env=env, first=first)
    line = error_line(result)
    assert re.search(f"shard_00000.parquet.*({FAILING[manner]}).*", line, re.IGNORECASE) and "again" in line, line
    assert f"{hub.endpoint}/{failing}" in line
    waited = sum(float(seconds) for seconds in re.findall(r"slept ([\d.]+)", result.stdout))
    assert waited <= 30, "it takes too long to say that there is no point in waiting"
    if first != NO_WAITING:  # without a byte for a minute, a connection is dead
        timeouts = re.findall(r"timeout \((\d+), (\d+)\)", result.stdout)
        assert timeouts and all(max(map(int, pair)) <= 60 for pair in timeouts)
    assert [path.name for path in tmp_path.rglob("shard_*")] == ["shard_06542.parquet"]

    hub.release.set()
    hub.files, hub.manners = good, {}
    hub.names()
    ready(forks.run("--data", "climbmix", "--num-shards", 1, env=env))
    assert hub.names() == [failing] and not temporaries(tmp_path)


def test_without_a_network_the_line_names_the_host_and_nothing_is_lost(cache_copy, forks):
    before = state(cache_copy)
    for endpoint, cause in (
        (closed_port(), "refused"),
        ("http://no-such-host.invalid", "resol|not known"),
        ("no-such-scheme", "no-such-scheme"),
    ):
        env = {"AUTORESEARCH_CACHE": cache_copy, "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
        line = error_line(forks.run("--data", "tinystories", env=env, first=NO_WAITING))
        assert re.search(f"tinystories.*({cause}).*HF_ENDPOINT.*again", line), line
        assert before == state(cache_copy)


def test_one_shard_that_fails_does_not_wait_for_another_that_hangs(hub, forks, tmp_path):
    hub.manners = {CLIMBMIX.format(0): iter(["hold"]), CLIMBMIX.format(1): itertools.repeat("404")}
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    line = error_line(forks.run("--data", "climbmix", "--num-shards", 3, env=env, timeout=30))
    assert "shard_00001.parquet" in line and "404" in line


def test_a_shard_that_was_damaged_on_disk_is_named_and_its_remedy_works(hub, forks, tmp_path):
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    fingerprint = ready(forks.run("--data", "climbmix", "--num-shards", 1, env=env))
    hub.names()
    path = next(tmp_path.rglob("shard_00000.parquet"))
    path.write_bytes(path.read_bytes()[:-1000])
    result = forks.run("--data", "climbmix", "--num-shards", 1, env=env)
    if result.returncode:
        assert str(path) in error_line(result)
        path.unlink()
        result = forks.run("--data", "climbmix", "--num-shards", 1, env=env)
    assert ready(result) == fingerprint and hub.names() == [CLIMBMIX.format(0)]
    active(tmp_path)


def test_on_a_terminal_every_step_shows_its_progress(hub, forks, tmp_path):
    terminal, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(terminal, False)
    first = f"import os; os.dup2(os.open({os.ttyname(slave)!r}, os.O_RDWR), 2)"
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    result = forks.run("--data", "climbmix", "--num-shards", 2, env=env, first=first)
    shown = os.read(terminal, 10**6).decode()
    os.close(terminal)
    os.close(slave)
    ready(result)
    assert all(re.search(rf"{step}: .*\d", shown) for step in ("download", "tokenizer", "tokens")), shown


# == Corpora ===========================================================================================================


def test_tinystories_is_split_at_exactly_the_suggested_rows(hub, forks, tmp_path, passages):
    rows = [f"Story {i} is short." for i in range(20_000)] + passages[:300]
    rows[3], rows[12_345], rows[19_999], rows[20_001] = None, "", None, ""  # which still are rows
    hub.files[TINYSTORIES] = parquet(rows)
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    fingerprint = ready(forks.run("--data", "tinystories", env=env))
    assert hub.names() == [TINYSTORIES]
    assert documents(tmp_path, "val") == list(filter(None, rows[10_000:20_000]))
    assert documents(tmp_path, "train") == list(filter(None, rows[20_000:]))
    again = forks.run(env=env)  # it is this scale's default
    assert ready(again) == fingerprint and "nothing to do" in again.stdout and hub.names() == []


@pytest.fixture(scope="module")
def mixed(forks, passages, tmp_path_factory) -> tuple[Path, Path]:
    """(source, cache): a folder with every type of file, prepared."""
    source, cache = (tmp_path_factory.mktemp("mixed") / name for name in ("own data", "cache"))
    jsonl(source, passages[:250] + passages[200:250] * 2)
    hard = r'{"text": "lone \ud800 and \udfff, paired \ud83d\ude00, NUL \u0000, \u2028, <|bos|>, \u0627\u0644 e\u0301"}'
    (source / "hard.jsonl").write_text(f'{hard}\n{{"text": ""}}\n{{"text": "other fields", "id": 1}}\n')
    (source / "in" / "here").mkdir(parents=True)
    table = pa.table({"text": pa.array([None, "", *passages[250:500]], pa.large_string()), "id": range(252)})
    pq.write_table(table, source / "in" / "a.parquet")
    (source / "in" / "here" / "b.txt").write_bytes(b"caf\xe9 \xff\xfe\n\n" + "\n\n".join(passages[500:800]).encode())
    (source / "c.md").write_text("# Title\n\n" + "".join(passages[800:]), "utf-8")
    (source / "d.csv").write_text("not for training")
    jsonl(source, ["x" * 2**20, " " * 2**20, "".join(passages[:100])], "long.jsonl")
    ready(forks.run("--data", source, env={"AUTORESEARCH_CACHE": cache}))
    return source, cache


def test_a_folder_of_own_data_keeps_every_document_of_every_type_of_file(mixed, passages):
    found = documents(mixed[1], "train") + documents(mixed[1], "val")
    assert set(passages[:500]) <= set(found) and "other fields" in found
    assert None not in found and "" not in found and "not for training" not in found
    hard = [text for text in found if text.startswith("lone ")]
    assert [re.sub("[?\ufffd]", "R", text) for text in hard] == [
        "lone R and R, paired \U0001f600, NUL \0, \u2028, <|bos|>, \u0627\u0644 e\u0301"
    ]


def test_token_files_hold_every_document_whole_behind_a_bos_of_its_own(mixed):
    """As the slow way makes them: encoded one by one, cut where a row is full. (A cut word may encode otherwise.)"""
    prepared = active(mixed[1])
    tokenizer = prepare.Tokenizer.from_directory(prepared.folder)
    bos = tokenizer.get_bos_token_id()
    shards = sorted(prepared.folder.glob("shards*/train_*.parquet"))
    assert len(shards) == len(prepared.tokens) and any("<|bos|>" in text for text in documents(mixed[1], "train"))
    for shard, path in zip(shards, prepared.tokens, strict=True):
        tokens, want = np.fromfile(path, "<u2").tolist(), []
        for text in pq.read_table(shard)["text"].to_pylist():
            for piece in (text[i : i + 100_000] for i in range(0, len(text), 100_000)):
                ids = tokenizer.encode(piece)
                assert tokenizer.decode(ids) == piece and bos not in ids
                for i in range(0, len(ids), prepare.MAX_SEQ_LEN):
                    want += [bos, *ids[i : i + prepare.MAX_SEQ_LEN]]
        assert tokens == want
        text = tokenizer.decode(token for token in tokens if token != bos)
        assert text == "".join(pq.read_table(shard)["text"].to_pylist())
        starts = [i for i, token in enumerate(tokens) if token == bos] + [len(tokens)]
        lengths = {b - a for a, b in itertools.pairwise(starts)}
        assert max(lengths) == prepare.MAX_SEQ_LEN + 1 and starts[0] == 0


def test_validation_rows_are_full_rows_of_the_validation_split_and_their_bytes_are_stated(mixed):
    prepared = active(mixed[1])
    tokenizer, rows = prepare.Tokenizer.from_directory(prepared.folder), prepared.rows
    bos = tokenizer.get_bos_token_id()
    assert rows.shape[1] == prepare.MAX_SEQ_LEN + 1 and (rows[:, 0] == bos).all()
    assert prepare.MIN_VALIDATION_ROWS <= len(rows) <= prepare.EVAL_TOKENS // prepare.MAX_SEQ_LEN
    split = "".join(documents(mixed[1], "val"))
    for row in rows[::10]:
        pieces = np.split(row, np.flatnonzero(row == bos))
        assert all(tokenizer.decode(piece[1:].tolist()).strip("\ufffd") in split for piece in pieces)
    text_bytes = sum(len(tokenizer.encoding.decode_bytes([token])) for token in rows[:, 1:].flat if token != bos)
    stated = str({key: value for key, value in prepared.manifest.items() if "validation" in key}).replace(",", "")
    assert re.search(rf"\b{len(rows)}\b", stated) and re.search(rf"\b{text_bytes}\b", stated)


def test_text_files_are_cut_at_blank_lines_and_nothing_of_them_is_lost(mixed, passages):
    found = documents(mixed[1], "train") + documents(mixed[1], "val")
    txt, md = "caf\ufffd \ufffd\ufffd\n\n" + "\n\n".join(passages[500:800]), "# Title\n\n" + "".join(passages[800:])
    for whole in (txt, md):
        assert "\r" not in whole
        pieces, start = [], 0
        while whole[start:].strip():
            following = [text for text in found if whole.startswith(text, start)]
            assert following, whole[start : start + 200]
            pieces.append(max(following, key=len))
            start += len(pieces[-1])
        assert len(pieces) > 50
        assert all(re.search(r"\n\s*\n\Z", piece) for piece in pieces[:-1])
        lengths = sorted(map(len, pieces[:-1]))
        assert lengths[0] >= 1000 and 2000 <= lengths[len(lengths) // 2] <= 4000


def test_validation_is_five_percent_of_the_distinct_documents_and_shares_none_with_training(mixed):
    train, val = documents(mixed[1], "train"), documents(mixed[1], "val")
    assert len(set(val)) == len(val) and not set(val) & set(train)
    assert 0.03 < len(val) / len({*train, *val}) < 0.07
    assert max(Counter(train).values()) == 3, "no copies: the claim above was not put to the test"


def test_the_split_depends_on_a_document_alone(forks, mixed, passages, tmp_path):
    """Not on its place, its file, its copies, nor on those beside it."""
    source = jsonl(tmp_path / "other", random.Random(0).sample(passages[:1000], 990), "z.jsonl")
    ready(forks.run("--data", source, env={"AUTORESEARCH_CACHE": tmp_path / "cache"}))
    val, other = (set(documents(cache, "val")) for cache in (mixed[1], tmp_path / "cache"))
    both = set(passages[:500]) & set(documents(tmp_path / "cache", "train") + list(other))
    assert len(both) > 450 and len(val & both) > 10
    # a border drawn by rank moves when documents are added; one drawn by the hash alone does not
    assert len((val ^ other) & both) <= 2


def test_a_folder_is_built_again_when_a_file_of_it_has_changed_and_only_then(forks, small, tmp_path):
    source, env = Path(shutil.copytree(small, tmp_path / "own")), {"AUTORESEARCH_CACHE": tmp_path / "cache"}
    first = ready(forks.run("--data", source, env=env))
    before = state(tmp_path / "cache")
    again = forks.run("--data", source, env=env)
    assert ready(again) == first and "nothing to do" in again.stdout and state(tmp_path / "cache") == before

    for change in ("add", "edit", "remove"):
        if change == "add":
            (source / "more.md").write_text("One more document.\n")
        elif change == "edit":
            (source / "more.md").write_text("One less document.\n")
        else:
            (source / "more.md").unlink()
        result = forks.run("--data", source, env=env)
        fingerprint = ready(result)
        assert "nothing to do" not in result.stdout
        found = [text for text in documents(tmp_path / "cache", "train") if text.endswith(" document.\n")]
        assert found == {"add": ["One more document.\n"], "edit": ["One less document.\n"], "remove": []}[change]
    assert fingerprint == first
    assert len(list((tmp_path / "cache").glob("own-*/shards-*"))) == 1, "older builds pile up"


NUMBERED = parquet([f"text {i}" for i in range(10_000)])
BAD_DATA = {
    "nothing": ({}, "text"),
    "nothing to read": ({"a.csv": b"text"}, "text"),
    "blank": ({"a.txt": b"\n\n \n", "b.md": b""}, "text"),
    "one document": ({"a.txt": b"Once upon a time."}, "more"),
    "one document, again and again": ({"a.jsonl": b'{"text": "Once upon a time."}\n' * 100_000}, "more"),
    "no parquet": ({"a.parquet": b"PAR1" + bytes(1000)}, r"a\.parquet"),
    "half a parquet": ({"a.parquet": parquet(["text"] * 1000, 10**5)[:50_000]}, r"a\.parquet"),
    "damaged in the middle": ({"a.parquet": NUMBERED[:4] + bytes(3000) + NUMBERED[3004:]}, r"a\.parquet"),
    "another column": ({"a.parquet": parquet(["text"], column="words")}, r"a\.parquet.*'text'.*'words'"),
    "a column of numbers": ({"a.parquet": parquet([1, 2, 3])}, r"a\.parquet"),
    "no JSON": ({"a.jsonl": b'{"text": "fine"}\nfine\n'}, r"a\.jsonl.*line 2"),
    "JSON without text": ({"a.jsonl": b'{"words": "fine"}\n'}, r"a\.jsonl.*line 1"),
    "text that is a number": ({"a.jsonl": b'{"text": "fine"}\n{"text": 5}\n'}, r"a\.jsonl.*line 2"),
    "JSON that is a number": ({"a.jsonl": b"5\n"}, r"a\.jsonl.*line 1"),
}


@pytest.mark.parametrize("defect", BAD_DATA)
def test_data_that_cannot_be_used_is_named_and_does_not_become_active(defect, forks, tmp_path):
    files, expected = BAD_DATA[defect]
    (tmp_path / "own").mkdir()
    for name, content in files.items():
        (tmp_path / "own" / name).write_bytes(content)
    result = forks.run("--data", tmp_path / "own", env={"AUTORESEARCH_CACHE": tmp_path / "cache"})
    assert re.search(expected, error_line(result)), result.stderr
    assert not temporaries(tmp_path) and not (tmp_path / "cache" / "active-small").exists()
    assert all((tmp_path / "own" / name).read_bytes() == content for name, content in files.items())


def test_a_corpus_that_is_too_small_says_so_and_more_text_mends_it(forks, passages, tmp_path):
    env = {"AUTORESEARCH_CACHE": tmp_path / "cache"}
    source = jsonl(tmp_path / "own", [text[:40] for text in passages[:100]])
    assert re.search(r"\b\d+ tokens, not 2,048.*more", error_line(forks.run("--data", source, env=env)))
    jsonl(source, passages[:400])
    assert re.search(r"\b\d+ rows.* 64 .*more", error_line(forks.run("--data", source, env=env)))
    assert not (tmp_path / "cache" / "active-small").exists()
    jsonl(source, passages[:1100])
    ready(forks.run("--data", source, env=env))
    active(tmp_path / "cache")


def test_python_sources_become_distinct_pieces_in_an_order_of_their_own_and_stay_frozen(forks, corpus, tmp_path):
    root, files = tmp_path / "lib", sorted(corpus.iterdir())

    def prepared(cache: str) -> str:
        first = f"import sysconfig; sysconfig.get_path = lambda *_, **__: {str(root)!r}"
        return ready(forks.run("--data", "python", env={"AUTORESEARCH_CACHE": tmp_path / cache}, first=first))

    (root / "package").mkdir(parents=True)
    for path in files:
        shutil.copy(path, root / "package" / f"{path.stem}.py")
        shutil.copy(path, root / f"copy_of_{path.stem}.py")
    (root / "latin.py").write_bytes(b"# caf\xe9 is no UTF-8\n" * 100)
    (root / "site-packages").mkdir()
    (root / "site-packages" / "foreign.py").write_text("# of another environment\n" * 100)
    fingerprint = prepared("cache")
    train, val = (documents(tmp_path / "cache", split) for split in ("train", "val"))
    assert len(set(train + val)) == len(train + val) > 400
    assert not any("another environment" in text or "is no UTF-8" in text for text in train + val)
    wholes = [path.read_text("utf-8") for path in files]
    everything = "\n" + "\n".join(wholes)
    assert all("\n" + text in everything for text in train + val)
    definitions = sum(bool(re.match(r"(@|class |def |async def )", text)) for text in train + val)
    lengths = sorted(map(len, train + val))
    assert definitions > 0.1 * len(lengths) and 600 < np.median(lengths) < 1000 and lengths[-2] < 2000
    assert sum(map(len, train + val)) > 0.95 * sum(map(len, wholes))

    shutil.rmtree(root / "package")  # other names, the same text: what counts is the content
    for i, path in enumerate(sorted(root.glob("copy_of_*"), reverse=True)):
        path.rename(root / f"{i:03}.py")
    assert prepared("other") == fingerprint
    assert state(active(tmp_path / "other").folder / "shards") == state(active(tmp_path / "cache").folder / "shards")
    (root / "more.py").write_text("def more(): pass\n" * 100)
    assert prepared("cache") == fingerprint


# == The prepared folder ===============================================================================================


@pytest.fixture
def own(small: Path, forks: Forks, tmp_path: Path, own_cache: Path) -> tuple[Path, dict]:
    """(cache, environment) with `small` prepared, to be damaged."""
    cache = Path(shutil.copytree(own_cache, tmp_path / "cache"))
    return cache, {"AUTORESEARCH_CACHE": cache}


@pytest.fixture(scope="module")
def own_cache(small: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("own") / "cache"
    ready(forks.run("--data", small, env={"AUTORESEARCH_CACHE": cache}))
    return cache


def replaced(value: object, old: object, new: object) -> object:
    """A copy of JSON with every `old` number replaced; True and 1 are different."""
    if isinstance(value, dict):
        return {key: replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, old, new) for item in value]
    return new if type(value) is type(old) and value == old else value


MANIFESTS = {
    "another version": lambda manifest: json.dumps(replaced(manifest, 1, 99)),
    "another row length": lambda manifest: json.dumps(replaced(manifest, 256, 512)),
    "another vocabulary": lambda manifest: json.dumps(replaced(manifest, 2048, 4096)),
    "another scale": lambda manifest: json.dumps(replaced(manifest, "small", "full")),
    "cut off": lambda manifest: json.dumps(manifest)[:-20],
    "empty": lambda manifest: "",
    "a list": lambda manifest: "[]",
    "nothing": lambda manifest: "null",
    "a text": lambda manifest: '"layout"',
    "rubbish": lambda manifest: "\0\ufffd",
    "no files": lambda manifest: json.dumps({key: value for key, value in manifest.items() if key != "files"}),
    "numbers for names": lambda manifest: json.dumps({key: 5 if key == "files" else manifest[key] for key in manifest}),
}


def test_a_folder_of_another_version_or_scale_or_with_a_damaged_manifest_is_prepared_again(own, small, forks):
    cache, env = own
    path = active(cache).folder / "manifest.json"
    good, fingerprint = path.read_text(), ready(forks.run("--data", small, env=env))
    for defect, edit in MANIFESTS.items():
        path.write_text(edit(json.loads(good)))
        assert path.read_text() != good, defect
        result = forks.run("--data", small, env=env)
        assert ready(result) == fingerprint and "nothing to do" not in result.stdout, defect
        assert json.loads(path.read_text()) == json.loads(good), defect
        active(cache)


@pytest.mark.parametrize("damage", ["missing", "shorter"])
@pytest.mark.parametrize("kind", ["shards", "tokens"])
@pytest.mark.slow
def test_a_file_that_is_gone_or_has_another_length_is_made_again(kind, damage, forks, passages, tmp_path):
    """Never taken as it is, nor done without: a new manifest would vouch for it."""
    source = jsonl(tmp_path / "own", passages[:1000] + [f"Line {i}.\n" for i in range(20_000)])
    cache, env = tmp_path / "cache", {"AUTORESEARCH_CACHE": tmp_path / "cache"}
    ready(forks.run("--data", source, env=env))
    before, folder = state(cache), active(cache).folder
    names = [name for name in before if name.startswith(f"{folder.name}/{kind}")]
    assert len(names) >= {"shards": 3, "tokens": 5}[kind]
    for name in names:
        content = (cache / name).read_bytes()
        (cache / name).unlink()
        if damage == "shorter":
            (cache / name).write_bytes(content[: len(content) // 4 * 2])
        result = forks.run("--data", source, env=env)
        assert result.returncode == 0 or name in error_line(result), (name, result.stderr)
        if result.returncode:  # then the line says that the file is to be deleted
            (cache / name).unlink(missing_ok=True)
            ready(forks.run("--data", source, env=env))
        after = state(cache)
        assert after == before, (name, [key for key in {*after, *before} if after.get(key) != before.get(key)])


def test_the_active_corpus_is_switched_at_once_or_not_at_all(own, small, passages, forks, tmp_path):
    """Killed before or after each rename that has to do with it, the marker names the one or the other, complete."""
    cache, env = own
    ours, seen = active(cache).folder, set()
    other = jsonl(tmp_path / "other", passages[200:])
    ready(forks.run("--data", other, env=env))
    theirs = active(cache).folder
    kill = """
import os, signal
replace, left = os.replace, [{}]
def replace_or_die(source, target):
    for step in (lambda: replace(source, target), lambda: None):
        if "active" in str(target):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        step()
os.replace = replace_or_die
"""
    for steps in range(10):
        ready(forks.run("--data", small, env=env))
        assert active(cache).folder == ours
        result = forks.run("--data", other, env=env, first=kill.format(steps))
        assert active(cache).folder in (ours, theirs)
        seen.add(active(cache).folder)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL
    assert steps >= 2 and seen == {ours, theirs} and active(cache).folder == theirs


# == Interruption, a full disk, others =================================================================================

ENDS = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, None),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, None),
    "interrupted": ("os.kill(os.getpid(), signal.SIGINT)", 1, "interrupted.*again"),
    "disk full": ("resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))", 1, r"File too large.*(room|space)"),
}


@pytest.mark.parametrize("end", [pytest.param(end, marks=SLOW if end == "terminated" else ()) for end in ENDS])
@pytest.mark.slow
def test_ended_after_every_file_that_it_completes_it_still_comes_to_the_same(end, own_cache, hub, forks, tmp_path):
    """Every run completes one more file, then it ends; another corpus stays active until all is done."""
    cache = Path(shutil.copytree(own_cache, tmp_path / "cache"))
    action, returncode, expected = ENDS[end]
    before, ours = state(cache), active(cache).folder
    env = {"AUTORESEARCH_CACHE": cache, "HF_ENDPOINT": hub.endpoint}
    arguments, first = ("--data", "climbmix", "--num-shards", 2), AFTER_NEXT_NEW_FILE.format(action)
    for runs in itertools.count():
        result = forks.run(*arguments, env=env, first=first)
        if result.returncode == 0 or runs == 20:
            break
        assert result.returncode == returncode, result.stderr
        assert not expected or re.search(expected, error_line(result)), result.stderr
        assert active(cache).folder == ours and before.items() <= state(cache).items()
    assert 6 <= runs < 20  # shards, tokenizer, token files, rows, manifest
    undisturbed = forks.run(*arguments, env=env | {"AUTORESEARCH_CACHE": tmp_path / "undisturbed"})
    again = forks.run(*arguments, env=env)
    assert ready(again) == ready(undisturbed) and "nothing to do" in again.stdout
    folder, twin = active(cache).folder, active(tmp_path / "undisturbed").folder
    assert state(folder) == state(twin) and not temporaries(cache)


def ends_at_random_moments(forks: Forks, source: Path, folder: Path, moments: int, signals: list[int]) -> None:
    """Every time from an empty cache, and once more until it is ready."""
    twin = folder / "undisturbed"
    began = time.monotonic()
    fingerprint = ready(forks.run("--data", source, env={"AUTORESEARCH_CACHE": twin}))
    seconds, rng, ended = time.monotonic() - began, random.Random(moments), 0
    for i in range(moments):
        cache = folder / f"disturbed-{i}"
        job = forks.start("--data", source, env={"AUTORESEARCH_CACHE": cache})
        job.read("pid", 10)
        time.sleep(0.9 * seconds * (i + rng.random()) / moments)
        job.kill(signals[i % len(signals)])
        ended += job.wait().returncode != 0
        assert ready(forks.run("--data", source, env={"AUTORESEARCH_CACHE": cache})) == fingerprint
        assert state(active(cache).folder) == state(active(twin).folder) and not temporaries(cache)
        shutil.rmtree(cache)
    assert ended >= moments // 2, "it had nearly always ended before: nothing was put to the test"


def test_killed_at_random_moments_it_comes_to_the_same(forks, small, tmp_path):
    ends_at_random_moments(forks, small, tmp_path, 3, [signal.SIGKILL])


@SLOW
def test_ended_at_thirty_random_moments_it_comes_to_the_same(forks, small, tmp_path):
    ends_at_random_moments(forks, small, tmp_path, 30, [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])


def test_ctrl_c_during_a_download_is_one_line_and_the_rest_is_fetched_later(hub, forks, tmp_path):
    hub.manners[CLIMBMIX.format(1)] = iter(["hold"])
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    job = forks.start("--data", "climbmix", "--num-shards", 2, env=env)
    until(lambda: len(hub.requests) == 3 and list(tmp_path.rglob("shard_00000.parquet")))
    job.kill(signal.SIGINT)
    assert re.search("interrupted.*again", error_line(job.wait(20)))
    hub.release.set()
    hub.names()
    ready(forks.run("--data", "climbmix", "--num-shards", 2, env=env))
    assert hub.names() == [CLIMBMIX.format(1)] and not temporaries(tmp_path)


@SLOW
def test_at_full_scale_documents_stay_whole(hub, forks, passages, tmp_path):
    paths = sorted(write_corpus(tmp_path / "corpus", 4).iterdir())
    train = ["x" * 250_000, *(path.read_text("utf-8") for path in paths)]
    hub.files |= {CLIMBMIX_VALIDATION: parquet(passages), CLIMBMIX.format(0): parquet(train)}
    env = {"AUTORESEARCH_CACHE": tmp_path / "cache", "HF_ENDPOINT": hub.endpoint, "AUTORESEARCH_SCALE": "full"}
    ready(forks.run("--num-shards", 1, env=env))  # climbmix is what this scale is for
    folder = tmp_path / "cache" / (tmp_path / "cache" / "active-full").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = np.fromfile(folder / manifest["train"][0], "<u2")
    lines = (folder / manifest["tokenizer"]).read_text().splitlines()
    assert len(lines) == 8192 - 4
    starts = np.flatnonzero(tokens == 8192 - 4)
    assert len(starts) == sum(-(-len(text) // 100_000) for text in train)  # cut at 100,000 characters, nowhere else
    assert np.diff(starts).max() > 2049


def test_a_second_prepare_of_the_same_corpus_is_refused_and_the_first_unharmed(hub, forks, tmp_path):
    hub.manners[CLIMBMIX.format(0)] = iter(["hold"])
    env = {"AUTORESEARCH_CACHE": tmp_path, "HF_ENDPOINT": hub.endpoint}
    first = forks.start("--data", "climbmix", "--num-shards", 1, env=env)
    until(lambda: len(hub.requests) == 2)
    line = error_line(forks.run("--data", "climbmix", "--num-shards", 1, env=env))
    assert re.search("another prepare.py.*wait", line) and first.returncode is None
    assert len(hub.requests) == 2
    hub.release.set()
    ready(first.wait())
    active(tmp_path)
    assert not temporaries(tmp_path)


def test_two_folders_of_one_name_are_prepared_side_by_side(forks, small, passages, tmp_path):
    cache = tmp_path / "cache"
    other = jsonl(tmp_path / "other" / small.name, passages[200:])
    jobs = [forks.start("--data", source, env={"AUTORESEARCH_CACHE": cache}) for source in (small, other)]
    assert ready(jobs[0].wait()) != ready(jobs[1].wait())
    last = active(cache).folder
    again = [forks.run("--data", source, env={"AUTORESEARCH_CACHE": cache}) for source in (small, other)]
    assert all(ready(job) and "nothing to do" in job.stdout for job in again)
    assert last.parent == cache and len(list(cache.glob(f"{small.name}-*/manifest.json"))) == 2


def test_a_cache_that_cannot_be_written_is_an_error_that_leaves_it_as_it_was(own, small, passages, forks, tmp_path):
    cache, env = own
    other, before = jsonl(tmp_path / "other", passages[200:]), state(cache)
    with contextlib.ExitStack() as stack:
        for folder in (cache, *(path for path in cache.rglob("*") if path.is_dir())):
            stack.callback(folder.chmod, folder.stat().st_mode & 0o777)
            folder.chmod(0o555)
        line = error_line(forks.run("--data", other, env=env, first=NOT_ROOT))
    assert str(cache) in line and "Permission denied" in line and "AUTORESEARCH_CACHE" in line
    assert state(cache) == before

    (tmp_path / "file").write_text("in the way")
    line = error_line(forks.run("--data", other, env={"AUTORESEARCH_CACHE": tmp_path / "file"}))
    assert str(tmp_path / "file") in line and "AUTORESEARCH_CACHE" in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_own_data_that_cannot_be_read_is_not_called_damaged(small, forks, tmp_path):
    source = Path(shutil.copytree(small, tmp_path / "own"))
    for name in ("secret.txt", "secret.parquet", "secret.jsonl"):
        (source / name).write_bytes(parquet(["secret"]))
        (source / name).chmod(0)
        line = error_line(forks.run("--data", source, env={"AUTORESEARCH_CACHE": tmp_path / "cache"}, first=NOT_ROOT))
        assert str(source / name) in line and "Permission denied" in line
        assert "AUTORESEARCH_CACHE" not in line and "make room" not in line, "the remedy is for another ill"
        (source / name).unlink()

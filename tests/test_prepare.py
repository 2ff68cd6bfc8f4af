"""prepare.py's command line: its corpora, downloads and cache, and what becomes of them when something fails.

`main` is the real command in this process, `forks.run` in one of its own, where signals or exit codes count.
"""

import contextlib
import fcntl
import gc
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
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from conftest import run, write_corpus
from helpers.hub import CLIMBMIX, CLIMBMIX_VALIDATION, TINYSTORIES, Hub, parquet
from helpers.own import active, error_line, ready
from helpers.script import environment, load, main
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare

# what the command leaves open, the end of its process closes; here its process is that of the tests
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# code that runs in a process before the script does
AT_RENAME = """
import os, resource, signal, sys
is_renamed = is_over = False
def hook(event, arguments):  # a rename is announced, then carried out
    global is_renamed, is_over
    if is_over:
        return
    if event == "os.rename" and {which}:
        is_renamed = True
        is_over = not {after}
    elif is_renamed:
        is_over = True
    if is_over:
        {action}
sys.addaudithook(hook)
"""
OF_A_NEW_FILE = "not os.path.exists(arguments[1])"
OF_THE_MARKER = "'active-' in str(arguments[1])"
DISK_FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
# root may write everywhere, except without its capabilities
NOT_ROOT = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0, ctypes.get_errno()
"""
NOT_ROOT = NOT_ROOT if os.geteuid() == 0 else ""

# == What the tests share ====================================================================================


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left_to_other_files() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that somebody wanted to wait, but did not."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture(scope="module")
def passages(corpus: Path) -> list[str]:
    """A thousand distinct documents of 1,500 characters of real text."""
    text = "".join(path.read_text("utf-8") for path in sorted(corpus.iterdir()))
    found = sorted({text[i : i + 1500] for i in range(0, len(text), 1500)})
    assert len(found) > 1000
    return found[:1000]


@pytest.fixture(scope="module")
def shards(passages: list[str]) -> dict[str, bytes]:
    """Eight training shards and the validation shard, each of several MB, nearly all of it ballast."""
    files = {}
    for i in range(8):
        files[CLIMBMIX.format(i)] = parquet(passages[100 * i : 100 * i + 100], ballast=2_500_000)
    return files | {CLIMBMIX_VALIDATION: parquet(passages[900:1000], ballast=2_500_000)}


@pytest.fixture
def hub(shards: dict[str, bytes]) -> Iterator[Hub]:
    with Hub() as hub:
        hub.files |= shards
        yield hub


@pytest.fixture(scope="module")
def few(passages: list[str]) -> list[str]:
    """About the fewest that can be prepared: what the split chooses for validation comes first."""
    splits = {"val": [], "train": []}
    for split, text in prepare.split_sources([text] for text in passages):
        splits[split].append(text)
    return splits["val"] + splits["train"][:250]


@pytest.fixture(scope="module")
def small(few: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of them."""
    return jsonl(tmp_path_factory.mktemp("small") / "own", few)


@pytest.fixture(scope="module")
def own_cache(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("own") / "cache"
    ready(main("--data", small, AUTORESEARCH_CACHE=cache))
    return cache


@pytest.fixture
def own(own_cache: Path, tmp_path: Path) -> Path:
    """A cache with `small` prepared, to be damaged."""
    return Path(shutil.copytree(own_cache, tmp_path / "cache"))


def jsonl(folder: Path, documents: list[str], name: str = "texts.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def state(folder: Path) -> dict[str, object]:
    """What every file below a folder holds; locks say nothing, nor does the order of keys in a manifest."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "lock":
            is_json = path.suffix == ".json"
            found[str(path.relative_to(folder))] = (
                json.loads(path.read_text()) if is_json else path.read_bytes()
            )
    return found


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


# == Command line ============================================================================================

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
def test_a_mistake_is_named_and_leaves_nothing(mistake, tmp_path):
    arguments, expected = MISTAKES[mistake]
    line = error_line(main(*arguments, AUTORESEARCH_CACHE=tmp_path / "cache"))
    assert re.search(expected, line), line
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """prepare.py with an empty cache; it finds no hub either."""
    return load(AUTORESEARCH_CACHE=tmp_path_factory.mktemp("offline"))


WORDS = ["--data", "--num-shards", "--download-workers", "climbmix", "no-such", "3"]
TEXTS = st.text(st.characters(exclude_characters="/.\0"))  # no folders: every corpus here is out of reach


@given(arguments=st.lists(st.sampled_from(WORDS) | TEXTS))
@settings(max_examples=100, deadline=None)
def test_no_arguments_lead_to_a_traceback(offline, arguments):
    error_line(main(*arguments, module=offline, HF_ENDPOINT="no-such-scheme://hub"))


def test_an_unknown_scale_is_an_error():
    with pytest.raises(SystemExit, match="^error: .*'medium'.*full, desktop, small"):
        load(AUTORESEARCH_SCALE="medium")


def cpu_seconds(*command: object, env: dict) -> tuple[float, subprocess.CompletedProcess]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(*command, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


@pytest.mark.slow
def test_the_command_from_the_start_of_python(hub, small, tmp_path):
    """A few of the others' claims once more; and that there is nothing to do is known after two seconds."""
    cache = hub.environment(tmp_path)
    command = ("prepare.py", "--data", "climbmix", "--num-shards", "2")
    fingerprint = ready(run(*command, env=cache))
    before = state(tmp_path)
    seconds, again = cpu_seconds(*command, env=cache)
    assert ready(again) == fingerprint and "nothing to do" in again.stdout
    imports_alone, unknown_scale = cpu_seconds(*command, env=cache | {"AUTORESEARCH_SCALE": "medium"})
    assert "'medium'" in error_line(unknown_scale)
    assert seconds < imports_alone + 2

    offline = run("prepare.py", "--data", "tinystories", env=cache | {"HF_ENDPOINT": closed_port()})
    assert re.search("tinystories.*refused.*HF_ENDPOINT.*again", error_line(offline))
    script = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path('prepare.py', run_name='__main__')"
    full = run("-c", f"{DISK_FULL}; {script}", "prepare.py", "--data", small, env=cache)
    assert re.search("File too large.*room", error_line(full))
    assert before.items() <= state(tmp_path).items() and not temporaries(tmp_path)


# == Downloads ===============================================================================================


def test_only_missing_shards_are_fetched(hub, tmp_path):
    cache = hub.environment(tmp_path) | {"HF_ENDPOINT": hub.endpoint + "/"}
    two = ready(main("--data", "climbmix", "--num-shards", 2, **cache))
    first, *others = hub.names()
    assert (first, sorted(others)) == (CLIMBMIX_VALIDATION, [CLIMBMIX.format(0), CLIMBMIX.format(1)])
    stored = {path.name: path.read_bytes() for path in tmp_path.rglob("shard_*.parquet")}
    assert stored == {name.rpartition("/")[2]: hub.files[name] for name in (first, *others)}
    assert not temporaries(tmp_path)

    again = main("--data", "climbmix", "--num-shards", 2, **cache)
    assert ready(again) == two and "nothing to do" in again.stdout and hub.names() == []
    three = ready(main("--data", "climbmix", "--num-shards", 3, **cache))
    assert hub.names() == [CLIMBMIX.format(2)] and three != two
    assert ready(main("--data", "climbmix", "--num-shards", 2, **cache)) == two
    assert hub.names() == []


PASSING = {  # a server's manners, and the statuses of its answers until the shard is there
    "cut": (["cut"], [200, 206]),
    "cut again and again": (["cut"] * 3, [200, 206, 206, 206]),
    "cut, and the server knows no ranges": (["cut", "no ranges"], [200, 200]),
    "chunked": (["chunked"], [200]),
    "no length": (["no length"], [200]),
    "more than announced": (["more than announced"], [200]),
    "redirected": (["redirect"], [302, 200]),
    "redirected and cut": (["redirect", "redirect"], [302, 200, 302, 206]),
    "reset": (["no answer", "reset", "reset"], [0, 200, 206, 206]),
    "429 and 503": (["429", "503"], [429, 503, 200]),
    "500 three times": (["500"] * 3, [500, 500, 500, 200]),
}


@pytest.mark.parametrize("manner", PASSING)
def test_a_failure_that_passes_costs_only_time(manner, hub, tmp_path, slept):
    """A download that breaks goes on where it broke."""
    manners, statuses = PASSING[manner]
    name = CLIMBMIX.format(3)
    hub.manners[name] = iter(manners)
    if manner == "redirected and cut":
        hub.manners[f"cdn/{name}"] = iter(["cut"])
    path = tmp_path / "shard_00003.parquet"
    with environment(**hub.environment(tmp_path)):
        prepare.download(prepare.CLIMBMIX, [path])
    assert path.read_bytes() == hub.files[name] and list(tmp_path.iterdir()) == [path]
    assert [request.status for request in hub.requests] == statuses
    started = [int(request.range[len("bytes=") : -1]) for request in hub.requests if request.status == 206]
    assert started == sorted(started)
    assert manner == "reset" or 0 not in started  # what came before a reset may be lost on its way
    assert manner != "429 and 503" or 3 in slept  # as the answer 429 said


@pytest.mark.parametrize("answer", ["fine", "partial from the start"])
def test_no_file_is_put_together_from_two(answer, hub, tmp_path, slept):
    """The file is another one when its rest is fetched; or the server sends all of it as the rest."""
    name = CLIMBMIX.format(0)
    new = hub.files[CLIMBMIX.format(1)]

    def manners() -> Iterator[str]:
        yield "cut"
        if answer == "fine":
            hub.files[name] = new
        yield from itertools.repeat(answer)

    hub.manners[name] = manners()
    path = tmp_path / "shard_00000.parquet"
    with environment(**hub.environment(tmp_path)), contextlib.suppress(prepare.AutoresearchError):
        prepare.download(prepare.CLIMBMIX, [path])
    assert any(request.range for request in hub.requests)
    if answer == "fine":
        assert path.read_bytes() == new
    elif path.exists():
        assert path.read_bytes() == hub.files[name], "the shard holds its beginning twice"


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


@pytest.mark.parametrize(
    "manner",
    [pytest.param(it, marks=pytest.mark.slow if it in ("stalled", "hold") else ()) for it in FAILING],
)
def test_a_failing_download_names_its_cause(manner, hub, tmp_path, passages, slept):
    """Shard, address, cause and remedy in one line; nothing but this shard is missing afterwards."""
    failing = CLIMBMIX.format(0)
    if manner == "no column text":
        hub.files[failing] = parquet(passages[:100], column="words")
    else:
        hub.manners[failing] = itertools.repeat(manner)
    module = load(**hub.environment(tmp_path))
    assert max(module.DOWNLOAD_TIMEOUT) <= 60, "without a byte for a minute, a connection is dead"
    if manner in ("stalled", "hold"):
        module.DOWNLOAD_TIMEOUT = (0.2, 0.2)
    line = error_line(
        main("--data", "climbmix", "--num-shards", 1, module=module, **hub.environment(tmp_path))
    )
    assert re.search(f"shard_00000.parquet.*({FAILING[manner]}).*again", line, re.IGNORECASE), line
    assert f"{hub.endpoint}/{failing}" in line
    assert sum(slept) <= 30, "it takes too long to say that there is no point in waiting"
    assert [path.name for path in tmp_path.rglob("shard_*")] == ["shard_06542.parquet"]
    assert not temporaries(tmp_path)


@pytest.mark.slow
def test_after_a_failure_the_rest_is_fetched(hub, forks, tmp_path):
    hub.manners[CLIMBMIX.format(1)] = iter(["404"])
    command = ("--data", "climbmix", "--num-shards", 2)
    error_line(forks.run(*command, env=hub.environment(tmp_path)))
    missing = {CLIMBMIX_VALIDATION, *map(CLIMBMIX.format, range(2))}
    missing -= {f"{prepare.CLIMBMIX}/{path.name}" for path in tmp_path.rglob("shard_*.parquet")}
    assert CLIMBMIX.format(1) in missing and CLIMBMIX_VALIDATION not in missing
    hub.names()
    ready(forks.run(*command, env=hub.environment(tmp_path)))
    assert set(hub.names()) == missing and not temporaries(tmp_path)


def test_without_a_network_nothing_is_lost(cache_copy, slept):
    before = state(cache_copy)
    causes = {
        closed_port(): "refused",
        "http://no-such-host.invalid": "resol|not known",
        "no-such-scheme": "no-such-scheme",
    }
    for endpoint, cause in causes.items():
        env = {"AUTORESEARCH_CACHE": cache_copy, "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
        line = error_line(main("--data", "tinystories", **env))
        assert re.search(f"tinystories.*({cause}).*HF_ENDPOINT.*again", line), line
        assert before == state(cache_copy)


@pytest.mark.parametrize("endpoint", [None, ""], ids=["unset", "empty"])
def test_the_default_hub_is_huggingface(endpoint, tmp_path, slept):
    """Asked for through a proxy that is not there, so that no request leaves this machine."""
    proxy = closed_port()
    variables = {"HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": None, "no_proxy": None}
    line = error_line(
        main("--data", "tinystories", AUTORESEARCH_CACHE=tmp_path, HF_ENDPOINT=endpoint, **variables)
    )
    assert f"https://huggingface.co/{TINYSTORIES}" in line and "refused" in line


@pytest.mark.parametrize("manner", ["fine", "redirect"])
def test_a_stale_netrc_does_no_harm(manner, hub, tmp_path):
    """Nobody needs credentials for public files, and with wrong ones the hub refuses."""
    name = CLIMBMIX.format(0)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password expired\n")
    (tmp_path / ".netrc").chmod(0o600)
    with environment(**hub.environment(tmp_path), HOME=tmp_path, NETRC=None):
        assert requests.get(f"{hub.endpoint}/{name}").status_code == 401, "the file is not even read"
        hub.names()
        hub.manners[name] = iter([manner])
        prepare.download(prepare.CLIMBMIX, [tmp_path / "shard_00000.parquet"])
    assert len(hub.requests) == {"fine": 1, "redirect": 2}[manner]


@pytest.mark.slow
def test_a_failing_shard_does_not_wait_for_others(hub, forks, tmp_path):
    hub.manners = {CLIMBMIX.format(0): iter(["hold"]), CLIMBMIX.format(1): itertools.repeat("404")}
    command = ("--data", "climbmix", "--num-shards", 3)
    line = error_line(forks.run(*command, env=hub.environment(tmp_path), timeout=30))
    assert "shard_00001.parquet" in line and "404" in line


def test_a_damaged_shard_is_fetched_again(hub, tmp_path):
    command = ("--data", "climbmix", "--num-shards", 1)
    fingerprint = ready(main(*command, **hub.environment(tmp_path)))
    hub.names()
    path = next(tmp_path.rglob("shard_00000.parquet"))
    path.write_bytes(path.read_bytes()[:-1000])
    result = main(*command, **hub.environment(tmp_path))
    if result.returncode:
        assert str(path) in error_line(result)
        path.unlink()
        result = main(*command, **hub.environment(tmp_path))
    assert ready(result) == fingerprint and hub.names() == [CLIMBMIX.format(0)]
    active(tmp_path)


def test_a_terminal_shows_the_progress(hub, forks, tmp_path):
    terminal, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(terminal, False)
    first = f"import os; os.dup2(os.open({os.ttyname(slave)!r}, os.O_RDWR), 2)"
    command = ("--data", "climbmix", "--num-shards", 2)
    result = forks.run(*command, env=hub.environment(tmp_path), first=first)
    shown = os.read(terminal, 10**6).decode()
    os.close(terminal)
    os.close(slave)
    ready(result)
    assert all(re.search(rf"{step}: .*\d", shown) for step in ("download", "tokenizer", "tokens")), shown


# == Corpora =================================================================================================


def test_tinystories_is_split_at_the_suggested_rows(hub, tmp_path, passages):
    rows = [f"Story {i} is short." for i in range(20_000)] + passages[:300]
    rows[3], rows[12_345], rows[19_999], rows[20_001] = None, "", None, ""  # which still are rows
    hub.files[TINYSTORIES] = parquet(rows)
    fingerprint = ready(main("--data", "tinystories", **hub.environment(tmp_path)))
    assert hub.names() == [TINYSTORIES]
    assert documents(tmp_path, "val") == list(filter(None, rows[10_000:20_000]))
    assert documents(tmp_path, "train") == list(filter(None, rows[20_000:]))
    again = main(**hub.environment(tmp_path))  # it is this scale's default
    assert ready(again) == fingerprint and "nothing to do" in again.stdout and hub.names() == []


@pytest.fixture(scope="module")
def mixed_output(passages, tmp_path_factory) -> tuple[Path, str]:
    """(cache, output) of a folder with every type of file."""
    source = tmp_path_factory.mktemp("mixed") / "own data"
    cache = source.parent / "cache"
    jsonl(source, passages[:250] + passages[200:250] * 2)
    hard = r'{"text": "lone \ud800 and \udfff, paired \ud83d\ude00, NUL \u0000, '
    hard += r'\u2028, <|bos|>, \u0627\u0644 e\u0301"}'
    (source / "hard.jsonl").write_text(f'{hard}\n{{"text": ""}}\n{{"text": "other fields", "id": 1}}\n')
    (source / "in" / "here").mkdir(parents=True)
    table = pa.table({"text": pa.array([None, "", *passages[250:500]], pa.large_string()), "id": range(252)})
    pq.write_table(table, source / "in" / "a.parquet")
    latin = b"caf\xe9 \xff\xfe\n\n" + "\n\n".join(passages[500:800]).encode()
    (source / "in" / "here" / "b.txt").write_bytes(latin)
    (source / "c.md").write_text("# Title\n\n" + "".join(passages[800:]), "utf-8")
    (source / "d.csv").write_text("not for training")
    jsonl(source, ["x" * 2**20, " " * 2**20, "".join(passages[:100])], "long.jsonl")
    result = main("--data", source, AUTORESEARCH_CACHE=cache)
    ready(result)
    return cache, result.stdout


@pytest.fixture(scope="module")
def mixed(mixed_output) -> Path:
    return mixed_output[0]


def test_documents_of_every_type_are_kept(mixed, passages):
    found = documents(mixed, "train") + documents(mixed, "val")
    assert set(passages[:500]) <= set(found) and "other fields" in found
    assert None not in found and "" not in found and "not for training" not in found
    hard = [text for text in found if text.startswith("lone ")]
    assert [re.sub("[?\ufffd]", "R", text) for text in hard] == [
        "lone R and R, paired \U0001f600, NUL \0, \u2028, <|bos|>, \u0627\u0644 e\u0301"
    ]


@pytest.mark.slow
def test_token_files_hold_every_document_whole(mixed):
    """As the slow way makes them: encoded one by one, cut where a row is full."""
    prepared = active(mixed)
    tokenizer = prepare.Tokenizer.from_directory(prepared.folder)
    bos = tokenizer.get_bos_token_id()
    shards = sorted(prepared.folder.glob("shards*/train_*.parquet"))
    assert any("<|bos|>" in text for text in documents(mixed, "train"))
    for shard, path in zip(shards, prepared.train_paths, strict=True):
        tokens = np.fromfile(path, "<u2").tolist()
        want = []
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


def test_validation_rows_are_full_and_stated(mixed_output):
    cache, output = mixed_output
    prepared = active(cache)
    rows = prepared.rows
    tokenizer = prepare.Tokenizer.from_directory(prepared.folder)
    bos = tokenizer.get_bos_token_id()
    assert rows.shape[1] == prepare.MAX_SEQ_LEN + 1 and (rows[:, 0] == bos).all()
    assert prepare.MIN_VALIDATION_ROWS <= len(rows) <= prepare.EVAL_TOKENS // prepare.MAX_SEQ_LEN
    split = "".join(documents(cache, "val"))
    for row in rows[::10]:
        pieces = np.split(row, np.flatnonzero(row == bos))
        assert all(tokenizer.decode(piece[1:].tolist()).strip("\ufffd") in split for piece in pieces)
    targets = [token for token in rows[:, 1:].flat if token != bos]
    text_bytes = sum(len(tokenizer.encoding.decode_bytes([token])) for token in targets)
    train_tokens = sum(len(np.fromfile(path, "<u2")) for path in prepared.train_paths)
    stated = f"{train_tokens:,} training tokens; {len(rows):,} validation rows of {text_bytes:,} bytes"
    assert stated in output


def test_text_is_cut_at_blank_lines_without_loss(mixed, passages):
    found = documents(mixed, "train") + documents(mixed, "val")
    txt = "caf\ufffd \ufffd\ufffd\n\n" + "\n\n".join(passages[500:800])
    md = "# Title\n\n" + "".join(passages[800:])
    for whole in (txt, md):
        assert "\r" not in whole
        pieces = []
        start = 0
        while whole[start:].strip():
            following = [text for text in found if whole.startswith(text, start)]
            assert following, whole[start : start + 200]
            pieces.append(max(following, key=len))
            start += len(pieces[-1])
        assert len(pieces) > 50
        at_blank_line = [bool(re.search(r"\n\s*\n\Z", piece)) for piece in pieces[:-1]]
        assert sum(at_blank_line) > 0.9 * len(at_blank_line)
        for piece, is_at_blank_line in zip(pieces, at_blank_line, strict=False):
            assert is_at_blank_line or not re.search(r"\n\s*\n", piece[prepare.PIECE : 2 * prepare.PIECE])
        lengths = sorted(map(len, pieces[:-1]))
        assert lengths[0] >= 1000 and 2000 <= lengths[len(lengths) // 2] <= 4000


def test_validation_is_5_percent_and_shares_nothing(mixed):
    train = documents(mixed, "train")
    val = documents(mixed, "val")
    assert len(set(val)) == len(val) and not set(val) & set(train)
    assert 0.02 < len(val) / len({*train, *val}) < 0.1  # a block of a long file is several documents
    assert len(set(train)) == len(train), "the small scale takes each document once"


def test_the_split_depends_on_a_document_alone(passages):
    """Not on its place, its copies, nor on those beside it."""
    others = [f"Line {i}." for i in range(500)]
    shuffled = random.Random(0).sample(passages + passages + others, 2500)
    split, other = (
        {text for name, text in prepare.split_sources([text] for text in texts) if name == "val"}
        for texts in (passages, shuffled)
    )
    assert len(split) > 30 and len(other - set(passages)) > 10
    assert other & set(passages) == split


@pytest.mark.slow
def test_a_changed_folder_is_built_again(small, tmp_path):
    """And one that has not changed is not."""
    source = Path(shutil.copytree(small, tmp_path / "own"))
    cache = tmp_path / "cache"
    first = ready(main("--data", source, AUTORESEARCH_CACHE=cache))
    before = state(cache)
    again = main("--data", source, AUTORESEARCH_CACHE=cache)
    assert ready(again) == first and "nothing to do" in again.stdout and state(cache) == before

    more = source / "more.md"
    changes = {
        "One more document.\n": lambda: more.write_text("One more document.\n"),
        "One less document.\n": lambda: more.write_text("One less document.\n"),
        "": more.unlink,
    }
    for text, change in changes.items():
        change()
        result = main("--data", source, AUTORESEARCH_CACHE=cache)
        fingerprint = ready(result)
        assert "nothing to do" not in result.stdout
        found = [text for text in documents(cache, "train") if text.endswith(" document.\n")]
        assert "".join(found) == text
    assert fingerprint == first
    assert len(list(cache.glob("own-*/shards-*"))) == 1, "older builds pile up"


NUMBERED = parquet([f"text {i}" for i in range(10_000)])
BAD_DATA = {
    "nothing": ({}, "read nothing.*bring .parquet, .jsonl, .txt, .md"),
    "nothing to read": ({"a.csv": b"text"}, "read nothing, skipped 1 .csv; bring"),
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
def test_data_of_no_use_is_named(defect, tmp_path):
    files, expected = BAD_DATA[defect]
    source = tmp_path / "own"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    result = main("--data", source, AUTORESEARCH_CACHE=tmp_path / "cache")
    assert re.search(expected, error_line(result)), result.stderr
    assert not temporaries(tmp_path) and not (tmp_path / "cache" / "active-small").exists()
    assert all((source / name).read_bytes() == content for name, content in files.items())


def test_a_small_corpus_is_mended_by_more_text(passages, few, tmp_path):
    cache = tmp_path / "cache"
    source = jsonl(tmp_path / "own", [text[:40] for text in passages[:100]])
    line = error_line(main("--data", source, AUTORESEARCH_CACHE=cache))
    assert re.search(r"\b\d+ tokens, not 2,048.*more", line)
    jsonl(source, passages[:400])
    line = error_line(main("--data", source, AUTORESEARCH_CACHE=cache))
    assert re.search(r"\b\d+ rows.* 64 .*more", line)
    assert not (cache / "active-small").exists()
    jsonl(source, few)
    ready(main("--data", source, AUTORESEARCH_CACHE=cache))
    active(cache)


@pytest.mark.slow
def test_python_sources_become_distinct_pieces(forks, corpus, tmp_path):
    """In an order of their own, so that their files' names do not matter; once built they are frozen."""
    root = tmp_path / "lib"
    files = sorted(corpus.iterdir())

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
    pieces = documents(tmp_path / "cache", "train") + documents(tmp_path / "cache", "val")
    assert len(set(pieces)) == len(pieces) > 400
    assert not any("another environment" in text or "is no UTF-8" in text for text in pieces)
    wholes = [path.read_text("utf-8") for path in files]
    everything = "\n" + "\n".join(wholes)
    assert all("\n" + text in everything for text in pieces)
    definitions = sum(bool(re.match(r"(@|class |def |async def )", text)) for text in pieces)
    lengths = sorted(map(len, pieces))
    assert definitions > 0.1 * len(lengths) and 600 < np.median(lengths) < 1000 and lengths[-2] < 2000
    assert sum(lengths) > 0.95 * sum(map(len, wholes))

    shutil.rmtree(root / "package")  # other names, the same text: what counts is the content
    for i, path in enumerate(sorted(root.glob("copy_of_*"), reverse=True)):
        path.rename(root / f"{i:03}.py")
    assert prepared("other") == fingerprint
    first, other = (state(active(tmp_path / cache).folder / prepare.SHARDS) for cache in ("cache", "other"))
    assert first == other
    (root / "more.py").write_text("def more(): pass\n" * 100)
    assert prepared("cache") == fingerprint


# == The prepared folder =====================================================================================


def replaced(value: object, old: object, new: object) -> object:
    """A copy of JSON with every `old` number replaced; True and 1 are different."""
    if isinstance(value, dict):
        return {key: replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, old, new) for item in value]
    return new if type(value) is type(old) and value == old else value


MANIFESTS = {
    "another version": lambda manifest: json.dumps(replaced(manifest, prepare.LAYOUT[0], 99)),
    "another row length": lambda manifest: json.dumps(replaced(manifest, 256, 512)),
    "another vocabulary": lambda manifest: json.dumps(replaced(manifest, 2048, 4096)),
    "another scale": lambda manifest: json.dumps(replaced(manifest, "small", "full")),
    "cut off": lambda manifest: json.dumps(manifest)[:-20],
    "empty": lambda manifest: "",
    "a list": lambda manifest: "[]",
    "nothing": lambda manifest: "null",
    "a text": lambda manifest: '"layout"',
    "rubbish": lambda manifest: "\0\ufffd",
    "no files": lambda manifest: json.dumps({key: manifest[key] for key in manifest if key != "files"}),
    "numbers for names": lambda manifest: json.dumps(manifest | {"files": 5}),
}


@pytest.mark.parametrize("defect", MANIFESTS)
def test_a_damaged_manifest_is_made_again(defect, own, small):
    """So is the folder of another version or scale."""
    path = active(own).folder / "manifest.json"
    good = path.read_text()
    path.write_text(MANIFESTS[defect](json.loads(good)))
    assert path.read_text() != good
    result = main("--data", small, AUTORESEARCH_CACHE=own)
    ready(result)
    assert "nothing to do" not in result.stdout
    assert json.loads(path.read_text()) == json.loads(good)
    active(own)


def test_another_version_uses_no_old_token_file(own, small):
    before = active(own).train_paths
    module = load(AUTORESEARCH_CACHE=own)
    module.LAYOUT[0] = 99
    ready(main("--data", small, module=module, AUTORESEARCH_CACHE=own))
    with pytest.raises(prepare.AutoresearchError, match="99.*run prepare.py again with the same --data"):
        active(own)
    after = sorted(before[0].parent.glob("train_*.bin"))
    assert len(after) == len(before) and {*after}.isdisjoint(before)


def test_a_corpus_may_fetch_and_build(passages, tmp_path):
    """Such as somebody adds: one split in DOWNLOADS, the other in SHARDS."""
    module = load(AUTORESEARCH_CACHE=tmp_path)

    def mixed(folder: Path, options: object) -> dict[str, list[Path]]:
        shards = module.build_shards(
            folder / module.SHARDS, module.split_sources([text] for text in passages)
        )
        fetched = folder / module.DOWNLOADS / "validation.parquet"
        fetched.parent.mkdir(exist_ok=True)
        shutil.copy(shards["val"][0], fetched)
        return shards | {"val": [fetched]}

    module.CORPORA["mixed"] = mixed
    ready(main("--data", "mixed", module=module, AUTORESEARCH_CACHE=tmp_path))
    again = main("--data", "mixed", module=module, AUTORESEARCH_CACHE=tmp_path)
    ready(again)
    assert "nothing to do" in again.stdout


@pytest.mark.parametrize("damage", ["missing", "shorter"])
@pytest.mark.parametrize("kind", ["shards", "tokens"])
@pytest.mark.slow
def test_a_damaged_file_is_made_again(kind, damage, few, tmp_path):
    """Never taken as it is, nor done without: a new manifest would vouch for it."""
    source = jsonl(tmp_path / "own", few + [f"Line {i}.\n" for i in range(20_000)])
    cache = tmp_path / "cache"
    ready(main("--data", source, AUTORESEARCH_CACHE=cache))
    before = state(cache)
    names = [name for name in before if name.startswith(f"{active(cache).folder.name}/{kind}")]
    assert len(names) >= {"shards": 3, "tokens": 4}[kind]
    for name in names:
        content = (cache / name).read_bytes()
        (cache / name).unlink()
        if damage == "shorter":
            (cache / name).write_bytes(content[: len(content) // 4 * 2])
        result = main("--data", source, AUTORESEARCH_CACHE=cache)
        assert result.returncode == 0 or name in error_line(result), (name, result.stderr)
        if result.returncode:  # then the line says that the file is to be deleted
            (cache / name).unlink(missing_ok=True)
            ready(main("--data", source, AUTORESEARCH_CACHE=cache))
        after = state(cache)
        assert after == before, (
            name,
            [key for key in {*after, *before} if after.get(key) != before.get(key)],
        )


def test_the_active_corpus_switches_at_once_or_not(own, small, few, forks, tmp_path):
    """Killed before or after each rename that has to do with it, the marker names a complete folder."""
    ours = active(own).folder
    other = jsonl(tmp_path / "other", few[:-50])
    ready(main("--data", other, AUTORESEARCH_CACHE=own))
    theirs = active(own).folder
    seen = []
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    for after in (False, True):
        ready(main("--data", small, AUTORESEARCH_CACHE=own))
        assert active(own).folder == ours
        first = AT_RENAME.format(which=OF_THE_MARKER, after=after, action=kill)
        result = forks.run("--data", other, env={"AUTORESEARCH_CACHE": own}, first=first)
        assert result.returncode == -signal.SIGKILL
        seen.append(active(own).folder)
    assert seen == [ours, theirs]


def test_killed_before_the_marker_nothing_stays_behind(own, corpus, forks, tmp_path):
    """Its temporary file is removed by the next prepare.py of that corpus."""
    other = Path(shutil.copytree(corpus, tmp_path / "theirs"))
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    which = "str(arguments[1]).endswith('active')"
    first = AT_RENAME.format(which=which, after=False, action=kill)
    result = forks.run("--data", other, env={"AUTORESEARCH_CACHE": own}, first=first)
    assert result.returncode == -signal.SIGKILL and temporaries(own)
    ready(main("--data", other, AUTORESEARCH_CACHE=own))
    assert not temporaries(own) and not list(active(own).folder.glob("active*"))


# == Interruption, a full disk, others =======================================================================

ENDS = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, None),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, None),
    "interrupted": ("os.kill(os.getpid(), signal.SIGINT)", 1, "interrupted.*again"),
    "disk full": (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))",
        1,
        r"File too large.*(room|space)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_ended_after_each_file_it_comes_to_the_same(end, own, hub, forks, tmp_path):
    """Every run completes one more file, then it ends; another corpus stays active until all is done."""
    action, returncode, expected = ENDS[end]
    before = state(own)
    ours = active(own).folder
    command = ("--data", "climbmix", "--num-shards", 2)
    first = AT_RENAME.format(which=OF_A_NEW_FILE, after=True, action=action)
    completed = 0
    while active(own).folder == ours:
        result = forks.run(*command, env=hub.environment(own), first=first)
        completed += 1
        assert completed < 20
        if result.returncode:
            assert result.returncode == returncode, result.stderr
            assert not expected or re.search(expected, error_line(result)), result.stderr
        assert before.items() <= state(own).items() or active(own).folder != ours
    assert completed > 6  # shards, tokenizer, token files, rows, manifest
    undisturbed = main(*command, **hub.environment(tmp_path / "undisturbed"))
    again = main(*command, **hub.environment(own))
    assert ready(again) == ready(undisturbed) and "nothing to do" in again.stdout
    twin = active(tmp_path / "undisturbed").folder
    assert state(active(own).folder) == state(twin) and not temporaries(own)


@pytest.mark.slow
def test_ended_at_random_moments_it_comes_to_the_same(forks, small, tmp_path):
    """Every time from an empty cache, and once more until it is ready."""
    twin = tmp_path / "undisturbed"
    began = time.monotonic()
    job = forks.run("--data", small, env={"AUTORESEARCH_CACHE": twin})
    seconds = time.monotonic() - began
    ready(job)
    fingerprint = ready(main("--data", small, AUTORESEARCH_CACHE=twin))
    rng = random.Random(0)
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    moments = 18
    ended = 0
    for i in range(moments):
        cache = tmp_path / f"disturbed-{i}"
        job = forks.start("--data", small, env={"AUTORESEARCH_CACHE": cache})
        time.sleep(0.9 * seconds * (i + rng.random()) / moments)
        job.kill(signals[i % len(signals)])
        ended += job.wait().returncode != 0
        assert ready(main("--data", small, AUTORESEARCH_CACHE=cache)) == fingerprint
        assert state(active(cache).folder) == state(active(twin).folder) and not temporaries(cache)
        shutil.rmtree(cache)
    assert ended >= moments // 2, "it had nearly always ended before: nothing was put to the test"


def test_ctrl_c_during_a_download_is_one_line(hub, forks, tmp_path):
    hub.manners[CLIMBMIX.format(1)] = iter(["hold"])
    command = ("--data", "climbmix", "--num-shards", 2)
    job = forks.start(*command, env=hub.environment(tmp_path))
    until(lambda: len(hub.requests) == 3 and list(tmp_path.rglob("shard_00000.parquet")))
    job.kill(signal.SIGINT)
    assert re.search("interrupted.*again", error_line(job.wait(20)))
    hub.release.set()
    hub.names()
    ready(main(*command, **hub.environment(tmp_path)))
    assert hub.names() == [CLIMBMIX.format(1)] and not temporaries(tmp_path)


@pytest.mark.slow
def test_at_full_scale_documents_stay_whole(hub, passages, tmp_path):
    parts = [path.read_text("utf-8") for path in sorted(write_corpus(tmp_path / "corpus", 4).iterdir())]
    train = ["x" * 250_000, *("".join(parts[i : i + 10]) for i in range(0, len(parts), 10))]
    hub.files |= {CLIMBMIX_VALIDATION: parquet(passages), CLIMBMIX.format(0): parquet(train)}
    cache = tmp_path / "cache"
    # climbmix is what this scale is for
    ready(main("--num-shards", 1, **hub.environment(cache), AUTORESEARCH_SCALE="full"))
    folder = cache / (cache / "active-full").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = np.fromfile(folder / manifest["train"][0], "<u2")
    lines = (folder / manifest["tokenizer"]).read_text().splitlines()
    assert len(lines) == 8192 - 4
    starts = np.flatnonzero(tokens == 8192 - 4)
    assert len(starts) == sum(-(-len(text) // 100_000) for text in train)  # cut there, and nowhere else
    assert np.diff(starts).max() > 2049


def test_a_second_prepare_of_a_corpus_is_refused(hub, forks, tmp_path):
    hub.manners[CLIMBMIX.format(0)] = iter(["hold"])
    command = ("--data", "climbmix", "--num-shards", 1)
    first = forks.start(*command, env=hub.environment(tmp_path))
    until(lambda: len(hub.requests) == 2)
    line = error_line(main(*command, **hub.environment(tmp_path)))
    assert re.search("another prepare.py.*wait", line) and first.returncode is None
    assert len(hub.requests) == 2
    hub.release.set()
    ready(first.wait())
    active(tmp_path)
    assert not temporaries(tmp_path)


@pytest.mark.slow
def test_two_folders_of_one_name_side_by_side(forks, small, few, tmp_path):
    cache = tmp_path / "cache"
    other = jsonl(tmp_path / "other" / small.name, few[:-50])
    jobs = [forks.start("--data", source, env={"AUTORESEARCH_CACHE": cache}) for source in (small, other)]
    assert ready(jobs[0].wait()) != ready(jobs[1].wait())
    last = active(cache).folder
    again = [main("--data", source, AUTORESEARCH_CACHE=cache) for source in (small, other)]
    assert all(ready(result) and "nothing to do" in result.stdout for result in again)
    assert last.parent == cache and len(list(cache.glob(f"{small.name}-*/manifest.json"))) == 2


def test_a_read_only_cache_stays_as_it_was(own, few, forks, tmp_path):
    other = jsonl(tmp_path / "other", few[:-50])
    before = state(own)
    with contextlib.ExitStack() as stack:
        for folder in (own, *(path for path in own.rglob("*") if path.is_dir())):
            stack.callback(folder.chmod, folder.stat().st_mode & 0o777)
            folder.chmod(0o555)
        line = error_line(forks.run("--data", other, env={"AUTORESEARCH_CACHE": own}, first=NOT_ROOT))
    assert str(own) in line and "Permission denied" in line and "AUTORESEARCH_CACHE" in line
    assert state(own) == before

    in_the_way = tmp_path / "file"
    in_the_way.write_text("in the way")
    line = error_line(main("--data", other, AUTORESEARCH_CACHE=in_the_way))
    assert str(in_the_way) in line and "AUTORESEARCH_CACHE" in line
    assert in_the_way.read_text() == "in the way"


@pytest.mark.parametrize("name", ["secret.txt", "secret.parquet", "secret.jsonl"])
def test_unreadable_data_is_not_called_damaged(name, small, forks, tmp_path):
    source = Path(shutil.copytree(small, tmp_path / "own"))
    (source / name).write_bytes(parquet(["secret"]))
    (source / name).chmod(0)
    env = {"AUTORESEARCH_CACHE": tmp_path / "cache"}
    line = error_line(forks.run("--data", source, env=env, first=NOT_ROOT))
    assert str(source / name) in line and "Permission denied" in line
    assert "AUTORESEARCH_CACHE" not in line and "make room" not in line, "the remedy is for another ill"

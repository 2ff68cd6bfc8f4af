"""What the tests share: the small scale, a throw-away cache with a real corpus, and the real command line."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.forks import Forks
from helpers.lab import ROOT, SLIGHT, Lab, Outcome

# before prepare.py is imported: its scale and its cache are read once
os.environ["AUTORESEARCH_SCALE"] = "small"
os.environ["AUTORESEARCH_CACHE"] = tempfile.mkdtemp(prefix="autoresearch-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("SEED", None)
# a shell starts background jobs with SIGINT ignored, and children inherit that: Ctrl-C could not be tested
signal.signal(signal.SIGINT, signal.default_int_handler)


def run(
    *command: object, env: dict | None = None, timeout: float = 120, **options
) -> subprocess.CompletedProcess:
    """`python COMMAND` on the CPU, as a user would: run("prepare.py", "--data", folder)."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {})
    command = [sys.executable, *map(str, command)]
    options = {"cwd": ROOT, "capture_output": True, "text": True} | options
    return subprocess.run(command, env=environment, timeout=timeout, **options)


def write_corpus(folder: Path, megabytes: float = 1.5) -> Path:
    """Real text in plain files: sources of torch, in parts of 4,000 characters.

    torch is locked, so the text is the same with each version of Python; tests count on that. Which parts are
    validation depends on their content; there are as many as it takes to have enough of it.
    """
    import torch

    import prepare

    folder.mkdir(parents=True)
    written = 0
    validation = 0
    for number, source in enumerate(sorted(Path(torch.__file__).parent.glob("[n-z]*/**/*.py"))):
        text = source.read_text("utf-8", errors="replace")
        for start in range(0, len(text), 4000):
            path = folder / f"{number:04d}-{start:06d}.txt"
            path.write_text(text[start : start + 4000], "utf-8")
            for split, piece in prepare.split_sources(prepare.own_sources(path)):
                written += len(piece)
                validation += len(piece) if split == "val" else 0
        if written >= megabytes * 1e6 and validation >= 80_000:
            return folder
    raise AssertionError(f"torch has {written:,} characters, {validation:,} for validation")


@pytest.fixture(scope="session", autouse=True)
def _remove_session_cache() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["AUTORESEARCH_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files, 1.5 MB."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def cache(corpus: Path) -> Path:
    """The session's cache, with `corpus` prepared and active; read it, change only a copy."""
    import prepare

    assert prepare.main(["--data", str(corpus)]) == 0
    return prepare.CACHE


@pytest.fixture(scope="session")
def forks(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """prepare.py's command line in processes of their own, unless told otherwise with the session's cache."""
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture
def clock() -> Iterator:
    """What tells the time in this process; it stands still unless a test moves it."""
    from helpers.experiments import still_clock

    with still_clock() as clock:
        yield clock


@pytest.fixture(scope="session")
def pool() -> list[str]:
    """Paragraphs to make files of."""
    from helpers.own import paragraphs

    return paragraphs()


@pytest.fixture
def cache_copy(cache: Path, tmp_path: Path) -> Path:
    """A copy of the prepared cache, to be damaged; hand it to a command as AUTORESEARCH_CACHE."""
    return Path(shutil.copytree(cache, tmp_path / "cache"))


@pytest.fixture(scope="session")
def night(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, list[Outcome]]:
    """A repository after three runs: a baseline, which was merged, another, and a candidate: maybe."""
    lab = Lab.create(tmp_path_factory.mktemp("night") / "repository")
    outcomes = [lab.run("baseline")]
    lab.sh(outcomes[0].next)
    outcomes.append(lab.run("baseline"))
    lab.edit(SLIGHT)
    outcomes.append(lab.run("rate 0.054"))
    return lab, outcomes


@pytest.fixture
def begun(night: tuple[Lab, list[Outcome]], tmp_path: Path) -> Lab:
    """A copy of it, with the branch's train.py; the record has two baselines and the candidate."""
    return Lab.copy(night[0], tmp_path / "copy")

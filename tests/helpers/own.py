"""Folders of text, and what prepare.py makes of them.

    result = read(source, tmp_path / "built")     # documents of both splits, and what was said
    assert result.everything == {"a document", "another"}

Tags in a text tell where it came from, wherever it turns up: ~17.3~ ends paragraph 3 of file 17.
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.forks import Job
from helpers.script import Result

import prepare

TAG = re.compile(r"~(\d+)\.(\d+)~")


class Read(NamedTuple):
    train: list[str]
    val: list[str]
    output: str

    @property
    def everything(self) -> list[str]:
        return self.train + self.val


def read(source: Path, folder: Path, module: ModuleType = prepare) -> Read:
    """The documents that a folder of one's own becomes, before they are tokenized."""
    folder.mkdir(parents=True, exist_ok=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        shards = module.own_data(folder, argparse.Namespace(data=str(source)))
    return Read(texts(shards["train"]), texts(shards["val"]), output.getvalue())


def texts(paths: Iterable[Path]) -> list[str]:
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]


def ready(result: Result | Job | subprocess.CompletedProcess) -> str:
    """The fingerprint that a prepare.py printed, which must have succeeded without a word on stderr."""
    assert (result.returncode, result.stderr) == (0, ""), (result.stdout, result.stderr)
    return re.search(r"^ready: .*fingerprint (\w+)", result.stdout, re.MULTILINE)[1]


def error_line(result: Result | Job | subprocess.CompletedProcess) -> str:
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


def shard_texts(cache: Path, split: str) -> list[str]:
    """The documents of the active folder's shards."""
    return texts(sorted(active(cache).folder.glob(f"shards*/{split}_*.parquet")))


def trained_text(cache: Path) -> str:
    """What the token files of the active folder say."""
    prepared = active(cache)
    tokenizer = prepare.Tokenizer.from_directory(prepared.folder)
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in prepared.train_paths])
    return tokenizer.decode(tokens[tokens != tokenizer.get_bos_token_id()].tolist())


def scored_text(cache: Path) -> str:
    """What the validation rows say, a line for each document."""
    prepared = active(cache)
    tokenizer = prepare.Tokenizer.from_directory(prepared.folder)
    bos = tokenizer.get_bos_token_id()
    pieces = []
    for row in prepared.rows:
        for piece in np.split(row, np.flatnonzero(row == bos)):
            pieces.append(tokenizer.decode(piece[1:].tolist()))
    return "\n".join(pieces)


def tags(text: str) -> set[tuple[int, int]]:
    """(file, paragraph) of all whose end is in a text."""
    return {(int(file), int(paragraph)) for file, paragraph in TAG.findall(text)}


def paragraphs(count: int = 2000) -> list[str]:
    """Of about 500 characters, in a language of 6,000 words; the same on every machine."""
    rng = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiouéü"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(6000)]
    weights = [1 / (rank + 40) for rank in range(6000)]
    stream = iter(rng.choices(words, weights, k=count * 7 * 12))
    found = []
    for _ in range(count):
        lines = [" ".join(itertools.islice(stream, 12)) + ".\n" for _ in range(7)]
        found.append("".join(lines))
    return found


def tagged(pool: list[str], file: int, chars: int) -> str:
    """The text of a file, in paragraphs that end with a tag and a blank line."""
    rng = random.Random(file)
    parts = []
    size = 0
    while size < chars:
        parts.append(f"{rng.choice(pool)}~{file}.{len(parts)}~\n\n")
        size += len(parts[-1])
    return "".join(parts)


def write_tagged(folder: Path, pool: list[str], files: Iterable[int], chars: int, suffix=".txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / f"{file:04}{suffix}").write_text(tagged(pool, file, chars), "utf-8")
    return folder


@contextlib.contextmanager
def python_library(folder: Path) -> Iterator[None]:
    """As if Python's standard library and its packages lay in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sysconfig.get_path", lambda *_, **__: str(folder))
        yield


def write_rows(path: Path, documents: Iterable[str]) -> None:
    """A .jsonl, or a .parquet that says it all in one row group."""
    if path.suffix == ".parquet":
        with open(path, "wb") as file:  # pyarrow opens no name that is not UTF-8
            pq.write_table(pa.table({"text": list(documents)}), file)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

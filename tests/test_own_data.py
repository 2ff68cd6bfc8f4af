"""`--data DIR`, folders as people have them: types, links, encodings, long lines, odd names, large files."""

import codecs
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hub import parquet
from helpers.lab import ROOT
from helpers.machine import NOT_ROOT
from helpers.own import (
    active,
    error_line,
    read,
    ready,
    shard_texts,
    tagged,
    tags,
    trained_text,
    write_rows,
    write_tagged,
)
from helpers.script import load, main

import prepare

NOT_UTF8 = os.fsdecode(b"caf\xe9")  # a name that another system wrote


@pytest.fixture
def own(pool: list[str], tmp_path: Path) -> Path:
    """A folder of 20 texts."""
    return write_tagged(tmp_path / "own", pool, range(20), 3000)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return tmp_path / "built"


def written(source: Path, pattern: str = "*.txt") -> str:
    """All text of a folder's files, in the order of their names."""
    return "".join(path.read_text("utf-8") for path in sorted(source.rglob(pattern)))


def refusal(source: Path, folder: Path) -> str:
    """Why a folder is not read: one line."""
    with pytest.raises(prepare.AutoresearchError) as error:
        read(source, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# == Types ===================================================================================================


def test_suffixes_count_in_either_case(own, built):
    for path in sorted(own.iterdir())[::2]:
        path.rename(path.with_suffix(".TXT"))
    write_rows(own / "rows.jsonl", ["a row ~77.0~"])
    (own / "rows.jsonl").rename(own / "rows.JsonL")
    (own / "rows.parquet").write_bytes(parquet(["another ~78.0~"]))
    (own / "rows.parquet").rename(own / "rows.PARQUET")
    result = read(own, built)
    expected = tags(written(own)) | tags(written(own, "*.TXT")) | {(77, 0), (78, 0)}
    assert tags("".join(result.everything)) == expected and len(expected) > 100
    assert f"{own}: read 1 .jsonl, 1 .parquet, 20 .txt, skipped nothing\n" == result.output


def test_what_is_skipped_is_said_by_type(own, built):
    for number in range(92):
        (own / f"rows-{number}.jsonl.gz").write_bytes(b"\x1f\x8b")
    (own / "below").mkdir()
    (own / "below" / "LICENSE").write_text("no type at all")
    (own / "below" / "page.HTML").write_text("<p>")
    result = read(own, built)
    said = f"{own}: read 20 .txt, skipped 1 without a type, 92 .gz, 1 .html\n"
    assert result.output == said
    assert tags("".join(result.everything)) == tags(written(own))


def test_a_folder_without_readable_types_says_so(tmp_path):
    source = tmp_path / "own"
    source.mkdir()
    (source / "data.json").write_text('{"text": "Once upon a time."}')
    (source / "data.csv").write_text("text\nOnce upon a time.\n")
    line = error_line(main("--data", source, AUTORESEARCH_CACHE=tmp_path / "cache"))
    assert re.search(
        r"read nothing, skipped 1 \.csv, 1 \.json; bring \.parquet, \.jsonl, \.txt, \.md; names", line
    )


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.txt", "train.md"])
def test_a_git_lfs_pointer_is_called_one(name, own, built):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0123456789abcdef' * 4}\nsize 73\n"
    (own / name).write_text(pointer)
    assert re.search(rf"{name}: .*git-lfs pointer.*git lfs pull", refusal(own, built))


# == Links and hidden files ==================================================================================


def test_links_are_followed(own, pool, tmp_path):
    """To folders and files, beside others or alone, and once where they lead in a circle."""
    books = write_tagged(tmp_path / "elsewhere" / "books", pool, range(30, 50), 3000)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "books").symlink_to(books)
    assert tags("".join(read(alone, tmp_path / "first").everything)) == tags(written(books))

    (own / "books").symlink_to(books)
    (own / "one.md").symlink_to(write_tagged(tmp_path / "one", pool, [60], 3000) / "0060.txt")
    (own / "to itself").symlink_to(own)
    (books / "back").symlink_to(own)
    (books / "up").symlink_to("..")
    result = read(own, tmp_path / "second")
    everything = "".join(result.everything)
    assert tags(everything) == tags(written(own)) | tags(written(books)) | {(60, n) for n in range(6)}
    assert everything.count("~30.0~") == 1 and "read 1 .md, 40 .txt" in result.output

    linked = tmp_path / "linked"
    linked.symlink_to(own)
    assert sorted(read(linked, tmp_path / "third").everything) == sorted(result.everything)


@pytest.mark.parametrize("name", ["train-00000.parquet", "books", "notes.csv", "a.txt"])
def test_a_dead_link_is_an_error(name, own, built):
    """It would be a part of the corpus that is missing: a drive that is not there today."""
    (own / name).symlink_to("/no/such/place")
    assert re.search(f"{name}: a link to nothing; remove it", refusal(own, built))


def test_a_circle_of_links_alone_is_an_error(own, built):
    (own / "a.txt").symlink_to("b.txt")
    (own / "b.txt").symlink_to("a.txt")
    assert re.search("a.txt: Too many levels of symbolic links; .*move it away", refusal(own, built))


@pytest.mark.parametrize("mode", [0, 0o444], ids=["not listed", "listed only"])
def test_a_closed_folder_is_an_error(mode, own, forks, tmp_path):
    """With the remedy for that, and not for a full cache."""
    (own / "private").mkdir()
    (own / "private" / "a.txt").write_text("secret")
    (own / "private").chmod(mode)
    job = forks.run("--data", own, env={"AUTORESEARCH_CACHE": tmp_path / "cache"}, first=NOT_ROOT)
    (own / "private").chmod(0o755)
    line = error_line(job)
    assert f"{own}/private" in line and "Permission denied; make it readable or move it away" in line


def test_names_with_a_dot_first_are_left_out(own, pool, built):
    """Below the folder; what it is called itself does not matter."""
    (own / ".trash").mkdir()
    (own / ".trash" / "old.md").write_text("a deleted diary")
    (own / "in" / ".ipynb_checkpoints").mkdir(parents=True)
    (own / "in" / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("an old copy")
    (own / "._abc.txt").write_bytes(b"\0\5\x16\7 of a Mac")
    (own / "._part.parquet").write_bytes(b"\0\5\x16\7 of a Mac")
    (own / ".hidden.jsonl").write_text("no JSON")
    (own / ".dead").symlink_to("/no/such/place")
    hidden = own.rename(own.with_name(".own"))
    result = read(hidden, built)
    assert sorted(result.everything) == sorted(read(own_copy(hidden), built / "again").everything)
    assert tags("".join(result.everything)) == tags(written(hidden, "0*.txt"))
    assert "diary" not in "".join(result.everything) and result.output.endswith("skipped nothing\n")


def own_copy(source: Path) -> Path:
    """The same folder without anything hidden."""
    copy = source.with_name("copy")
    copy.mkdir()
    for path in source.glob("0*.txt"):
        shutil.copy(path, copy)
    return copy


def test_a_cache_below_the_folder_is_left_out(pool, tmp_path):
    """Otherwise it would be trained on what it made the last time, more each time."""
    source = write_tagged(tmp_path / "own", pool, range(200), 8000)
    cache = source / "cache"
    results = [main("--data", source, AUTORESEARCH_CACHE=cache)]
    (source / "0000.txt").touch()  # it is built again
    results.append(main("--data", source, AUTORESEARCH_CACHE=cache))
    results.append(main("--data", source, AUTORESEARCH_CACHE=cache))
    assert len({ready(result) for result in results}) == 1
    assert ["nothing to do" in result.stdout for result in results] == [False, False, True]
    counts = {re.search("data: .*", result.stdout)[0] for result in results}
    assert len(counts) == 1 and "read 200 .txt, skipped nothing" in results[1].stdout


# == Encodings ===============================================================================================

MARKS = {
    "utf-8-sig": "utf-8-sig",
    "utf-16": "utf-16",
    "utf-16, big-endian": "utf-16-be",
    "utf-32": "utf-32",
}
LETTERS = "Füße, naïve café, Ελληνικά, 日本語, \U0001f600 "


@pytest.mark.parametrize("encoding", MARKS)
def test_a_byte_order_mark_decides(encoding, own, built):
    """Of half of the files; text comes as it was, without a mark, NUL or U+FFFD."""
    codec = MARKS[encoding]
    expected = ""
    for number, path in enumerate(sorted(own.iterdir())):
        text = LETTERS + path.read_text("utf-8")
        expected += text
        if number % 2:
            mark = codecs.BOM_UTF16_BE if codec == "utf-16-be" else b""
            path.write_bytes(mark + text.replace("\n", "\r\n").encode(codec))
        else:
            path.write_text(text, "utf-8")
    row = LETTERS + "in a row"
    (own / "rows.jsonl").write_bytes(json.dumps({"text": row}, ensure_ascii=False).encode(codec))
    if codec == "utf-16-be":
        (own / "rows.jsonl").unlink()
    result = read(own, built)
    pieces = set(result.everything)
    assert codec == "utf-16-be" or row in pieces
    everything = "".join(pieces)
    assert not set(everything) & {"\0", "\ufffd", "\ufeff", "\r"}
    assert len(everything.replace(row, "")) == len(expected) and tags(everything) == tags(expected)
    assert "note" not in result.output


def test_text_that_is_not_utf8_is_counted(own, built):
    names = sorted(path.name for path in own.iterdir())
    for name in names[3:8]:
        path = own / name
        path.write_bytes(("Füße, café. " + path.read_text("utf-8")).encode("latin-1", "ignore"))
    result = read(own, built)
    note = re.search(r"^note: (\d+) files have broken .*, such as '(.*)'; ", result.output, re.MULTILINE)
    assert note[1] == "5" and note[2] == str(own / names[3])
    assert sum("F\ufffd\ufffde, caf\ufffd. " in text for text in result.everything) == 5


# == Rows ====================================================================================================


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_blank_lines_in_jsonl_are_skipped(line_end, own, built):
    rows = [json.dumps({"text": f"row ~90.{number}~"}) for number in range(40)]
    rows[20:20] = ["", "  \t"]
    (own / "rows.jsonl").write_text(line_end.join([*rows, "", "", ""]), newline="")
    (own / "nulls.jsonl").write_text('{"text": null}\n{"text": "not null"}\n')
    result = read(own, built)
    found = set(result.everything)
    assert {f"row ~90.{number}~" for number in range(40)} | {"not null"} <= found
    assert None not in found and "" not in found


def test_a_bad_line_is_still_named(own, built):
    (own / "rows.jsonl").write_text('\n\n{"text": "fine"}\n\nno JSON\n')
    assert re.search(
        r'rows\.jsonl, line 5: .*; correct it \(\.jsonl wants \{"text": "\.\.\."\}\)', refusal(own, built)
    )


# == Long lines ==============================================================================================

C = 8 * prepare.MAX_SEQ_LEN


def cut(text: str, folder: Path) -> list[str]:
    """The pieces of a file of this text, in its order."""
    source = folder / "own"
    source.mkdir()
    (source / "a.txt").write_text(text)
    pieces = sorted(read(source, folder / "built").everything, key=text.index)
    assert "".join(pieces) == text
    return pieces


def test_one_line_of_2_megabytes_is_prepared(pool, tmp_path):
    source = tmp_path / "own"
    source.mkdir()
    text = tagged(pool, 1, 2_000_000).replace("\n", " ")
    (source / "a.txt").write_text(text, "utf-8")
    cache = tmp_path / "cache"
    ready(main("--data", source, AUTORESEARCH_CACHE=cache))
    pieces = shard_texts(cache, "train") + shard_texts(cache, "val")
    *pieces, last = sorted(pieces, key=text.index)
    assert "".join([*pieces, last]) == text
    assert all(4 * C < len(piece) < 4 * C + 100 and piece[-1] == " " for piece in pieces)


def test_many_long_lines_are_many_pieces(pool, tmp_path):
    """92 files of one line each."""
    source = tmp_path / "own"
    source.mkdir()
    texts = [tagged(pool, number, 22_000).replace("\n", " ") for number in range(92)]
    for number, text in enumerate(texts):
        (source / f"{number}.txt").write_text(text, "utf-8")
    result = read(source, tmp_path / "built")
    assert len(result.everything) == 3 * 92 and all(len(text) < 4 * C + 100 for text in result.everything)
    assert sum(map(len, result.everything)) == sum(map(len, texts))


def test_a_sample_in_each_line_ends_at_line_ends(pool, tmp_path):
    text = tagged(pool, 1, 300_000).replace("\n\n", "\n")
    *pieces, last = cut(text, tmp_path)
    assert all(2 * C < len(piece) < 2 * C + 200 and piece[-1] == "\n" for piece in pieces)


def test_text_without_spaces_is_cut_all_the_same(tmp_path):
    text = "".join(f"{number:x}," for number in range(40_000))
    *pieces, last = cut(text, tmp_path)
    assert pieces and all(len(piece) == 8 * C for piece in pieces)


# == Names ===================================================================================================


NAMES = {"250 bytes": "long" * 62 + "ab", "not UTF-8": NOT_UTF8, "not ASCII": "日本語 🦜\n; 'x'"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_folder_may_be_called_anything(name, pool, forks, tmp_path):
    """And a file in it the same. The second time it is recognised."""
    source = tmp_path / name
    write_tagged(source, pool, range(150), 8000)
    write_rows(source / f"{name[:200]}.jsonl", ["row ~900.0~"])
    write_rows(source / "rows.parquet", ["row ~901.0~"])
    (source / "rows.parquet").rename(source / f"{name[:200]}.parquet")
    env = {"AUTORESEARCH_CACHE": tmp_path / "cache"}
    strict = "import sys; sys.stdout.reconfigure(errors='strict')"  # as in most locales
    first, again = (forks.run("--data", source, env=env, first=strict) for _ in range(2))
    assert ready(first) == ready(again) and "nothing to do" in again.stdout
    assert {(900, 0), (901, 0)} <= tags(trained_text(tmp_path / "cache")) | held_out(tmp_path / "cache")
    folder = active(tmp_path / "cache").folder
    assert folder.name.isascii() and len(folder.name) < 100 and folder.parent == tmp_path / "cache"


def held_out(cache: Path) -> set[tuple[int, int]]:
    return tags("".join(shard_texts(cache, "val")))


def test_an_odd_name_is_named_in_an_error(own, forks, tmp_path):
    """It is the file that is at fault, not its name."""
    (own / f"{NOT_UTF8}.parquet").write_bytes(b"PAR1 but not really")
    job = forks.run("--data", own, env={"AUTORESEARCH_CACHE": tmp_path / "cache"})
    assert re.search(r"caf\\udce9\.parquet: unusable parquet, .*replace it", error_line(job))


def test_a_tilde_in_the_cache_is_home(tmp_path):
    module = load(AUTORESEARCH_CACHE="~/ar", HOME=tmp_path)
    assert module.CACHE == tmp_path / "ar"
    with pytest.raises(
        module.AutoresearchError, match=f"nothing is prepared for small in {tmp_path}/ar; run"
    ):
        module.Tokenizer.from_directory()


# == Memory ==================================================================================================

MEASURE = """
import re, sys
from pathlib import Path
import prepare

def peak_mib():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

imports = peak_mib()
code = prepare.main(sys.argv[1:])
print("MiB above the imports:", peak_mib() - imports)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["books in rows", "books in a parquet", "one text"])
def test_memory_stays_below_700_mib(kind, pool, tmp_path):
    """1,000 books of 400 kB, or a text of 250 MB with one character that takes four bytes in memory."""
    source = tmp_path / "own"
    source.mkdir()
    if kind == "one text":
        with open(source / "a.txt", "w", encoding="utf-8") as file:
            for number in range(250):
                file.write(tagged(pool, number, 1_000_000) + "\U0001f600" * (number == 0))
    elif kind == "books in rows":
        with open(source / "a.jsonl", "w", encoding="utf-8") as file:
            for number in range(1000):
                file.write(json.dumps({"text": tagged(pool, number, 400_000)}, ensure_ascii=False) + "\n")
    else:
        with pq.ParquetWriter(source / "a.parquet", pa.schema([("text", pa.string())])) as writer:
            for first in range(0, 1000, 100):
                books = [tagged(pool, number, 400_000) for number in range(first, first + 100)]
                writer.write_table(pa.table({"text": books}))
    size = sum(path.stat().st_size for path in source.iterdir())
    assert size > 240_000_000
    environment = os.environ | {"AUTORESEARCH_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, "--data", str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(re.search(r"MiB above the imports: (\d+)", done.stdout)[1]) < 700
    shutil.rmtree(tmp_path)

"""What is trained on and what is scored: which text goes where, and which is left out."""

import contextlib
import itertools
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.own import (
    active,
    python_library,
    read,
    ready,
    scored_text,
    shard_texts,
    tagged,
    tags,
    texts,
    trained_text,
    write_rows,
    write_tagged,
)
from helpers.script import load, main
from hypothesis import given
from hypothesis import strategies as st

import prepare


def files_of(text: str) -> set[int]:
    return {file for file, _ in tags(text)}


# == The split ===============================================================================================

FILES = 300
CHARS = 9000


@pytest.mark.parametrize(
    "kind", [".txt", *(pytest.param(it, marks=pytest.mark.slow) for it in (".md", "python"))]
)
def test_nothing_of_a_scored_file_is_trained_on(kind, pool, tmp_path):
    """A file goes one way, with all of its pieces, and no file gets lost."""
    source = tmp_path / "source"
    cache = tmp_path / "cache"
    write_tagged(source, pool, range(FILES), CHARS, ".py" if kind == "python" else kind)
    with python_library(source) if kind == "python" else contextlib.nullcontext():
        ready(main("--data", "python" if kind == "python" else source, AUTORESEARCH_CACHE=cache))

    trained = tags(trained_text(cache))
    scored = tags(scored_text(cache))
    held_out = tags("".join(shard_texts(cache, "val")))
    assert scored <= held_out and not held_out & trained
    trained_files, held_out_files = ({file for file, _ in found} for found in (trained, held_out))
    assert not held_out_files & trained_files and trained_files | held_out_files == set(range(FILES))
    assert 5 <= len(held_out_files) <= 30
    written = tags("".join(path.read_text("utf-8") for path in source.iterdir()))
    assert trained | held_out == written, "a part of some file is missing"


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_blocks_of_a_long_file_are_scored(suffix, pool, tmp_path):
    """Of about 16,000 characters each, so that few pieces have neighbours on the other side."""
    path = write_tagged(tmp_path / "own", pool, [1], 2_000_000, suffix) / f"0001{suffix}"
    if suffix == ".py":
        pieces = prepare.cut_python(path.read_text("utf-8"))
        sources = prepare.blocks(pieces, is_long=True)
        documents = list(prepare.split_sources(sources))
    else:
        result = read(tmp_path / "own", tmp_path / "built")
        documents = [("train", text) for text in result.train] + [("val", text) for text in result.val]
    whole = path.read_text("utf-8")
    in_order = sorted(documents, key=lambda document: whole.index(document[1]))
    assert "".join(text for _, text in in_order) == whole

    runs = []
    for name, text in in_order:
        if not runs or runs[-1][0] != name:
            runs.append([name, 0])
        runs[-1][1] += len(text)
    lengths = [length for name, length in runs if name == "val"]
    assert len(lengths) >= 3 and 0.01 < sum(lengths) / len(whole) < 0.13  # 0.05, to four standard errors
    assert min(length for _, length in runs[:-1]) >= 16_000


def test_rows_are_split_one_by_one(pool, tmp_path):
    """Of .jsonl and .parquet: their neighbours say nothing."""
    documents = [tagged(pool, number, 600) for number in range(600)]
    (tmp_path / "own").mkdir()
    write_rows(tmp_path / "own" / "a.jsonl", documents[:300])
    write_rows(tmp_path / "own" / "b.parquet", documents[300:])
    result = read(tmp_path / "own", tmp_path / "built")
    assert sorted(result.everything) == sorted(documents)
    for half in (documents[:300], documents[300:]):
        assert 5 <= len(set(result.val) & set(half)) <= 30


def test_a_scored_document_is_trained_on_nowhere(pool, tmp_path):
    """Whichever file its equal came from: the same licence stands at the head of many."""
    pieces = [tagged(pool, number, 2050) for number in range(900)]  # each is cut off as one piece
    numbers = iter(range(1000))
    source = write_tagged(tmp_path / "own", pool, range(1000, 1000 + FILES), CHARS)
    splits = {
        split: [(a, b) for a, b in zip(pieces[::2], pieces[1::2], strict=True) if where(a, b) == split]
        for split in ("train", "val")
    }
    shared = []
    for scored, other in splits["val"]:
        mates = [b for _, b in splits["train"] if where(scored, b) == "train"]
        (source / f"scored-{next(numbers)}.txt").write_text(scored + other)
        (source / f"trained-{next(numbers)}.txt").write_text(scored + mates[len(shared)])
        shared.append((scored, mates[len(shared)]))
    assert len(shared) >= 5
    cache = tmp_path / "cache"
    ready(main("--data", source, AUTORESEARCH_CACHE=cache))
    documents = shard_texts(cache, "train")
    trained = tags(trained_text(cache))
    held_out = tags("".join(shard_texts(cache, "val")))
    assert trained and held_out and not trained & held_out
    for scored, mate in shared:
        assert scored in documents, "the copy never came near the token files"
        assert tags(scored) <= held_out and tags(mate) <= trained


def where(*pieces: str) -> str:
    """The split of a file of these pieces."""
    return next(prepare.split_sources([list(pieces)]))[0]


@pytest.mark.slow
def test_a_growing_folder_moves_no_document(pool, tmp_path):
    source = write_tagged(tmp_path / "own", pool, range(60), 20_000)
    rows = [tagged(pool, number, 600) for number in range(1000, 1400)]
    write_rows(source / "rows.jsonl", rows[:200])
    before = read(source, tmp_path / "built")
    write_tagged(source, pool, range(60, 120), 20_000)
    write_tagged(source / "0 first", pool, range(120, 150), 100_000)
    write_rows(source / "rows.jsonl", rows)
    after = read(source, tmp_path / "built")
    assert set(before.train) < set(after.train) and set(before.val) < set(after.val)
    assert len(after.everything) > 2 * len(before.everything)
    (source / "0 first").rename(source / "z last")
    (source / "0000.txt").unlink()
    less = read(source, tmp_path / "built")
    assert set(less.train) | {text for text in after.train if 0 in files_of(text)} == set(after.train)
    assert set(less.val) | {text for text in after.val if 0 in files_of(text)} == set(after.val)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".parquet"])
def test_without_a_limit_only_duplicates_go(suffix, pool, tmp_path):
    """Of the documents that are scored; what is trained on stays as it is."""
    module = load(AUTORESEARCH_SCALE="desktop")
    assert module.TRAIN_TOKENS == 0
    source = tmp_path / "own"
    if suffix in (".txt", ".md"):
        write_tagged(source, pool, range(300), 3000, suffix)
        for path in sorted(source.iterdir())[:150]:
            shutil.copy(path, path.with_name(f"copy of {path.name}"))
        written = [path.read_text("utf-8") for path in source.iterdir()]
    else:
        source.mkdir()
        written = [tagged(pool, number, 3000) for number in range(600)]
        written += written[:300]
        write_rows(source / f"rows{suffix}", written)
    result = read(source, tmp_path / "built", module)
    found = sum(map(len, result.everything))
    size = sum(map(len, written))
    copies = Counter(written)
    duplicates = sum((count - 1) * len(text) for text, count in copies.items())
    assert size - duplicates <= found < size and len(set(result.val)) == len(result.val)
    assert tags("".join(result.everything)) == tags("".join(written))
    assert sum(map(len, result.train)) > size - duplicates, "the training data lost its copies"


def test_without_a_limit_python_is_complete(pool, tmp_path):
    """Every piece once."""
    source = write_tagged(tmp_path / "lib", pool, range(300), 6000, ".py")
    written = [path.read_text("utf-8") for path in source.iterdir()]
    for path in sorted(source.iterdir())[:150]:
        shutil.copy(path, path.with_name(f"copy_of_{path.name}"))
    module = load(AUTORESEARCH_SCALE="desktop")
    (tmp_path / "built").mkdir()
    with python_library(source):
        shards = module.python(tmp_path / "built", None)
    pieces = texts(shards["train"] + shards["val"])
    assert sum(map(len, pieces)) == sum(map(len, written)) and len(set(pieces)) == len(pieces)
    assert tags("".join(pieces)) == tags("".join(written))


# == The sample ==============================================================================================

DOCUMENTS = st.lists(st.sampled_from(["", "a", "bb", "é", "\U0001f600"]) | st.text(max_size=5), max_size=25)


@given(documents=DOCUMENTS, limit=st.integers(0, 60))
def test_a_sample_equals_sorting_by_hash(documents, limit):
    """The lowest hashes, as many as fit, whatever the order and the copies, of those that could fit alone."""
    sample = prepare.Sample(limit)
    for text in documents:
        sample.add(text)
    wanted = []
    room = limit
    short_enough = {text for text in documents if len(text.encode()) <= limit}
    for text in sorted(short_enough, key=prepare.content_hash):
        room -= len(text.encode())
        if room < 0:
            break
        wanted.append(text)
    assert sample.in_order() == wanted


def labelled(pool: list[str], files: int, documents: int) -> list[tuple[str, str]]:
    found = []
    for file in range(files):
        for part in range(documents):
            text = f"{pool[(file * documents + part) % len(pool)]}~{file}.{part}~"
            found.append(("val" if part == 0 else "train", text))
    return found


def unevenness(counts: list[int]) -> float:
    """Chi square over its degrees of freedom: about 1 for an even sample."""
    mean = np.mean(counts)
    return float(np.sum((np.array(counts) - mean) ** 2 / mean) / (len(counts) - 1))


def test_a_large_corpus_is_sampled_evenly(pool):
    documents = labelled(pool, files=50, documents=200)
    size = sum(len(text.encode()) for name, text in documents if name == "train")
    taken = [text for name, text in prepare.sample(documents, size / 5) if name == "train"]
    assert 0.19 < sum(len(text.encode()) for text in taken) / size <= 0.2
    counts = Counter(file for file, _ in tags("".join(taken)))
    assert len(counts) == 50 and 0.4 < unevenness(list(counts.values())) < 1.7
    shuffled = random.Random(0).sample(documents, len(documents))
    assert [text for name, text in prepare.sample(shuffled, size / 5) if name == "train"] == taken


def test_the_limit_changes_nothing_that_is_scored(pool):
    documents = labelled(pool, files=100, documents=20)
    scored = []
    trained = []
    for limit in (20_000, 200_000, float("inf"), None):
        result = list(prepare.sample(documents, limit))
        scored.append([text for name, text in result if name == "val"])
        trained.append({text for name, text in result if name == "train"})
    assert scored[0] == scored[1] == scored[2] == scored[3] and len(scored[0]) == 100
    assert trained[0] < trained[1] < trained[2] == trained[3], "the limit says nothing"


def test_tokens_stop_at_the_limit(cache, tmp_path):
    """After a whole document: what fits is the beginning of what there would be without a limit."""
    prepared = active(cache)
    tokenizer = prepare.Tokenizer.from_directory(prepared.folder)
    shards = sorted(prepared.folder.glob("shards*/train_*.parquet"))
    prepare.tokenize(shards, tmp_path / "all", tokenizer, prepare.progress_bar(), prepare.MAX_SEQ_LEN, set())
    whole = np.fromfile(tmp_path / "all", "<u2")
    starts = np.flatnonzero(whole == tokenizer.get_bos_token_id())
    module = load()
    for limit in (1, 1000, 12_345, int(starts[50]), len(whole) - 1, len(whole)):
        target = tmp_path / str(limit)
        module.TRAIN_TOKENS = limit
        module.tokenize(shards, target, tokenizer, module.progress_bar(), module.MAX_SEQ_LEN, set())
        tokens = np.fromfile(target, "<u2")
        assert limit - prepare.MAX_SEQ_LEN <= len(tokens) <= limit
        assert (tokens == whole[: len(tokens)]).all() and len(tokens) in {*starts.tolist(), len(whole)}


def tokenized(shards: dict[str, list[str]], folder: Path, scale: str, tokenizer: prepare.Tokenizer):
    """The training documents, as token ids, of shards {name: texts} and a validation shard."""
    module = load(AUTORESEARCH_SCALE=scale)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, documents in {"val.parquet": ["to be scored"], **shards}.items():
        paths.append(folder / name)
        pq.write_table(pa.table({"text": documents}), paths[-1])
    hashes = {path: module.file_hash(path) for path in paths}
    shard_paths = {"train": paths[1:], "val": paths[:1]}
    _, train_paths = module.tokenize_shards(folder / "tokens", shard_paths, hashes, tokenizer, "")
    return [ids.tolist() for ids, _ in module.documents(train_paths, tokenizer.bos, epochs=[1])]


@pytest.mark.parametrize("scale", ["small", "desktop"])
@pytest.mark.parametrize("folder", [prepare.DOWNLOADS, prepare.SHARDS])
def test_long_documents_are_cut_into_rows(cache, tmp_path, scale, folder):
    """So that packing does not crop them; published shards stay as they are, for results to compare."""
    tokenizer = prepare.Tokenizer.from_directory(active(cache).folder)
    originals = ["a b c " * 5000, "short", "d e f " * 900]
    documents = tokenized({"train.parquet": originals}, tmp_path / folder, scale, tokenizer)
    ids = [number for document in documents for number in document[1:]]
    wanted = list(itertools.chain(*tokenizer.encode(originals)))
    assert sorted(ids) == sorted(wanted)
    if scale == "small" or folder == prepare.DOWNLOADS:
        assert ids == wanted
    if scale != "small" and folder == prepare.DOWNLOADS:
        assert len(documents) == len(originals)
    else:
        length = {"small": 256, "desktop": 2048}[scale]
        assert max(map(len, documents)) == length + 1 and len(documents) > 6


@pytest.mark.parametrize("scale", ["small", "desktop"])
@pytest.mark.parametrize("folder", [prepare.DOWNLOADS, prepare.SHARDS])
def test_a_folder_is_shuffled_where_it_is_read_as_a_whole(cache, tmp_path, scale, folder):
    """Where it is sampled its order is random already; published shards keep theirs."""
    tokenizer = prepare.Tokenizer.from_directory(active(cache).folder)
    shards = {f"{shard}.parquet": [f"{shard}-{i}" for i in range(100)] for shard in "abc"}
    documents = tokenized(shards, tmp_path / folder, scale, tokenizer)
    found = [tokenizer.decode(document[1:]) for document in documents]
    in_order = list(itertools.chain(*shards.values()))
    assert sorted(found) == sorted(in_order)
    again = tokenized(shards, tmp_path / "again" / folder, scale, tokenizer)
    assert again == documents
    if scale == "small" or folder == prepare.DOWNLOADS:
        assert found == in_order
    else:
        first_third = Counter(text[0] for text in found[:100])
        assert min(first_third.values()) > 20 and found[:100] != sorted(found[:100])
        tokens = tmp_path / folder / "tokens"
        (lost,) = tokens.glob("shuffled_00001-*.bin")
        lost.unlink()
        assert tokenized(shards, tmp_path / folder, scale, tokenizer) == documents
        for path in tokens.glob("[abc]-*.bin"):
            path.unlink()
        assert tokenized(shards, tmp_path / folder, scale, tokenizer) == documents
        assert not list(tokens.glob("[abc]-*.bin")), "they were not needed"


@pytest.mark.parametrize("scale", ["small", "desktop"])
@pytest.mark.parametrize("folder", [prepare.DOWNLOADS, prepare.SHARDS])
def test_a_corpus_without_anything_to_train_on_is_refused(cache, tmp_path, scale, folder):
    """Each time."""
    tokenizer = prepare.Tokenizer.from_directory(active(cache).folder)
    for _ in range(2):
        with pytest.raises(Exception, match="every training document is a validation document") as error:
            tokenized({"a.parquet": ["to be scored"]}, tmp_path / folder, scale, tokenizer)
        assert error.type.__name__ == "AutoresearchError"


@pytest.mark.slow
def test_200_megabytes_become_eight_million_tokens(pool, tmp_path):
    """Of every file about as many; what is scored is what would be scored without a limit."""
    source = write_tagged(tmp_path / "own", pool, range(200), 1_000_000)
    cache = tmp_path / "cache"
    result = main("--data", source, AUTORESEARCH_CACHE=cache)
    ready(result)
    tokens = active(cache).train_tokens
    assert 2**23 - prepare.MAX_SEQ_LEN <= tokens <= 2**23
    assert f"{tokens:,} training tokens" in result.stdout
    counts = Counter(file for file, _ in tags(trained_text(cache)))
    assert len(counts) == 200 and unevenness(list(counts.values())) < 8  # a piece has about five paragraphs
    scored = set()
    for path in source.iterdir():
        scored |= {text for name, text in prepare.split_sources(prepare.own_sources(path)) if name == "val"}
    assert set(shard_texts(cache, "val")) == scored and len(scored) > 1000


# == Pieces ==================================================================================================

C = 8 * prepare.MAX_SEQ_LEN
LENGTHS = st.sampled_from([1, 3, C - 2, C - 1, C, C + 1, 2 * C - 1, 2 * C, 4 * C, 8 * C]) | st.integers(1, C)
GAPS = st.sampled_from([" ", "\n", "\n\n", "\n \t\n", "\n\n\n", "\t", " \n", "\u00a0"])
WORDS = st.builds(lambda length, gap: "x" * length + gap, LENGTHS, GAPS)


def plain_piece_end(text: str, start: int) -> int:
    """The rule, character by character."""
    for place in range(start + C, start + 2 * C):
        if text[place : place + 1] == "\n":
            end = place + 1
            while text[end : end + 1] in (" ", "\t"):
                end += 1
            if text[end : end + 1] == "\n" and end < start + 2 * C:
                return end + 1
    for place in range(start + 2 * C, start + 4 * C):
        if text[place : place + 1] == "\n":
            return place + 1
    for place in range(start + 4 * C, start + 8 * C):
        if text[place : place + 1].isspace():
            return place + 1
    return min(start + 8 * C, len(text))


def plain_pieces(text: str) -> list[str]:
    pieces = []
    start = 0
    while start < len(text):
        end = plain_piece_end(text, start)
        pieces.append(text[start:end])
        start = end
    return [piece for piece in pieces if piece.strip()]


@given(words=st.lists(WORDS, max_size=40))
def test_a_piece_ends_by_the_rule(words):
    text = "".join(words)
    assert prepare.piece_end(text) == plain_piece_end(text, 0)


def test_a_text_is_cut_the_same_in_any_buffer(pool, tmp_path):
    """The file is read in parts."""
    rng = random.Random(0)
    parts = []
    for paragraph in itertools.islice(itertools.cycle(pool), 900):
        gap = rng.choice([" ", "\n", "\n\n", "\n \n"])
        parts.append("x" * rng.randrange(1, 3 * C) + gap + paragraph)
    text = "".join(parts) + " " * 9 * C + "x" * 20 * C
    assert len(text) > 3 * 2**20
    path = tmp_path / "a.txt"
    path.write_text(text, "utf-8", newline="")
    with open(path, encoding="utf-8") as file:
        assert list(prepare.cut_text(file)) == plain_pieces(text)

"""The fixed ground of autoresearch: corpus, tokenizer, dataloader, clock and metric. Nobody edits this file.

    uv run prepare.py [--data climbmix|tinystories|python|DIR] [--num-shards N] [--download-workers N]

turns a corpus into what train.py reads, under ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it), in one folder for each
corpus and scale. Every file is complete under its final name, so any step can be interrupted and is continued by running
the same command again. The file reads in the order in which the data flows.

B rows of a batch, T tokens of a row, V vocabulary size.
"""

import argparse
import base64
import contextlib
import faulthandler
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import sys
import sysconfig
import threading
import time
import traceback
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# == 1. Constants ==============================================================================================

# Five minutes on an H100 and on a laptop are different problems: the constants come in two sets.
SCALES = {
    "full": {"MAX_SEQ_LEN": 2048, "VOCAB_SIZE": 8192, "EVAL_TOKENS": 40 * 524_288, "corpus": "climbmix"},
    "small": {"MAX_SEQ_LEN": 256, "VOCAB_SIZE": 2048, "EVAL_TOKENS": 2**18, "corpus": "tinystories"},
}
SCALE = os.environ.get("AUTORESEARCH_SCALE") or ("full" if torch.cuda.is_available() else "small")
if SCALE not in SCALES:
    sys.exit(f"error: AUTORESEARCH_SCALE is {SCALE!r}, not full or small; unset it or choose one of them")
MAX_SEQ_LEN = SCALES[SCALE]["MAX_SEQ_LEN"]  # tokens of a row
VOCAB_SIZE = SCALES[SCALE]["VOCAB_SIZE"]
EVAL_TOKENS = SCALES[SCALE]["EVAL_TOKENS"]  # validation tokens behind every val_bpb
TIME_BUDGET = 300  # seconds of training
GRACE = 300  # seconds for start-up and evaluation together, then the watchdog ends the run

CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")
FORMAT = 1  # of the prepared folder; another number means: prepare again

CLIMBMIX = "datasets/karpathy/climbmix-400b-shuffle/resolve/main"
CLIMBMIX_SHARDS = 6542  # for training; the shard behind them is pinned as validation
TINYSTORIES = "datasets/karpathy/tinystories-gpt4-clean/resolve/main/tinystories_gpt4_clean.parquet"
DOWNLOAD_ATTEMPTS = 5
DOWNLOAD_TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
SHARD_CHARS = 2**24  # characters of a shard that is built here
VALIDATION_FRACTION = 0.05  # of the distinct documents of a corpus without a split of its own

SPLIT_PATTERN = (  # GPT-4's, with numbers cut after two digits instead of three: the vocabulary is small
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")
TOKENIZER_CHARS, TOKENIZER_DOCUMENT_CHARS = 10**9, 10_000  # what the merges are learned from
DOCUMENT_CHARS = 100_000  # longer texts are cut first: tiktoken 0.14 panics on 1,000,000 spaces

PACKING_DOCUMENTS, PACKING_REFILL = 1000, 128  # held to choose from; appended at once when fewer are held
MIN_VALIDATION_ROWS = 64
LOGITS_BYTES = 2**31  # of float32 logits that the metric asks for at once

PROBES = 256  # (row, cut) pairs; a leak behind a rare token needs that many
TOLERANCE, NOISE_LIMIT = 0.005, 0.02  # nats: what the future may move; what two identical calls may differ by


def constants() -> dict:
    """The constants that a score depends on, as they are now."""
    names = "SCALE MAX_SEQ_LEN VOCAB_SIZE EVAL_TOKENS TIME_BUDGET GRACE PROBES TOLERANCE NOISE_LIMIT".split()
    return {name: globals()[name] for name in names}


_CONSTANTS = constants()


class AutoresearchError(Exception):
    """Something that a user can mend; its one line says what was found, what was expected and what to do."""


class PrepareError(AutoresearchError):
    """The data is not there, or not what it should be."""


class TrainError(AutoresearchError):
    """Training cannot go on."""


class MetricError(AutoresearchError):
    """The run has no valid score."""


# == 2. Files, threads, devices ================================================================================


@contextlib.contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it appears under `path`, replacing an older one, only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One prepare.py at a time in a folder; the lock ends with the process, also with a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"{folder}: another prepare.py is at work here; wait until it has ended") from None
        yield


def remove_temporaries(folder: Path) -> None:
    """What a killed prepare.py left behind."""
    for path in list(folder.rglob("*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Progress(tqdm):
    """A progress bar on a terminal, nothing elsewhere; `update` in a worker thread raises once work was called off."""

    called_off = False

    def __init__(self, **options):
        super().__init__(disable=None, leave=False, unit_scale=True, mininterval=0.5, **options)

    def update(self, n=1):
        if self.called_off:
            raise PrepareError("called off")
        return super().update(n)


def in_threads(work: Callable, items: Iterable, workers: int, progress: Progress) -> None:
    """work(item) for every item; the first error, or Ctrl-C, calls the rest off and is raised."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            progress.called_off = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def short_hash(*parts: object) -> str:
    """Eight hex digits over anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def default_device() -> torch.device:
    """CUDA, else Apple MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return f"{found[1]}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# == 3. Corpora: everything becomes parquet shards with one column, text ========================================

# A corpus leaves its shards as {"train": [paths], "val": [paths]}.
Shards = dict[str, list[Path]]


def climbmix(folder: Path, num_shards: int | None, workers: int) -> Shards:
    """Published shards, as they are; the validation shard comes first, so that a run never lacks it."""
    names = [f"shard_{i:05d}.parquet" for i in (CLIMBMIX_SHARDS, *range(num_shards or 10))]
    paths = [folder / "shards" / name for name in names]
    with Progress(desc="download", unit="B") as progress:
        for group in (paths[:1], paths[1:]):
            missing = [path for path in group if not path.exists()]
            in_threads(lambda p: download(f"{CLIMBMIX}/{p.name}", p, progress), missing, workers, progress)
    return {"train": paths[1:], "val": paths[:1]}


def tinystories(folder: Path, num_shards: None, workers: int) -> Shards:
    """One published file with a suggested split: rows up to 9,999 are test data, up to 19,999 validation."""

    def split(path: Path) -> Iterator[tuple[str, str]]:
        for i, text in enumerate(texts(path)):
            if i >= 10_000:
                yield ("val" if i < 20_000 else "train"), text

    shards, source = folder / "shards", folder / "tinystories.parquet"
    if not shards.exists():
        if not source.exists():
            with Progress(desc="download", unit="B") as progress:
                download(TINYSTORIES, source, progress)
        write_shards(shards, split(source))
    source.unlink(missing_ok=True)
    return built_shards(shards)


def python(folder: Path, num_shards: None, workers: int) -> Shards:
    """The Python sources on this machine, cut at top-level definitions; frozen at the first build."""
    shards = folder / "shards"
    if not shards.exists():
        roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
        # installed packages of another environment can lie below the standard library
        paths = [p for root in roots for p in root.rglob("*.py") if "-packages" not in str(p.relative_to(root))]
        pieces = {}
        for path in Progress(iterable=paths, desc="read", unit=" files"):
            with contextlib.suppress(UnicodeDecodeError, FileNotFoundError):
                for piece in cut(path.read_text("utf-8"), r"(?<=\n\n)(?=@|class |def |async def )", 800):
                    pieces[content_hash(piece)] = piece
        documents = [pieces[key] for key in sorted(pieces)]
        write_shards(shards, split_by_hash(lambda: documents))
    return built_shards(shards)


def own_data(source: Path, folder: Path, num_shards: None, workers: int) -> Shards:
    """A folder of .parquet and .jsonl (field text), .txt and .md; built again when a file in it has changed."""
    shards = folder / f"shards-{source_state(source)}"
    if not shards.exists():
        write_shards(shards, split_by_hash(lambda: documents_of(source)))
        for old in folder.glob("shards-*"):
            if old != shards:
                shutil.rmtree(old)
    return built_shards(shards)


def own_files(source: Path) -> list[Path]:
    return sorted(p for p in source.rglob("*") if p.suffix in (".parquet", ".jsonl", ".txt", ".md") and p.is_file())


def source_state(source: Path) -> str:
    """Changes when a file of the folder does."""
    stats = [(str(path.relative_to(source)), path.stat()) for path in own_files(source)]
    return short_hash([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def documents_of(source: Path) -> Iterator[str]:
    """Every document below a folder, files in the order of their names."""
    for path in own_files(source):
        if path.suffix == ".parquet":
            yield from texts(path)
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    try:
                        # JSON can spell lone surrogates, UTF-8 cannot
                        yield json.loads(line)["text"].encode("utf-8", "replace").decode()
                    except (ValueError, KeyError, TypeError, AttributeError):
                        raise PrepareError(
                            f'{path}: line {number} is not a JSON object with a string "text"; mend or remove it'
                        ) from None
        else:
            yield from cut(path.read_text("utf-8", errors="replace"), r"(?<=\n)\s*\n", 2000)


def cut(text: str, boundary: str, chars: int) -> Iterator[str]:
    """Pieces of about `chars` characters or more that end at a boundary; none is blank."""
    start = 0
    for match in re.finditer(boundary, text):
        if match.end() - start >= chars:
            yield text[start : match.end()]
            start = match.end()
    if text[start:].strip():
        yield text[start:]


def content_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def split_by_hash(documents: Callable[[], Iterable[str]]) -> Iterator[tuple[str, str]]:
    """(split, text): of the distinct documents, the 5 % with the lowest content hash are validation, once each.

    A document and its copies fall on the same side, and one added document moves no other.
    """
    hashes = np.unique(np.fromiter((int.from_bytes(content_hash(text), "big") for text in documents()), np.uint64))
    if len(hashes) == 0:
        raise PrepareError("the corpus has no documents; it needs some text in .parquet, .jsonl, .txt or .md files")
    first_train = int(hashes[math.ceil(len(hashes) * VALIDATION_FRACTION)]) if len(hashes) > 1 else 0
    seen = set()
    for text in documents():
        key = int.from_bytes(content_hash(text), "big")
        if key >= first_train:
            yield "train", text
        elif key not in seen:
            seen.add(key)
            yield "val", text


def write_shards(folder: Path, documents: Iterable[tuple[str, str]]) -> None:
    """Parquet files of about SHARD_CHARS characters; the folder appears when all of them are complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    waiting: dict[str, list[str]] = {"train": [], "val": []}
    chars, shards = dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0)

    def write(split: str) -> None:
        table = pa.table({"text": waiting[split]})
        pq.write_table(table, temporary / f"{split}_{shards[split]:05d}.parquet", row_group_size=4096)
        waiting[split], chars[split] = [], 0
        shards[split] += 1

    for split, text in Progress(iterable=documents, desc="shards", unit=" documents"):
        waiting[split].append(text)
        chars[split] += len(text)
        if chars[split] >= SHARD_CHARS:
            write(split)
    for split in waiting:
        if waiting[split]:
            write(split)
    os.replace(temporary, folder)


def built_shards(folder: Path) -> Shards:
    return {split: sorted(folder.glob(f"{split}_*.parquet")) for split in ("train", "val")}


def texts(path: Path) -> Iterator[str]:
    """The documents of a parquet file; nulls and empty ones are left out, broken UTF-8 is replaced."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise PrepareError(f"{path}: no column 'text', only {file.schema_arrow.names}; rename the column")
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            for raw in batch.column(0).cast(pa.large_binary()).to_pylist():
                if raw:
                    yield raw.decode("utf-8", "replace")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise PrepareError(f"{path}: not a readable parquet file ({reason}); delete it, run prepare.py again") from None


# == 4. Downloads ==============================================================================================


@functools.cache
def session():
    """A pool of connections that repeats what may succeed later (no connection, 429, 5xx), and waits as it is told."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    retry = Retry(
        total=DOWNLOAD_ATTEMPTS - 1,
        backoff_factor=0.5,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
        retry_after_max=60,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=64))
    return session


def download(name: str, path: Path, progress: Progress) -> None:
    """Fetch a parquet file from HF_ENDPOINT: length and footer are checked before it appears under `path`.

    A connection that breaks in mid-file is resumed where it broke, if the server says that the file is still the same.
    """
    import requests

    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{name}"
    with published(path) as file:
        etag, cause = None, ""
        for attempt in range(DOWNLOAD_ATTEMPTS):
            time.sleep(0.5 * (2**attempt - 1))
            done = file.tell()
            resume = {"Range": f"bytes={done}-", "If-Range": etag} if done and etag else {}
            try:
                headers = {"Accept-Encoding": "identity", **resume}
                with session().get(url, stream=True, timeout=DOWNLOAD_TIMEOUT, headers=headers) as response:
                    if not response.ok:
                        cause = f"the server answered {response.status_code} {response.reason}"
                        break
                    if response.status_code != 206:
                        file.seek(0)
                        file.truncate()
                        done = 0
                    etag = response.headers.get("ETag")
                    announced = int(response.headers.get("Content-Length", 0))
                    progress.total = (progress.total or 0) + announced
                    for block in response.iter_content(2**20):
                        file.write(block)
                        progress.update(len(block))
                if not announced or file.tell() == done + announced:
                    file.flush()
                    cause = parquet_defect(Path(file.name))
                    break
                cause = f"got {file.tell():,} of {done + announced:,} bytes"
            except requests.RequestException as error:
                cause = re.sub(r"^.*?: ", "", str(error)) if file.tell() == done else f"cut off at {file.tell():,} bytes"
        if cause:
            raise PrepareError(f"{path.name}: {cause} ({url}); check network and HF_ENDPOINT, run prepare.py again")


def parquet_defect(path: Path) -> str:
    """What is wrong with a downloaded file, or nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        return f"not a parquet file: {str(error).splitlines()[0]}"
    return "" if "text" in names else f"no column 'text', only {names}"


# == 5. Tokenizer ==============================================================================================


class Tokenizer:
    """Byte-pair encoding: bytes and merges first, then SPECIAL_TOKENS. Learned by rustbpe, used through tiktoken."""

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        if len(ranks) != VOCAB_SIZE - len(SPECIAL_TOKENS):
            raise PrepareError(
                f"the tokenizer has {len(ranks) + len(SPECIAL_TOKENS):,} tokens, not {VOCAB_SIZE:,}: "
                "the corpus is too small or too uniform; bring more text"
            )
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        # from the raw bytes: a lone byte >= 0x80 decodes to U+FFFD, which is three
        lengths = {rank: len(token) for token, rank in ranks.items()}
        self.token_bytes = torch.tensor([lengths.get(i, 0) for i in range(VOCAB_SIZE)])

    @classmethod
    def train(cls, documents: Iterable[str]) -> "Tokenizer":
        import rustbpe

        learner = rustbpe.Tokenizer()
        learner.train_from_iterator(documents, VOCAB_SIZE - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls({bytes(token): rank for token, rank in learner.get_mergeable_ranks()})

    @classmethod
    def from_directory(cls, directory: Path | None = None) -> "Tokenizer":
        """The tokenizer of a prepared folder; of the active one if none is given."""
        return cls.load((Prepared.read(Path(directory)) if directory else Prepared.active()).tokenizer)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a text file of lines `base64(token) rank`, tiktoken's own format."""
        try:
            lines = [line.split() for line in path.read_bytes().splitlines()]
            return cls({base64.b64decode(token, validate=True): int(rank) for token, rank in lines})
        except ValueError:
            raise PrepareError(f"{path}: not a tokenizer; delete it and run prepare.py again") from None

    def save(self, path: Path) -> None:
        with published(path) as file:
            for rank in range(len(self.token_bytes) - len(SPECIAL_TOKENS)):
                file.write(b"%s %d\n" % (base64.b64encode(self.encoding.decode_single_token_bytes(rank)), rank))

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Token ids of a text, or a list of them for a list; `prepend` is an id or a special token's name.

        Names of special tokens in the text are plain text.
        """
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        first = [] if prepend is None else [self.special_tokens.get(prepend, prepend)]
        return first + [int(token) for ids in self.encode_pieces(text) for token in ids]

    def encode_pieces(self, text: str) -> list[np.ndarray]:
        """Token ids (uint32) of each DOCUMENT_CHARS characters."""
        starts = range(0, len(text), DOCUMENT_CHARS)
        pieces = (text[start : start + DOCUMENT_CHARS] for start in starts)
        return [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def get_bos_token_id(self) -> int:
        return self.special_tokens[SPECIAL_TOKENS[0]]


def training_text(paths: list[Path], progress: Progress) -> Iterator[str]:
    """The documents that the merges are learned from: TOKENIZER_CHARS characters, of each document the beginning."""
    chars = 0
    for text in itertools.chain.from_iterable(map(texts, paths)):
        yield text[: min(TOKENIZER_DOCUMENT_CHARS, TOKENIZER_CHARS - chars)]
        chars += min(len(text), TOKENIZER_DOCUMENT_CHARS)
        progress.update(min(len(text), TOKENIZER_DOCUMENT_CHARS))
        if chars >= TOKENIZER_CHARS:
            return


# == 6. Token cache: flat uint16 files; a document is BOS and its tokens =========================================


def tokenize(shard: Path, target: Path, tokenizer: Tokenizer, progress: Progress) -> None:
    """Write every document of a shard; at the small scale in documents of at most one row, T+1 tokens with BOS."""
    bos = np.array([tokenizer.get_bos_token_id()], np.uint32)
    limit = MAX_SEQ_LEN if SCALE == "small" else DOCUMENT_CHARS  # a token is at least a byte: nothing is cut
    with published(target) as file:
        for batch in batched(texts(shard), 1024):
            parts = []
            for text in batch:
                for ids in tokenizer.encode_pieces(text):
                    for start in range(0, len(ids), limit):
                        parts += (bos, ids[start : start + limit])
            file.write(np.concatenate(parts).astype("<u2").tobytes())
            progress.update(len(batch))


def batched(items: Iterable, n: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, n)):
        yield batch


def documents(paths: list[Path], bos: int, epochs: Iterable[int]) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, epoch) of every document, uint16, in corpus order; each is a view of the memory-mapped file.

    BOS stands at the start of each document and nowhere else, so the offsets need no file of their own.
    """
    shards = [np.asarray(np.memmap(path, np.dtype("<u2"), "r")) for path in paths]
    for epoch in epochs:
        for tokens in shards:
            starts = np.flatnonzero(tokens == bos).tolist()
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                yield tokens[start:end], epoch


# == 7. Packing and the dataloader =============================================================================


class Packer:
    """Fills rows of `capacity` tokens with documents, best fit first, without padding.

    Before every choice, while fewer than 1000 documents are held, the next 128 in corpus order are appended. The longest
    that fits is taken, the earliest among equals; when none fits, the shortest (again the earliest) fills the row and its
    rest is dropped. A choice costs O(1): one FIFO for each length, and one integer as the set of lengths that are held;
    documents longer than a row stand in a list sorted by (length, arrival).
    """

    def __init__(self, documents: Iterator[tuple[np.ndarray, int]], capacity: int):
        self.documents, self.capacity, self.epoch = documents, capacity, 0
        self.fifos: list[deque] = [deque() for _ in range(capacity + 1)]
        self.lengths = 0  # bit n is set if fifos[n] is not empty
        self.up_to = [(2 << room) - 1 for room in range(capacity + 1)]  # the lengths that fit into `room`
        self.long: list[tuple] = []
        self.held = self.arrived = 0

    def refill(self) -> None:
        while self.held < PACKING_DOCUMENTS:
            before = self.held
            for document, self.epoch in itertools.islice(self.documents, PACKING_REFILL):  # noqa: B020
                n = len(document)
                if n <= self.capacity:
                    self.fifos[n].append(document)
                    self.lengths |= 1 << n
                else:
                    insort(self.long, (n, self.arrived, document))
                    self.arrived += 1
                self.held += 1
            if self.held == before:
                return

    def take(self, n: int) -> np.ndarray:
        """The earliest document of `n` tokens."""
        fifo = self.fifos[n]
        document = fifo.popleft()
        if not fifo:
            self.lengths ^= 1 << n
        return document

    def fill(self, row: np.ndarray) -> bool:
        """Fill a row of `capacity` integers; False if the documents ran out."""
        start, capacity = 0, self.capacity
        while start < capacity:
            if self.held < PACKING_DOCUMENTS:
                self.refill()
            if not self.held:
                return False
            self.held -= 1
            if fitting := self.lengths & self.up_to[capacity - start]:
                document = self.take(fitting.bit_length() - 1)
            elif self.lengths:
                document = self.take((self.lengths & -self.lengths).bit_length() - 1)
            else:
                document = self.long.pop(0)[2]
            end = min(start + len(document), capacity)
            row[start:end] = document[: end - start]
            start = end
        return True


def make_dataloader(
    tokenizer: Tokenizer, B: int, T: int, split: str = "train", device: torch.device | str | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Endless batches (inputs, targets, epoch): int64 of shape (B, T) on the device, each row packed from T+1 tokens.

    Raises TrainError when drawn from inside an Experiment before its clock has started, PrepareError for any split but
    train: the validation rows belong to the metric.
    """
    if split != "train":
        raise PrepareError(f"make_dataloader serves split 'train', not {split!r}; evaluate_bpb scores the validation rows")
    device = torch.device(device or default_device())
    stream = documents(Prepared.active().tokens, tokenizer.get_bos_token_id(), itertools.count(1))
    return _batches(Packer(stream, T + 1), B, T, device)


def _batches(packer: Packer, B: int, T: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    cuda = device.type == "cuda"
    rows = np.empty((B, T + 1), np.uint16)
    # A pinned slot may be refilled only after its copy has run, and that can be queued behind a whole backward pass.
    slots = [(torch.empty(2, B, T, dtype=torch.int64, pin_memory=True), torch.cuda.Event()) for _ in range(3 * cuda)]
    for i in itertools.count():
        if _experiment and not _experiment.clock_started:
            raise TrainError("training data was drawn before the clock; warm up on random tokens, then use run.steps()")
        for row in rows:
            packer.fill(row)
        slot, copied = slots[i % len(slots)] if cuda else (torch.empty(2, B, T, dtype=torch.int64), None)
        if cuda:
            copied.synchronize()
        slot.numpy()[:] = rows[:, :-1], rows[:, 1:]
        inputs, targets = slot.to(device, non_blocking=cuda)
        if cuda:
            copied.record()
        yield inputs, targets, packer.epoch


def validation_rows(paths: list[Path], bos: int) -> np.ndarray:
    """uint16 (rows, T+1): EVAL_TOKENS worth of rows, or as many as the split fills once."""
    packer = Packer(documents(paths, bos, [1]), MAX_SEQ_LEN + 1)
    rows = np.empty((EVAL_TOKENS // MAX_SEQ_LEN, MAX_SEQ_LEN + 1), "<u2")
    count = next((i for i, row in enumerate(rows) if not packer.fill(row)), len(rows))
    if count < MIN_VALIDATION_ROWS:
        raise PrepareError(
            f"the validation split fills {count} rows of {MAX_SEQ_LEN} tokens, at least {MIN_VALIDATION_ROWS} are needed; "
            "bring more text"
        )
    return rows[:count]


# == 8. The prepared folder ====================================================================================


@dataclass(frozen=True)
class Prepared:
    """A prepared folder and its manifest, which holds length and sha256 of every file."""

    folder: Path
    manifest: dict

    @classmethod
    def read(cls, folder: Path) -> "Prepared":
        path = folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text())
            found = {key: manifest[key] for key in ("format", "scale")}
        except FileNotFoundError:
            raise PrepareError(f"{folder}: not prepared; run prepare.py") from None
        except (ValueError, KeyError, TypeError):
            raise PrepareError(f"{path}: damaged; run prepare.py again") from None
        if found != {"format": FORMAT, "scale": scale_constants()}:
            raise PrepareError(
                f"{path}: format {found['format']} and {found['scale']}, not format {FORMAT} and {scale_constants()}; "
                "run prepare.py again"
            )
        return cls(folder, manifest)

    @classmethod
    @functools.cache
    def active(cls) -> "Prepared":
        """The folder that was prepared last for this scale; read once in a process."""
        try:
            return cls.read(CACHE / (CACHE / f"active-{SCALE}").read_text())
        except FileNotFoundError:
            raise PrepareError(f"no corpus is prepared for scale {SCALE} in {CACHE}; run: uv run prepare.py") from None

    @property
    def tokenizer(self) -> Path:
        return self.folder / self.manifest["tokenizer"]["path"]

    @property
    def tokens(self) -> list[Path]:
        """The token files of the training split."""
        return [self.folder / entry["path"] for entry in self.manifest["tokens"]]

    def rows(self) -> np.ndarray:
        """The validation rows, uint16 (rows, T+1)."""
        return np.fromfile(self.folder / self.manifest["validation"]["path"], "<u2").reshape(-1, MAX_SEQ_LEN + 1)

    def verify(self) -> None:
        """Raise PrepareError if a file that a score depends on is not what prepare.py wrote."""
        for entry in (self.manifest["tokenizer"], self.manifest["validation"], *self.manifest["tokens"]):
            path = self.folder / entry["path"]
            found = sha256(path) if path.exists() else "missing"
            if found != entry["sha256"]:
                raise PrepareError(
                    f"{path}: altered, sha256 is {found[:12]}, not {entry['sha256'][:12]}; "
                    "delete it and run prepare.py again"
                )

    def is_current(self, request: dict) -> bool:
        """Whether this is what `request` asks for, with every file in place."""
        manifest = self.manifest
        files = [*manifest["shards"], manifest["tokenizer"], *manifest["tokens"], manifest["validation"]]
        sizes = {self.folder / entry["path"]: entry["bytes"] for entry in files}
        return manifest["request"] == request and all(
            path.exists() and path.stat().st_size == size for path, size in sizes.items()
        )

    def fingerprint(self, device: torch.device) -> str:
        """Two scores may be compared only if this is equal."""
        return short_hash(
            sha256(Path(__file__)),
            constants(),
            self.manifest["validation"]["sha256"],
            self.manifest["tokenizer"]["sha256"],
            torch.__version__,
            device_name(device),
        )


def scale_constants() -> dict:
    return {"SCALE": SCALE, "MAX_SEQ_LEN": MAX_SEQ_LEN, "VOCAB_SIZE": VOCAB_SIZE, "EVAL_TOKENS": EVAL_TOKENS}


def prepare(data: str, num_shards: int | None, workers: int) -> None:
    """Bring a corpus into the cache, as far as it is not there yet, and make it the active one.

    Raises PrepareError, or OSError where the disk does not play along; what is complete stays, a rerun continues.
    """
    if data != "climbmix" and num_shards is not None:
        raise PrepareError(f"--num-shards is for climbmix, which comes in shards; leave it out with --data {data}")
    if data == "climbmix" and not 1 <= (num_shards := 10 if num_shards is None else num_shards) <= CLIMBMIX_SHARDS:
        raise PrepareError(f"--num-shards is {num_shards}, not 1 to {CLIMBMIX_SHARDS}; 10 is the default")
    if workers < 1:
        raise PrepareError(f"--download-workers is {workers}, not 1 or more; 8 is the default")
    source = Path(data).resolve()
    request = {"corpus": data, "num_shards": num_shards}
    if data in (builders := {"climbmix": climbmix, "tinystories": tinystories, "python": python}):
        name, build = data, builders[data]
    elif source.is_dir():
        name, build = f"{source.name}-{short_hash(str(source))}", functools.partial(own_data, source)
        request = {"corpus": str(source), "state": source_state(source)}
    else:
        raise PrepareError(f"--data {data}: not {', '.join(builders)}, and no such folder; choose one of them")

    folder = CACHE / f"{name}-{SCALE}"
    with locked(folder):
        remove_temporaries(folder)
        try:
            current = Prepared.read(folder).is_current(request)
        except (PrepareError, KeyError, TypeError):
            current = False
        if not current:
            build_folder(folder, request, build(folder, num_shards, workers))
        with published(folder / "active") as file:
            file.write(folder.name.encode())
        os.replace(folder / "active", CACHE / f"active-{SCALE}")
    prepared = Prepared.read(folder)
    rows, text_bytes = (prepared.manifest["validation"][key] for key in ("rows", "text_bytes"))
    tokens = sum(entry["bytes"] for entry in prepared.manifest["tokens"]) // 2
    print(f"data: {tokens / 1e6:.1f}M training tokens, {rows:,} validation rows of {text_bytes:,} bytes of text")
    print(f"ready: {folder}, fingerprint {prepared.fingerprint(default_device())}" + ", nothing to do" * current)


def build_folder(folder: Path, request: dict, shards: Shards) -> None:
    """Tokenizer, token files and validation rows of a folder's shards, then the manifest that vouches for them."""
    paths, cores = [*shards["val"], *shards["train"]], os.cpu_count() or 1
    if not all(shards.values()):
        raise PrepareError("the corpus has fewer than 2 distinct documents; bring more text")
    digests: dict[Path, str] = {}
    with Progress(desc="check", total=len(paths), unit=" shards") as progress:
        in_threads(lambda p: digests.update({p: sha256(p)}) or progress.update(), paths, cores, progress)
    print(f"corpus: {request['corpus']}, {len(paths)} shards")

    # the name says what it was learned from, so that another vocabulary or corpus never finds an old one
    learned_from = short_hash(VOCAB_SIZE, SPLIT_PATTERN, TOKENIZER_CHARS, [digests[p] for p in shards["train"]])
    tokenizer_path = folder / "tokens" / f"tokenizer-{learned_from}.txt"
    if not tokenizer_path.exists():
        with Progress(desc="tokenizer", unit=" characters") as progress:
            Tokenizer.train(training_text(shards["train"], progress)).save(tokenizer_path)
    tokenizer, tokenizer_sha256 = Tokenizer.load(tokenizer_path), sha256(tokenizer_path)
    print(f"tokenizer: {tokenizer.get_vocab_size():,} tokens")

    def target(shard: Path) -> Path:
        return folder / "tokens" / f"{shard.stem}-{digests[shard][:8]}-{tokenizer_sha256[:8]}.bin"

    missing = [path for path in paths if not target(path).exists()]
    with Progress(desc="tokens", unit=" documents") as progress:
        in_threads(lambda p: tokenize(p, target(p), tokenizer, progress), missing, cores, progress)
    rows = validation_rows([target(path) for path in shards["val"]], tokenizer.get_bos_token_id())
    rows_path = folder / "tokens" / f"validation-{short_hash(digests[paths[0]], tokenizer_sha256, EVAL_TOKENS)}.bin"
    with published(rows_path) as file:
        file.write(rows.tobytes())

    def entry(path: Path, **more: object) -> dict:
        return {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": sha256(path), **more}

    text_bytes = int(tokenizer.token_bytes.numpy()[rows[:, 1:]].sum())
    manifest = {
        "format": FORMAT,
        "scale": scale_constants(),
        "request": request,
        "shards": [
            {"path": str(p.relative_to(folder)), "bytes": p.stat().st_size, "sha256": digests[p]} for p in paths
        ],
        "tokenizer": entry(tokenizer_path),
        "tokens": [entry(target(path)) for path in shards["train"]],
        "validation": entry(rows_path, rows=len(rows), text_bytes=text_bytes),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("rustbpe", "tiktoken", "pyarrow", "numpy", "torch")},
    }
    with published(folder / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())


# == 9. Metric =================================================================================================


@torch.no_grad()
def evaluate_bpb(model: Callable, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of the validation rows: the sum of all cross-entropies in nats / (ln 2 * bytes of the targets).

    `model(inputs)` gets int64 (B, T) and returns logits (B, T, V); it never sees a target. Rows and number do not depend on
    `batch_size`, which is halved where memory runs out. Targets of no bytes (special tokens) are left out of both sums.
    Inside an Experiment this ends the training and counts once. Raises MetricError if the logits have another shape or are
    not finite, if the model looks at the future or at other rows, or if it changes while it is evaluated.
    """
    experiment = _experiment
    if experiment:
        experiment.stop_clock()
    device = next((p.device for p in getattr(model, "parameters", lambda: iter(()))()), default_device())
    rows = torch.from_numpy(Prepared.active().rows().astype(np.int64)).to(device)
    batch = min(batch_size, LOGITS_BYTES // (4 * MAX_SEQ_LEN * VOCAB_SIZE), len(rows) // 2)  # two batches: see probe
    training = getattr(model, "training", False)
    if training:
        model.eval()
    while True:
        try:
            losses = score(model, rows, batch)
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                raise MetricError("out of memory with a single validation row; make the model smaller") from None
            batch //= 2
    if training:
        model.train()
    token_bytes = tokenizer.token_bytes.to(device)[rows[:, 1:]]
    nats = (losses.double() * (token_bytes > 0)).sum().item()
    val_bpb = nats / (math.log(2) * token_bytes.sum().item())
    if experiment:
        experiment.scored(val_bpb)
    return val_bpb


def score(model: Callable, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Losses (rows, T) in nats, after the probes: see evaluate_bpb."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    batches = torch.arange(math.ceil(len(rows) / batch) * batch, device=rows.device).view(-1, batch) % len(rows)
    first = token_losses(model, inputs[batches[0]], targets[batches[0]], check_all=True)

    def moved_since_first() -> float:
        again = token_losses(model, inputs[batches[0]], targets[batches[0]])
        return (again - first).abs().max().item()

    noise = moved_since_first()
    if noise > NOISE_LIMIT:
        raise MetricError(f"two identical calls of the model differ by {noise:.3g} nat, more than {NOISE_LIMIT}")
    allowed = max(TOLERANCE, 10 * noise)
    losses = torch.empty_like(targets, dtype=torch.float32)
    losses[batches[0]] = first
    for index in batches[1:]:
        losses[index] = token_losses(model, inputs[index], targets[index])
    probe(model, rows, losses, batch, allowed)
    if (moved := moved_since_first()) > allowed:
        raise MetricError(
            f"the same rows score {moved:.3g} nat differently after the evaluation; the model must not change during it"
        )
    return losses


def token_losses(model: Callable, inputs: torch.Tensor, targets: torch.Tensor, check_all: bool = False) -> torch.Tensor:
    """Cross-entropy (B, T) in nats, float32; `check_all` looks at every logit instead of at the losses alone."""
    logits = model(inputs)
    want = (*inputs.shape, VOCAB_SIZE)
    if not isinstance(logits, torch.Tensor) or logits.shape != want:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise MetricError(f"model(inputs) returned {found}, not logits of shape {want}; targets are the metric's business")
    losses = torch.empty(inputs.shape, dtype=torch.float32, device=inputs.device)
    at_once = max(1, 2**26 // (MAX_SEQ_LEN * VOCAB_SIZE))  # rows: the float32 copies stay small
    for part in torch.arange(len(inputs), device=inputs.device).split(at_once):
        nats = F.cross_entropy(logits[part].flatten(0, 1).float(), targets[part].flatten(), reduction="none")
        losses[part] = nats.view(len(part), -1)
    if not (torch.isfinite(logits).all() if check_all else torch.isfinite(losses).all()):
        raise MetricError("the model's logits are not finite; look for a division by zero or an overflow")
    return losses


def probe(model: Callable, rows: torch.Tensor, losses: torch.Tensor, batch: int, allowed: float) -> None:
    """Raise MetricError if the future, or another row, moves a loss by more than `allowed` nat.

    Every row of a probe batch is a validation row in the place that it had in its own batch, among rows of other batches, and
    its inputs from a cut on are replaced by those of another row. Up to the cut the losses of its original targets must
    stay: the target at the cut is still the original, so a leak by one token shows. The cuts are stratified over 1..T-1, with
    the last ten positions on top.
    """
    T, whole = rows.shape[1] - 1, len(rows) // batch
    rng = random.Random(PROBES)
    cuts = [1 + int((i + rng.random()) * (T - 1) / PROBES) for i in range(PROBES)] + [max(1, T - i) for i in range(1, 11)]
    cuts += [rng.randint(1, T - 1) for _ in range(-len(cuts) % batch)]
    rng.shuffle(cuts)
    slots = torch.arange(batch, device=rows.device)
    for cut in torch.tensor(cuts, device=rows.device).view(-1, batch, 1):
        index = slots + batch * torch.tensor([rng.randrange(whole) for _ in slots], device=rows.device)
        other = (index + rng.randrange(1, len(rows))) % len(rows)
        before = torch.arange(T, device=rows.device) < cut
        inputs = torch.where(before, rows[index, :-1], rows[other, :-1])
        moved = (token_losses(model, inputs, rows[index, 1:]) - losses[index]).abs() * before
        if moved.max() > allowed:
            slot, position = divmod(int(moved.argmax()), T)
            raise MetricError(
                f"the prediction at position {position} moves by {moved.max():.3g} nat, more than {allowed:.3g}, when inputs "
                f"from position {int(cut[slot])} on or other rows are replaced; the model must see only its own row's past"
            )


# == 10. Experiment: one run, its clock and its watchdog ========================================================

_experiment: "Experiment | None" = None  # the one that is running


class Experiment:
    """One run of train.py: `with Experiment(description) as run:` around all of it.

    On entry the data is found, torch is seeded and the watchdog starts; `run.steps()` is the clock, evaluate_bpb stops it,
    `run.summary()` prints the result. On exit an error is reported on stderr; `run.exit_code` is 0 if there is a score.
    """

    def __init__(self, description: str = ""):
        self.description = " ".join(description.split())
        self.clock_started = self.clock_stopped = 0.0
        self.val_bpb = self.eval_seconds = math.nan
        self.exit_code = 1

    def __enter__(self) -> "Experiment":
        global _experiment
        self.begun = time.perf_counter()
        try:
            seed = os.environ.get("SEED", "42")
            if not re.fullmatch(r"\d{1,9}", seed):
                raise PrepareError(f"SEED is {seed!r}, not a whole number; unset it")
            check_constants()
            self.prepared = Prepared.active()
        except AutoresearchError as error:
            sys.exit(f"error: {error}")
        self.seed, self.device = int(seed), default_device()
        self.fingerprint = self.prepared.fingerprint(self.device)
        torch.manual_seed(self.seed)
        self.data_check = ThreadPoolExecutor(1).submit(self.prepared.verify)
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        # for a hang that holds the interpreter, so that the thread cannot run
        faulthandler.dump_traceback_later(TIME_BUDGET + GRACE + 30, exit=True, file=sys.__stderr__)
        _experiment = self
        return self

    def _watch(self) -> None:
        if not self.ended.wait(TIME_BUDGET + GRACE):
            faulthandler.dump_traceback(file=sys.__stderr__)
            self._report(f"error: still running after {TIME_BUDGET + GRACE} s; the stacks above show where")
            os._exit(1)

    def steps(self) -> Iterator[tuple[int, float]]:
        """(step, progress) for every training step: progress is the fraction of TIME_BUDGET that is used, 0 to 1.

        Starts the clock. Ends before a step that, judged by the last one, would pass the budget. On CUDA the host runs at
        most one step ahead of the device. Raises PrepareError if a file of the corpus was altered.
        """
        self.data_check.result()
        synchronize(self.device)
        cuda = self.device.type == "cuda"
        ahead = 1 if cuda else 0  # steps that are still running when the next one is decided on
        events: deque = deque()
        self.clock_started = now = time.perf_counter()
        step_seconds = 0.0
        for step in itertools.count():
            starts = now - self.clock_started + ahead * step_seconds
            if starts + step_seconds > TIME_BUDGET:
                return
            yield step, min(starts / TIME_BUDGET, 1.0)
            if cuda:
                events.append(torch.cuda.Event())
                events[-1].record()
                if len(events) > ahead:
                    events.popleft().synchronize()
            else:
                synchronize(self.device)
            before, now = now, time.perf_counter()
            step_seconds = now - before

    def stop_clock(self) -> None:
        """End the training: called by evaluate_bpb. Raises MetricError if it was too long, or reseeded, or scored before."""
        if self.clock_stopped:
            raise MetricError("evaluate_bpb was called twice; a run has one score")
        if not self.clock_started:
            raise MetricError("evaluate_bpb was called before the clock started; train in `for step, progress in run.steps()`")
        synchronize(self.device)
        self.clock_stopped = time.perf_counter()
        allowed = TIME_BUDGET + max(5, 0.02 * TIME_BUDGET)
        if self.training_seconds > allowed:
            raise MetricError(f"trained for {self.training_seconds:.1f} s, at most {allowed:.1f} s count; stop in time")
        if torch.initial_seed() != self.seed:
            raise MetricError(f"torch's seed is {torch.initial_seed()}, not {self.seed}; seeds belong to the harness")
        check_constants()

    def scored(self, val_bpb: float) -> None:
        self.val_bpb = val_bpb
        self.eval_seconds = time.perf_counter() - self.clock_stopped

    @property
    def training_seconds(self) -> float:
        return self.clock_stopped - self.clock_started

    def summary(self, mfu_percent: object, total_tokens_M: float, num_steps: int, num_params_M: float, depth: int) -> None:
        """Print `---` and the result as `key: value`: what train.py knows, and what was measured here."""
        if math.isnan(self.val_bpb):
            raise MetricError("there is no score; call evaluate_bpb before run.summary()")
        values = {
            "val_bpb": f"{self.val_bpb:.6f}",
            "training_seconds": f"{self.training_seconds:.1f}",
            "total_seconds": f"{time.perf_counter() - self.begun:.1f}",
            "peak_vram_mb": f"{peak_memory_mb(self.device):.1f}",
            "mfu_percent": mfu_percent if isinstance(mfu_percent, str) else f"{mfu_percent:.2f}",
            "total_tokens_M": f"{total_tokens_M:.1f}",
            "num_steps": num_steps,
            "num_params_M": f"{num_params_M:.1f}",
            "depth": depth,
            "startup_seconds": f"{self.clock_started - self.begun:.1f}",
            "eval_seconds": f"{self.eval_seconds:.1f}",
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }
        print("---", *(f"{key + ':':<18}{value}" for key, value in values.items()), sep="\n", flush=True)

    def _report(self, message: str) -> None:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        global _experiment
        _experiment = None
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, AutoresearchError):
            self._report(f"error: {error}")
        elif isinstance(error, KeyboardInterrupt):
            self._report("error: interrupted; the run has no score, start it again")
        elif error:
            lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
            self._report("\n".join(lines if len(lines) <= 30 else [*lines[:5], "  ...", *lines[-24:]]))
        elif math.isnan(self.val_bpb):
            self._report("error: the run ended without a score; call evaluate_bpb once, after the training")
        else:
            self.exit_code = 0
        return True


def check_constants() -> None:
    if changed := [f"{k} is {v}, not {_CONSTANTS[k]}" for k, v in constants().items() if v != _CONSTANTS[k]]:
        raise MetricError(f"prepare.{'; prepare.'.join(changed)}: the run would not be comparable; leave prepare.py as it is")


def peak_memory_mb(device: torch.device) -> float:
    """Of the GPU; on the CPU and MPS, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# == 11. Command line ==========================================================================================


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise PrepareError(f"{message}; see prepare.py --help")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="prepare.py", description="Prepare a corpus for train.py, once.")
    default = SCALES[SCALE]["corpus"]
    help = f"climbmix, tinystories, python, or a folder of .parquet, .jsonl, .txt, .md (default here: {default})"
    parser.add_argument("--data", default=default, help=help)
    parser.add_argument("--num-shards", type=int, help="training shards of climbmix (default: 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="downloads at once (default: %(default)s)")
    try:
        options = parser.parse_args(argv)
        prepare(options.data, options.num_shards, options.download_workers)
        return 0
    except AutoresearchError as error:
        message = str(error)
    except OSError as error:
        what = f"{error.filename or CACHE}: {error.strerror or error}"
        message = f"{what}; make it writable and free some space, or point AUTORESEARCH_CACHE elsewhere"
    except KeyboardInterrupt:
        print("error: interrupted; run prepare.py again to continue", file=sys.stderr, flush=True)
        os._exit(1)  # a thread may still wait for the network
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

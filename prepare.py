"""The fixed ground of autoresearch: corpus, tokenizer, dataloader, metric and clock. Nobody edits this file.

    uv run prepare.py [--data climbmix|tinystories|python|DIR] [--num-shards N] [--download-workers N]

turns a corpus into what train.py reads, below ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it), one folder for each
corpus and scale. A file under its final name is complete: any step can be interrupted, the same command continues it.
The file reads in the order in which the data flows. B rows of a batch, T tokens of a row, V tokens of the vocabulary.
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
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# == 1. Constants ======================================================================================================

SCALES = {  # five minutes on an H100 and on a laptop are different problems
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
LAYOUT = [1, SCALE, MAX_SEQ_LEN, VOCAB_SIZE, EVAL_TOKENS]  # version and scale of a prepared folder
CLIMBMIX, CLIMBMIX_SHARDS = "datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6542  # and one for validation
TINYSTORIES = "datasets/karpathy/tinystories-gpt4-clean/resolve/main/tinystories_gpt4_clean.parquet"
DOWNLOAD_ATTEMPTS = 5
DOWNLOAD_TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
SHARD_DOCUMENTS = 2**14  # of a shard that is built here
VALIDATION_FRACTION = 0.05  # of a corpus without a split of its own

SPLIT_PATTERN = (  # GPT-4's, with numbers cut after two digits instead of three: the vocabulary is small
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")
TOKENIZER_CHARS, TOKENIZER_DOCUMENT_CHARS = 10**9, 10_000  # what the merges are learned from
DOCUMENT_CHARS = 100_000  # longer texts are cut first: tiktoken 0.14 panics on 1,000,000 spaces
PACKING_DOCUMENTS, PACKING_REFILL = 1000, 128  # held to choose from; appended at once when fewer are held
MIN_VALIDATION_ROWS = 64
LOGITS_BYTES = 2**31  # of float32 logits that the metric asks for at once
PROBES = 256  # (row, cut) pairs at least: a leak behind a rare token needs that many
TOLERANCE, NOISE_LIMIT = 0.005, 0.02  # nats: what the future may move; what two identical calls may differ by

def constants() -> dict:
    """The numbers and names above, as they are now."""
    return {name: value for name, value in globals().items() if name.isupper() and isinstance(value, int | float | str)}

_CONSTANTS = constants()

class AutoresearchError(Exception):
    """What a user can mend; its one line says what was found, what was expected and what to do."""

class PrepareError(AutoresearchError):
    """The data is not there, or not what it should be."""

class TrainError(AutoresearchError):
    """Training cannot go on."""

class MetricError(AutoresearchError):
    """The run has no valid score."""

# == 2. Files and threads ==============================================================================================

bar = functools.partial(tqdm, disable=None, leave=False, unit_scale=True, mininterval=0.5)  # silent without a terminal

@contextlib.contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it appears under `path`, in place of an older one, only when the block ends well."""
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
    """One prepare.py at a time; the lock ends with the process. What a killed one left behind is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"{folder}: another prepare.py is at work here; wait until it has ended") from None
        for path in list(folder.rglob("*.tmp")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        yield

def in_threads(work: Callable, items: Iterable, workers: int) -> None:
    """work(item) for every item; the first error, or Ctrl-C, is raised at once and what has not begun is dropped."""
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

def batched(items: Iterable, size: int) -> Iterator[list]:
    return iter(functools.partial(lambda source: list(itertools.islice(source, size)), iter(items)), [])

def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

def short_hash(*parts: object) -> str:
    """Eight hex digits over anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]

# == 3. Corpora: each becomes parquet shards with one column, text =====================================================

Shards = dict[str, list[Path]]  # of the splits train and val
Split = Iterator[tuple[str, str]]  # (train or val, text) of every document

def texts(path: Path, name: str | None = None) -> Iterator[str]:
    """The documents of a parquet file; nulls and empty ones are left out, broken UTF-8 is replaced."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise ValueError(f"no column 'text', only {file.schema_arrow.names}")
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            raws = batch.column(0).cast("large_binary").to_pylist()
            yield from (raw.decode("utf-8", "replace") for raw in raws if raw)
    except (ValueError, OSError, NotImplementedError) as error:  # those of pyarrow are among them
        reason = str(error).splitlines()[0]
        raise PrepareError(f"{name or path}: unusable parquet, {reason}; replace it and run prepare.py again") from None

@functools.cache
def session():
    """Pooled connections that try again what may succeed later (no connection, 429, 5xx), and wait as they are told."""
    import requests
    from urllib3.util import Retry

    again = {"status_forcelist": (429, 500, 502, 503, 504), "raise_on_status": False, "retry_after_max": 60}
    retry = Retry(DOWNLOAD_ATTEMPTS - 1, backoff_factor=0.5, **again)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry, pool_maxsize=64))
    return session

def download(name: str, path: Path, progress: tqdm) -> None:
    """Fetch a parquet file from HF_ENDPOINT; its length and its content are checked before it appears under `path`.

    A connection that breaks in mid-file goes on where it broke, if the server says that the file is still the same.
    """
    import requests

    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{name}"
    failed = f"{path.name}: {{}} ({url}); check the network and HF_ENDPOINT, then run prepare.py again"
    etag, length = None, 0
    with published(path) as file:
        for attempt in range(DOWNLOAD_ATTEMPTS):
            time.sleep(0.5 * (2**attempt - 1))
            resume = {"Range": f"bytes={file.tell()}-", "If-Range": etag} if etag and file.tell() else {}
            headers = {"Accept-Encoding": "identity"} | resume
            try:
                response = session().get(url, stream=True, timeout=DOWNLOAD_TIMEOUT, headers=headers)
            except requests.RequestException as error:  # the session has tried again already
                raise PrepareError(failed.format(str(error).rsplit(": ", 1)[-1].strip("'\")"))) from None
            with response, contextlib.suppress(requests.RequestException):
                if not response.ok:
                    raise PrepareError(failed.format(f"the server answered {response.status_code} {response.reason}"))
                if response.status_code != 206:
                    file.truncate(file.seek(0))
                etag, rest = response.headers.get("ETag"), int(response.headers.get("Content-Length", 0))
                length = file.tell() + rest if rest else 0
                progress.total = (progress.total or 0) + rest
                for block in response.iter_content(2**20):
                    progress.update(file.write(block))
                if file.tell() == length or not length:
                    file.flush()
                    return next(texts(Path(file.name), f"{path.name} from {url}"), None)
        raise PrepareError(failed.format(f"cut off at {file.tell():,} of {length or 'unknown':,} bytes"))

def climbmix(folder: Path, num_shards: int, workers: int) -> Shards:
    """Published shards. The one that is pinned as validation comes first, so that no run finds it missing."""
    val, *train = [folder / "shards" / f"shard_{i:05d}.parquet" for i in (CLIMBMIX_SHARDS, *range(num_shards))]
    with bar(desc="download", unit="B") as progress:
        for paths in ([val], train):
            missing = [path for path in paths if not path.exists()]
            in_threads(lambda path: download(f"{CLIMBMIX}/{path.name}", path, progress), missing, workers)
    return {"train": train, "val": [val]}

def tinystories(folder: Path) -> Split:
    """One published file with a suggested split: rows up to 9,999 are test data, up to 19,999 validation."""
    if not (source := folder / "tinystories.parquet").exists():
        with bar(desc="download", unit="B") as progress:
            download(TINYSTORIES, source, progress)
    for i, text in enumerate(texts(source)):
        if i >= 10_000:
            yield "val" if i < 20_000 else "train", text

def python(folder: Path) -> Split:
    """The Python sources on this machine, cut at top-level definitions, once each, in the order of their hashes."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    # packages of another environment can lie below the standard library
    paths = [path for root in roots for path in root.rglob("*.py") if "-packages" not in str(path.relative_to(root))]
    pieces = {}
    for path in bar(paths, desc="read", unit=" files"):
        with contextlib.suppress(UnicodeDecodeError, OSError):
            for piece in cut(path.read_text("utf-8"), r"(?<=\n\n)(?=@|class |def |async def )", 800):
                pieces[content_hash(piece)] = piece
    yield from split_by_hash(pieces[key] for key in sorted(pieces))

def own_data(paths: list[Path]) -> Split:
    """Documents of .parquet and .jsonl (field text), of .txt and .md, which are cut at blank lines."""
    return split_by_hash(itertools.chain.from_iterable(map(own_documents, paths)))

def own_documents(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from texts(path)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.open("rb"), 1):
            try:  # JSON can spell lone surrogates, UTF-8 cannot
                yield json.loads(line)["text"].encode("utf-8", "replace").decode()
            except (ValueError, LookupError, TypeError, AttributeError):
                raise PrepareError(f'{path}: line {number} is no JSON object with a string "text"; mend it') from None
    else:
        yield from cut(path.read_text("utf-8", errors="replace"), r"(?<=\n)\s*\n", 2000)

def cut(text: str, boundary: str, chars: int) -> Iterator[str]:
    """Pieces of at least `chars` characters (the last may be shorter) that end at a boundary; none is blank."""
    start = 0
    for end in (*(match.end() for match in re.finditer(boundary, text)), len(text)):
        if (end - start >= chars or end == len(text)) and text[start:end].strip():
            yield text[start:end]
            start = end

def content_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

def split_by_hash(documents: Iterable[str]) -> Split:
    """Documents with a hash in the lowest 5 % are validation, once each; the others are for training.

    Copies of a document fall on the same side, and documents that are added later move none of the others.
    """
    seen = set()
    for text in filter(None, documents):
        if (key := content_hash(text)) >= VALIDATION_FRACTION * 2**64:
            yield "train", text
        elif key not in seen:
            seen.add(key)
            yield "val", text

def built(folder: Path, documents: Split) -> Shards:
    """Parquet files of SHARD_DOCUMENTS each; the folder appears when all are complete, and then stays as it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    if not folder.exists():
        temporary.mkdir(parents=True)
        try:
            for i, batch in enumerate(batched(bar(documents, desc="shards", unit=" documents"), SHARD_DOCUMENTS)):
                for split in {split for split, _ in batch}:
                    table = pa.table({"text": [text for name, text in batch if name == split]})
                    pq.write_table(table, temporary / f"{split}_{i:05d}.parquet")
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {split: sorted(folder.glob(f"{split}_*.parquet")) for split in ("train", "val")}

# == 4. Tokenizer ======================================================================================================

class Tokenizer:
    """Byte-pair encoding: bytes and merges first, then SPECIAL_TOKENS. Learned by rustbpe, used through tiktoken."""

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        if (found := len(ranks) + len(SPECIAL_TOKENS)) != VOCAB_SIZE:
            raise PrepareError(f"the corpus yields {found:,} tokens, not {VOCAB_SIZE:,}; bring more varied text")
        special = self.special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding("bpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        # int64 (V,), from the raw bytes: a lone byte >= 0x80 decodes to U+FFFD, which is three
        self.token_bytes = torch.tensor([*map(len, sorted(ranks, key=ranks.get)), *[0] * len(SPECIAL_TOKENS)])

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
        """Read lines of base64(token) and rank, tiktoken's own text format."""
        try:
            lines = [line.split() for line in path.read_bytes().splitlines()]
            return cls({base64.b64decode(token, validate=True): int(rank) for token, rank in lines})
        except ValueError:
            raise PrepareError(f"{path}: not a tokenizer; delete it and run prepare.py again") from None

    def save(self, path: Path) -> None:
        with published(path) as file:
            for rank in range(VOCAB_SIZE - len(SPECIAL_TOKENS)):
                file.write(b"%s %d\n" % (base64.b64encode(self.encoding.decode_single_token_bytes(rank)), rank))

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Token ids of a text, or a list of them for a list of texts; `prepend` is an id or a special token's name.

        Names of special tokens in the text are plain text.
        """
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        first = [] if prepend is None else [self.special_tokens.get(prepend, prepend)]
        return first + [token for piece in self.encode_pieces(text) for token in piece.tolist()]

    def encode_pieces(self, text: str) -> list[np.ndarray]:
        """Token ids, uint32, of each DOCUMENT_CHARS characters."""
        pieces = (text[start : start + DOCUMENT_CHARS] for start in range(0, len(text), DOCUMENT_CHARS))
        return [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def get_bos_token_id(self) -> int:
        return self.special_tokens[SPECIAL_TOKENS[0]]

def training_text(paths: list[Path]) -> Iterator[str]:
    """What the merges are learned from: the beginnings of documents, TOKENIZER_CHARS characters altogether."""
    left = TOKENIZER_CHARS
    for text in bar(itertools.chain.from_iterable(map(texts, paths)), desc="tokenizer", unit=" documents"):
        yield text[: min(TOKENIZER_DOCUMENT_CHARS, left)]
        if (left := left - min(TOKENIZER_DOCUMENT_CHARS, len(text))) <= 0:
            return

# == 5. Token cache: flat uint16 files, in which a document is BOS and its tokens ======================================

def tokenize(shard: Path, target: Path, tokenizer: Tokenizer, progress: tqdm) -> None:
    """Write the documents of a shard; at the small scale in pieces of one row at most, T+1 tokens with BOS."""
    bos = np.array([tokenizer.get_bos_token_id()], np.uint32)
    limit = MAX_SEQ_LEN if SCALE == "small" else DOCUMENT_CHARS * 4  # a character has at most four tokens
    with published(target) as file:
        for batch in batched(texts(shard), 1024):
            ids = (ids for text in batch for ids in tokenizer.encode_pieces(text))
            parts = ((bos, one[start : start + limit]) for one in ids for start in range(0, len(one), limit))
            file.write(np.concatenate(list(itertools.chain.from_iterable(parts))).astype("<u2").tobytes())
            progress.update(len(batch))

def documents(paths: list[Path], bos: int, epochs: Iterable[int]) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, epoch) of every document in corpus order: uint16 views of the memory-mapped files.

    BOS stands at the start of each document and nowhere else, so the offsets need no file of their own.
    """
    shards = [np.asarray(np.memmap(path, "<u2", "r")) for path in paths]
    for epoch in epochs:
        for tokens in shards:
            starts = np.flatnonzero(tokens == bos).tolist()
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                yield tokens[start:end], epoch

# == 6. Packing and the dataloader =====================================================================================

class Packer:
    """Fills rows of `capacity` tokens with documents, best fit first, without padding.

    Before every choice, while fewer than 1000 documents are held, the next 128 in corpus order are appended. Taken is
    the longest that fits, the earliest among equals; when none fits, the shortest (again the earliest) fills the row,
    and its rest is dropped. The choice is O(1): a FIFO for each length, and an integer as the set of the lengths held.
    """

    def __init__(self, documents: Iterator[tuple[np.ndarray, int]], capacity: int):
        self.documents, self.capacity, self.epoch, self.held = documents, capacity, 0, 0
        self.fifos: dict[int, deque] = defaultdict(deque)
        self.lengths = 0  # bit n is set if fifos[n] is not empty
        self.up_to = [(2 << room) - 1 for room in range(capacity + 1)]  # the lengths that fit into `room`

    def refill(self) -> None:
        before = -1
        while before < self.held < PACKING_DOCUMENTS:
            before = self.held
            for document, epoch in itertools.islice(self.documents, PACKING_REFILL):
                self.fifos[len(document)].append(document)
                self.lengths |= 1 << len(document)
                self.held, self.epoch = self.held + 1, epoch

    def fill(self, row: np.ndarray) -> bool:
        """Fill an integer array of `capacity` tokens; False if the documents ran out."""
        start, capacity = 0, self.capacity
        while start < capacity:
            if self.held < PACKING_DOCUMENTS:
                self.refill()
            if not self.held:
                return False
            fitting = self.lengths & self.up_to[capacity - start]
            n = (fitting or self.lengths & -self.lengths).bit_length() - 1  # the highest that fits, else the lowest
            document = self.fifos[n].popleft()
            if not self.fifos[n]:
                self.lengths ^= 1 << n
            self.held -= 1
            end = min(start + n, capacity)
            row[start:end] = document[: end - start]
            start = end
        return True

Batches = Iterator[tuple[torch.Tensor, torch.Tensor, int]]

def make_dataloader(
    tokenizer: Tokenizer, B: int, T: int, split: str = "train", device: torch.device | str | None = None
) -> Batches:
    """Endless (inputs, targets, epoch): int64 (B, T) on the device, cut from rows of T+1 packed tokens.

    Raises PrepareError for any split but train (the validation rows belong to the metric), and TrainError if a batch is
    drawn inside an Experiment before its clock has started.
    """
    if split != "train":
        raise PrepareError(f"there is no split {split!r} to draw from, only 'train'; evaluate_bpb scores the other one")
    stream = documents(Prepared.active().tokens, tokenizer.get_bos_token_id(), itertools.count(1))
    return _batches(Packer(stream, T + 1), B, T, torch.device(device or default_device()))

def _batches(packer: Packer, B: int, T: int, device: torch.device) -> Batches:
    rows, cuda = np.empty((B, T + 1), np.uint16), device.type == "cuda"
    # a pinned slot may be refilled only after its copy has run, which can be queued behind a whole backward pass
    slots = [(torch.empty(2, B, T, dtype=torch.int64, pin_memory=True), torch.cuda.Event()) for _ in range(3 * cuda)]
    for i in itertools.count():
        if _experiment and not _experiment.clock_started:
            raise TrainError("training data was drawn before the clock; warm up on random tokens, draw in run.steps()")
        for row in rows:
            packer.fill(row)
        slot, copied = slots[i % 3] if cuda else (torch.empty(2, B, T, dtype=torch.int64), None)
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
        found = f"the validation split fills {count} rows of {MAX_SEQ_LEN} tokens"
        raise PrepareError(f"{found}, at least {MIN_VALIDATION_ROWS} are needed; bring more text")
    return rows[:count]

# == 7. The prepared folder ============================================================================================

@dataclass(frozen=True)
class Prepared:
    """A prepared folder and its manifest: what is which, and length and sha256 of every file."""

    folder: Path
    manifest: dict

    @classmethod
    def read(cls, folder: Path) -> "Prepared":
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["layout"] != LAYOUT:
                raise PrepareError(f"{folder}: prepared for {manifest['layout']}, not {LAYOUT}; run prepare.py again")
        except FileNotFoundError:
            raise PrepareError(f"{folder}: not prepared; run prepare.py") from None
        except (ValueError, LookupError, TypeError):
            raise PrepareError(f"{folder / 'manifest.json'}: damaged; run prepare.py again") from None
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
        return self.folder / self.manifest["tokenizer"]

    @property
    def tokens(self) -> list[Path]:
        """The token files of the training split."""
        return [self.folder / name for name in self.manifest["train"]]

    def rows(self) -> np.ndarray:
        """The validation rows, uint16 (rows, T+1)."""
        return np.fromfile(self.folder / self.manifest["validation"], "<u2").reshape(-1, MAX_SEQ_LEN + 1)

    def is_current(self, request: list) -> bool:
        """Whether this is what `request` asks for, with every file in place."""
        lengths = {self.folder / name: length for name, (length, _) in self.manifest["files"].items()}
        in_place = all(path.exists() and path.stat().st_size == length for path, length in lengths.items())
        return self.manifest["request"] == request and in_place

    def verify(self) -> None:
        """Raise PrepareError if a file that a score depends on is not what prepare.py wrote."""
        for name in (self.manifest["tokenizer"], self.manifest["validation"], *self.manifest["train"]):
            path, want = self.folder / name, self.manifest["files"][name][1]
            if (found := file_hash(path) if path.exists() else "missing") != want:
                found = f"{path}: altered, its sha256 is {found[:12]}, not {want[:12]}"
                raise PrepareError(f"{found}; delete it and run prepare.py again")

    def fingerprint(self, device: torch.device) -> str:
        """Two scores may be compared only if this is equal."""
        data = [self.manifest["files"][self.manifest[name]][1] for name in ("validation", "tokenizer")]
        return short_hash(file_hash(Path(__file__)), constants(), data, torch.__version__, device_name(device))

def default_device() -> torch.device:
    """CUDA, Apple MPS or what else accelerates here, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    found = re.search(r"model name\s*: (.*)", cpuinfo)
    return f"{found[1] if found else platform.processor()} {device.type}, {torch.get_num_threads()} threads"

def prepare(data: str, num_shards: int | None, workers: int) -> None:
    """Bring a corpus into the cache, as far as it is not there yet, and make it the active one.

    Raises PrepareError, or OSError where the disk does not play along; what is complete stays, a rerun continues.
    """
    corpora, own = {"climbmix": None, "tinystories": tinystories, "python": python}, Path(data).resolve()
    if data != "climbmix" and num_shards is not None:
        raise PrepareError(f"--num-shards is for climbmix, not for {data}; leave it out")
    if not 1 <= (num_shards := 10 if num_shards is None else num_shards) <= CLIMBMIX_SHARDS:
        raise PrepareError(f"--num-shards is {num_shards}, not 1 to {CLIMBMIX_SHARDS}; choose one of these")
    if workers < 1:
        raise PrepareError(f"--download-workers is {workers}, not 1 or more; choose a number such as 8")
    if data in corpora:
        name, request = data, [data, num_shards]
    elif own.is_dir():
        files = sorted(p for p in own.rglob("*") if p.suffix in (".parquet", ".jsonl", ".txt", ".md") and p.is_file())
        state = short_hash([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
        name, request = f"{own.name}-{short_hash(str(own))}", [str(own), state]
    else:
        raise PrepareError(f"--data {data}: neither {', '.join(corpora)} nor a folder; choose one of these")
    with locked(folder := CACHE / f"{name}-{SCALE}"):
        current = False
        with contextlib.suppress(PrepareError, LookupError, TypeError, ValueError, AttributeError):
            current = Prepared.read(folder).is_current(request)
        if not current:
            if data == "climbmix":
                shards = climbmix(folder, num_shards, workers)
            elif data in corpora:
                shards = built(folder / "shards", corpora[data](folder))
            else:
                shards = built(folder / f"shards-{state}", own_data(files))
            derive(folder, request, shards)
        with published(folder / "active") as file:
            file.write(folder.name.encode())
        os.replace(folder / "active", CACHE / f"active-{SCALE}")
        prepared = Prepared.read(folder)
    tokens = sum(path.stat().st_size // 2 for path in prepared.tokens)
    print(f"data: {tokens:,} training tokens; {prepared.manifest['validation_rows']}")
    print(f"ready: {folder}, fingerprint {prepared.fingerprint(default_device())}{', nothing to do' * current}")

def derive(folder: Path, request: list, shards: Shards) -> None:
    """Tokenizer, token files and validation rows from a folder's shards, then the manifest that vouches for them."""
    if not shards["val"] or not shards["train"]:
        raise PrepareError("the corpus has too few documents for a training and a validation split; bring more text")
    paths, cores, hashes = [*shards["val"], *shards["train"]], os.cpu_count() or 1, {}

    def add(*paths: Path) -> None:
        in_threads(lambda path: hashes.update({path: file_hash(path)}), paths, cores)

    add(*paths)
    print(f"corpus: {request[0]}, {len(paths)} shards", flush=True)
    # the names say what a file was made from, so that another vocabulary or corpus never finds an old one
    made_from = short_hash(VOCAB_SIZE, SPLIT_PATTERN, TOKENIZER_CHARS, [hashes[path] for path in shards["train"]])
    tokenizer_path = folder / "tokens" / f"tokenizer-{made_from}.txt"
    if not tokenizer_path.exists():
        Tokenizer.train(training_text(shards["train"])).save(tokenizer_path)
    tokenizer = Tokenizer.load(tokenizer_path)
    add(tokenizer_path)
    print(f"tokenizer: {tokenizer.get_vocab_size():,} tokens", flush=True)
    names = {path: f"{path.stem}-{hashes[path][:8]}-{hashes[tokenizer_path][:8]}.bin" for path in paths}
    targets = {path: folder / "tokens" / name for path, name in names.items()}
    with bar(desc="tokens", unit=" documents") as progress:
        missing = [path for path in paths if not targets[path].exists()]
        in_threads(lambda path: tokenize(path, targets[path], tokenizer, progress), missing, cores)
    rows = validation_rows([targets[path] for path in shards["val"]], tokenizer.get_bos_token_id())
    rows_path = folder / "tokens" / "validation.bin"
    with published(rows_path) as file:
        file.write(rows.tobytes())
    add(*targets.values(), rows_path)
    text_bytes = int(tokenizer.token_bytes.numpy()[rows[:, 1:]].sum())
    manifest = {
        "layout": LAYOUT,
        "request": request,
        "tokenizer": str(tokenizer_path.relative_to(folder)),
        "train": [str(targets[path].relative_to(folder)) for path in shards["train"]],
        "validation": str(rows_path.relative_to(folder)),
        "validation_rows": f"{len(rows):,} validation rows of {text_bytes:,} bytes",
        "files": {str(path.relative_to(folder)): [path.stat().st_size, sha] for path, sha in hashes.items()},
        "versions": {name: importlib.metadata.version(name) for name in ("rustbpe", "tiktoken", "pyarrow", "numpy")},
    }
    with published(folder / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())
    for path in {*(folder / "tokens").iterdir(), *folder.glob("shards-*")} - {*hashes, paths[0].parent}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()  # of an older corpus

# == 8. Metric =========================================================================================================

@torch.no_grad()
def evaluate_bpb(model: Callable, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of the validation rows: cross-entropies in nats / (ln 2 * bytes of the targets), both summed.

    `model(inputs)` gets int64 (B, T) and returns logits (B, T, V); it never sees a target. The number does not depend on
    `batch_size`, which is halved where memory runs out. Targets of no bytes (special tokens) are left out of both
    sums. Inside an Experiment this ends the training, once. Raises MetricError if the logits have another shape or are
    not finite, if the model looks at the future or at other rows, or if it changes while it is evaluated.
    """
    if experiment := _experiment:
        experiment.stop_clock()
    device = next((p.device for p in getattr(model, "parameters", list)()), default_device())
    rows = torch.from_numpy(Prepared.active().rows().astype(np.int64)).to(device)
    batch = min(batch_size, LOGITS_BYTES // (4 * MAX_SEQ_LEN * VOCAB_SIZE), len(rows) // 2)  # probe needs two batches
    if training := getattr(model, "training", False):
        model.eval()
    losses = None
    while losses is None:
        try:
            losses = score(model, rows, batch)
        except torch.OutOfMemoryError:
            if (batch := batch // 2) == 0:
                raise MetricError("out of memory with a single validation row; make the model smaller") from None
    if training:
        model.train()
    token_bytes = tokenizer.token_bytes.to(device)[rows[:, 1:]]
    val_bpb = losses[token_bytes > 0].double().sum().item() / (math.log(2) * token_bytes.sum().item())
    if experiment:
        experiment.val_bpb, experiment.eval_seconds = val_bpb, time.perf_counter() - experiment.clock_stopped
    return val_bpb

def score(model: Callable, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Losses, float32 (rows, T) in nats, of a model that stands the probes."""
    # full batches of one shape, so that nothing is compiled twice: the last one is filled up with the first rows
    batches = (torch.arange(-(-len(rows) // batch) * batch, device=rows.device) % len(rows)).view(-1, batch)
    first = token_losses(model, rows[batches[0]], rows[batches[0], :-1], every_logit=True)

    def moved_since_first() -> float:
        return (token_losses(model, rows[batches[0]], rows[batches[0], :-1]) - first).abs().max().item()

    if (noise := moved_since_first()) > NOISE_LIMIT:
        raise MetricError(f"two identical calls of the model differ by {noise:.3g} nat, more than {NOISE_LIMIT}")
    allowed = max(TOLERANCE, 10 * noise)
    losses = torch.empty(len(rows), MAX_SEQ_LEN, device=rows.device)
    losses[batches[0]] = first
    for index in batches[1:]:
        losses[index] = token_losses(model, rows[index], rows[index, :-1])
    probe(model, rows, losses, batch, allowed)
    if (moved := moved_since_first()) > allowed:
        raise MetricError(f"the same rows moved by {moved:.3g} nat during the evaluation; the model must stay as it is")
    return losses

def token_losses(model: Callable, rows: torch.Tensor, inputs: torch.Tensor, every_logit: bool = False) -> torch.Tensor:
    """Cross-entropies, float32 (B, T) in nats, of rows (B, T+1) given inputs (B, T)."""
    logits, want = model(inputs), (*inputs.shape, VOCAB_SIZE)
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != want:
        raise MetricError(f"model(inputs) returned {found}, not logits of shape {want}; the metric computes the loss")
    few = max(1, 2**26 // (MAX_SEQ_LEN * VOCAB_SIZE))  # rows at a time, so that the float32 copies stay small
    parts = zip(logits.split(few), rows[:, 1:].split(few), strict=True)
    flat = [F.cross_entropy(x.flatten(0, 1).float(), y.flatten(), reduction="none") for x, y in parts]
    losses = torch.cat(flat).view(inputs.shape)
    if not torch.isfinite(logits if every_logit else losses).all():
        raise MetricError("the model's logits are not finite; look for an overflow or a division by zero")
    return losses

def probe(model: Callable, rows: torch.Tensor, losses: torch.Tensor, batch: int, allowed: float) -> None:
    """Raise MetricError if the future, or another row, moves a loss by more than `allowed` nat.

    Every row of a probe batch is a validation row in the place that it had in its own batch, among rows of other
    batches, and its inputs from a cut on are those of another row. Before the cut the losses of its original targets
    must stay: the target at the cut is the original too, so that a leak by one token shows. The cuts are stratified
    over 1..T-1, with each of the last ten positions on top.
    """
    T, whole, rng = MAX_SEQ_LEN, len(rows) // batch, random.Random(PROBES)
    cuts = [1 + int((i + rng.random()) * (T - 1) / PROBES) for i in range(PROBES)] + list(range(T - 10, T))
    cuts += [rng.randint(1, T - 1) for _ in range(-len(cuts) % batch)]
    rng.shuffle(cuts)
    for cut in torch.tensor(cuts, device=rows.device).view(-1, batch, 1):
        index = torch.tensor([slot + batch * rng.randrange(whole) for slot in range(batch)], device=rows.device)
        other = (index + rng.randrange(1, len(rows))) % len(rows)
        past = torch.arange(T, device=rows.device) < cut
        inputs = torch.where(past, rows[index, :-1], rows[other, :-1])
        moved = (token_losses(model, rows[index], inputs) - losses[index]).abs() * past
        if moved.max() > allowed:
            slot, position = divmod(int(moved.argmax()), T)
            found = f"the prediction at position {position} moves by {moved.max():.3g} nat, more than {allowed:.3g}"
            where = f"when inputs from position {int(cut[slot])} on and other rows are replaced"
            raise MetricError(f"{found}, {where}; a model must see only the past of its own row")

# == 9. Experiment: one run, its clock and its watchdog ================================================================

_experiment: "Experiment | None" = None  # the one that is running

class Experiment:
    """One run of train.py: `with Experiment(description) as run:` around all of it.

    On entry the data is found, torch is seeded and the watchdog starts; `run.steps()` is the clock, evaluate_bpb stops
    it, `run.summary()` prints the result. On exit an error goes to stderr; `run.exit_code` is 0 if there is a score.
    """

    def __init__(self, description: str = ""):
        self.description = " ".join(description.split())
        self.clock_started = self.clock_stopped = 0.0
        self.val_bpb = self.eval_seconds = math.nan
        self.exit_code, self.ended = 1, threading.Event()

    def __enter__(self) -> "Experiment":
        global _experiment
        self.begun = time.perf_counter()
        try:
            if not re.fullmatch(r"\d{1,9}", seed := os.environ.get("SEED", "42")):
                raise TrainError(f"SEED is {seed!r}, not a whole number; unset it")
            check_constants()
            self.prepared = Prepared.active()
        except AutoresearchError as error:
            sys.exit(f"error: {error}")
        self.seed, self.device = int(seed), default_device()
        self.fingerprint = self.prepared.fingerprint(self.device)
        torch.manual_seed(self.seed)
        self.data_check = ThreadPoolExecutor(1).submit(self.prepared.verify)
        threading.Thread(target=self._watch, daemon=True).start()
        # for a hang that holds the interpreter, so that no thread runs
        faulthandler.dump_traceback_later(TIME_BUDGET + GRACE + 30, exit=True, file=sys.__stderr__)
        _experiment = self
        return self

    def _watch(self) -> None:
        if not self.ended.wait(TIME_BUDGET + GRACE):
            faulthandler.dump_traceback(file=sys.__stderr__)
            self._say(f"error: not done after {TIME_BUDGET + GRACE} s, the limit; the stacks above show where it hangs")
            os._exit(1)

    def steps(self) -> Iterator[tuple[int, float]]:
        """(step, progress) of every training step; progress is the used fraction of TIME_BUDGET, 0 to 1.

        Starts the clock. Ends before a step that, judged by the last one, would pass the budget. On CUDA the host runs
        at most one step ahead of the device. Raises PrepareError if a file of the corpus was altered.
        """
        self.data_check.result()
        self._synchronize()
        ahead = 1 if self.device.type == "cuda" else 0  # steps in flight when the next one is decided on
        events: deque = deque()
        self.clock_started, step_seconds = time.perf_counter(), 0.0
        now = self.clock_started
        for step in itertools.count():
            starts = now - self.clock_started + ahead * step_seconds
            if starts + step_seconds > TIME_BUDGET:
                return
            yield step, min(starts / TIME_BUDGET, 1.0)
            if ahead:
                events.append(torch.cuda.Event())
                events[-1].record()
                if len(events) > ahead:
                    events.popleft().synchronize()
            else:
                self._synchronize()
            before, now = now, time.perf_counter()
            step_seconds = now - before

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @property
    def training_seconds(self) -> float:
        return self.clock_stopped - self.clock_started

    def stop_clock(self) -> None:
        """End the training. Raises MetricError if it took too long, has no clock, was reseeded or is scored already."""
        if self.clock_stopped:
            raise MetricError("evaluate_bpb was called twice; a run has one score")
        if not self.clock_started:
            raise MetricError("evaluate_bpb was called before the clock started; train in `for ... in run.steps()`")
        self._synchronize()
        self.clock_stopped = time.perf_counter()
        if self.training_seconds > (limit := TIME_BUDGET + max(5, 0.02 * TIME_BUDGET)):
            raise MetricError(f"trained for {self.training_seconds:.1f} s, not {limit:.1f} at most; obey run.steps()")
        if (found := torch.initial_seed()) != self.seed:
            raise MetricError(f"torch's seed is {found}, not {self.seed}; leave seeds to the harness")
        check_constants()

    def summary(self, mfu_percent: float | str, total_tokens_M: float, num_steps: int, num_params_M: float, depth: int):
        """Print `---` and `key: value` lines: what train.py knows, and what was measured here."""
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

    def _say(self, message: str) -> None:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        global _experiment
        _experiment = None
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, AutoresearchError):
            self._say(f"error: {error}")
        elif isinstance(error, KeyboardInterrupt):
            self._say("error: interrupted, so there is no score; start the run again")
        elif error:
            lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
            self._say("\n".join(lines if len(lines) <= 30 else [*lines[:5], "  ...", *lines[-24:]]))
        elif math.isnan(self.val_bpb):
            self._say("error: the run ended without a score; call evaluate_bpb once, after the training")
        else:
            self.exit_code = 0
        return True

def check_constants() -> None:
    if changed := [f"{k} is {v}, not {_CONSTANTS[k]}" for k, v in constants().items() if v != _CONSTANTS[k]]:
        raise MetricError(f"a constant of prepare.py was changed: {', '.join(changed)}; leave it as it is")

def peak_memory_mb(device: torch.device) -> float:
    """Of the GPU; without CUDA, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

# == 10. Command line ==================================================================================================

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise PrepareError(f"{message}; see prepare.py --help")

def main(argv: list[str] | None = None) -> int:
    """Run the command line; after an error, which is one line on stderr, the exit code is 1."""
    parser = Parser(prog="prepare.py", description="Prepare a corpus for train.py, once.")
    default = SCALES[SCALE]["corpus"]
    about = f"climbmix, tinystories, python, or a folder of .parquet, .jsonl, .txt, .md (default here: {default})"
    parser.add_argument("--data", default=default, help=about)
    parser.add_argument("--num-shards", type=int, help="training shards of climbmix (default: 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="downloads at once (default: %(default)s)")
    try:
        options = parser.parse_args(argv)
        prepare(options.data, options.num_shards, options.download_workers)
        return 0
    except AutoresearchError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or CACHE}: {error.strerror or error}; make room there, or move AUTORESEARCH_CACHE"
    except KeyboardInterrupt:
        message = "interrupted; run prepare.py again to continue"
    print(f"error: {message}", file=sys.stderr)
    return 1

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # after an error a thread may still wait for the network

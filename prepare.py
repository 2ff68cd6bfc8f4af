"""The fixed ground of autoresearch: corpus, tokenizer, dataloader, metric, clock, notebook. Nobody edits this file.

    uv run prepare.py [--data climbmix|tinystories|python|DIR] [--num-shards N] [--download-workers N]
    uv run prepare.py --report

The first turns a corpus into what train.py reads, below ~/.cache/autoresearch, and continues after an interruption. The
second shows how a night of experiments went. B rows of a batch, T tokens of a row, V tokens of the vocabulary.
"""

import argparse
import base64
import contextlib
import faulthandler
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pyarrow.parquet
import requests
import rustbpe
import tiktoken
import torch
from tqdm import tqdm

# == 1. Constants ======================================================================================================
SCALES = {"full": (2048, 8192, 40 * 524_288, "climbmix"), "small": (256, 2048, 2**18, "tinystories")}
SCALE = os.environ.get("AUTORESEARCH_SCALE") or ("full" if torch.cuda.is_available() else "small")
if SCALE not in SCALES:
    sys.exit(f"error: AUTORESEARCH_SCALE is {SCALE!r}, not full or small; unset it or choose one of them")
MAX_SEQ_LEN, VOCAB_SIZE, EVAL_TOKENS, DEFAULT_CORPUS = SCALES[SCALE]  # tokens: in a row, different ones, to score
TIME_BUDGET, GRACE = 300, 300  # seconds: to train; to start and evaluate, then the watchdog ends the run
CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")
LAYOUT = [1, SCALE, MAX_SEQ_LEN, VOCAB_SIZE, EVAL_TOKENS]  # version and scale of a prepared folder
CLIMBMIX, CLIMBMIX_SHARDS = "datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6542  # and one for validation
TINYSTORIES = "datasets/karpathy/tinystories-gpt4-clean/resolve/main"
DOWNLOAD_ATTEMPTS, DOWNLOAD_TIMEOUT = 5, (10, 30)  # seconds to connect, seconds without a byte
SHARD_DOCUMENTS, VALIDATION_FRACTION = 2**14, 0.05  # of a shard that is built here; of a corpus that has no split
SPLIT_PATTERN = (  # GPT-4's, with numbers cut after two digits instead of three: the vocabulary is small
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")
TOKENIZER_CHARS, TOKENIZER_DOCUMENT_CHARS = 10**9, 10_000  # what the merges are learned from
DOCUMENT_CHARS = 100_000  # longer texts are cut first: tiktoken 0.14 panics on 1,000,000 spaces
PACKING_DOCUMENTS, PACKING_REFILL = 1000, 128  # held to choose from; appended at once when fewer are held
MIN_VALIDATION_ROWS, LOGITS_BYTES = 64, 2**31  # of float32 logits that the metric asks for at once
PROBES = 256  # (row, cut) pairs at least: a leak behind a rare token needs that many
HERE = Path(__file__).resolve().parent
RESULTS, COLUMNS = HERE / "results.tsv", "commit val_bpb memory_gb status description seed code fingerprint seconds"
SIGMA = 0.0007 if SCALE == "full" else 0.0045  # bpb between seeds, until two runs of one code tell
KEEP_SE = 0.25  # of the standard error, asked of a repeated gain; tests/test_verdict.py simulates what it brings
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
def published(path: Path) -> Iterator:
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

def locked(folder: Path, who: str = "prepare.py"):
    """The open file whose lock keeps every other one out. What a killed one left behind is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = open(folder / "lock", "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PrepareError(f"{folder}: another {who} is at work here; wait until it has ended") from None
    for path in list(folder.rglob("*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return file

def in_threads(work: Callable, items: Iterable, workers: int = os.cpu_count() or 1) -> dict:
    """{item: work(item)}; the first error, or Ctrl-C, ends it at once."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(work, item): item for item in items}
        return {futures[future]: future.result() for future in as_completed(futures)}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
def short_hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]

# == 3. Corpora: each becomes parquet shards, with a column `text`, of the splits train and val ========================
def texts(path: Path, name: str = "") -> Iterator[str]:
    """The rows of a parquet file, nulls as empty texts; broken UTF-8 is replaced."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise ValueError(f"no column 'text', only {file.schema_arrow.names}")
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            for raw in batch.column(0).cast("large_binary").to_pylist():
                yield (raw or b"").decode("utf-8", "replace")
    except (ValueError, OSError, NotImplementedError) as error:  # those of pyarrow are among them
        raise PrepareError(f"{name or path}: unusable parquet, {error}; replace it and run prepare.py again") from None

def download(source: str, paths: list[Path], workers: int = 1) -> list[Path]:
    """Fetch the parquet files that are not there yet; each is checked; one that breaks off is continued."""
    session, endpoint = requests.Session(), os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    again = {"backoff_factor": 0.5, "status_forcelist": (429, 500, 502, 503, 504), "retry_after_max": 60}
    for adapter in session.adapters.values():
        adapter.max_retries = requests.adapters.Retry(DOWNLOAD_ATTEMPTS - 1, **again)
    def fetch(path: Path) -> None:
        url, headers = f"{endpoint}/{source}/{path.name}", {"Accept-Encoding": "identity"}
        failed = f"{path.name}: {{}} ({url}); check the network and HF_ENDPOINT, then run prepare.py again"
        with published(path) as file:
            for attempt in range(DOWNLOAD_ATTEMPTS):
                time.sleep(0.5 * (2**attempt - 1))
                try:
                    response = session.get(url, stream=True, timeout=DOWNLOAD_TIMEOUT, headers=headers)
                    response.raise_for_status()
                except requests.RequestException as error:
                    raise PrepareError(failed.format(error)) from None
                part = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                file.truncate(file.seek(int(part[1]) if part else 0))
                length = file.tell() + int(response.headers.get("Content-Length", 0))
                progress.total = (progress.total or 0) + length - file.tell()
                with response, contextlib.suppress(requests.RequestException):
                    for block in response.iter_content(2**20):
                        progress.update(file.write(block))
                    file.flush()
                    return next(texts(Path(file.name), f"{path.name} from {url}"), None)
                headers |= {"Range": f"bytes={file.tell()}-", "If-Range": response.headers.get("ETag", '"unknown"')}
            raise PrepareError(failed.format(f"cut off at {file.tell()} of {length} bytes"))
    with bar(desc="download", unit="B") as progress:
        in_threads(fetch, [path for path in paths if not path.exists()], workers)
    return paths

def climbmix(folder: Path, num_shards: int, workers: int) -> dict[str, list[Path]]:
    """Published shards. The one that is pinned as validation comes first, so that no run finds it missing."""
    val, *train = [folder / "downloads" / f"shard_{i:05d}.parquet" for i in (CLIMBMIX_SHARDS, *range(num_shards))]
    return {"val": download(CLIMBMIX, [val]), "train": download(CLIMBMIX, train, workers)}

def tinystories(folder: Path) -> Iterator[tuple[str, str]]:
    """One published file with a suggested split: rows up to 9,999 are test data, up to 19,999 validation."""
    [path] = download(TINYSTORIES, [folder / "downloads" / "tinystories_gpt4_clean.parquet"])
    return (("val" if i < 20_000 else "train", text) for i, text in enumerate(texts(path)) if i >= 10_000)

def python(folder: Path) -> Iterator[tuple[str, str]]:
    """The Python sources here, cut at top-level definitions or line ends, once each, in the order of their hashes."""
    roots, pieces = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}, set()
    # packages of another environment can lie below the standard library
    paths = [path for root in roots for path in root.rglob("*.py") if "-packages" not in str(path.relative_to(root))]
    for path in bar(paths, desc="read", unit=" files"):
        with contextlib.suppress(UnicodeDecodeError, OSError):
            for piece in cut(path.read_text("utf-8"), r"(?<=\n\n)(?=@|class |def |async def )", 800):
                pieces.update(cut(piece, "\n", 800))
    return split_by_hash(sorted(pieces, key=content_hash))

def own_data(paths: list[Path]) -> Iterator[str]:
    """Documents of .parquet and .jsonl (field text), of .txt and .md, which are cut at blank lines."""
    for path in paths:
        line = 0
        try:
            if path.suffix == ".parquet":
                yield from texts(path)
            elif path.suffix == ".jsonl":  # JSON can spell lone surrogates, UTF-8 cannot
                for raw in path.open("rb"):
                    line += 1
                    yield json.loads(raw)["text"].encode("utf-8", "replace").decode()
            else:
                yield from cut(path.read_text("utf-8", "replace"), r"(?<=\n)\s*\n", 2000)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise PrepareError(f'{path}, line {line}: {error}; mend it (.jsonl wants {{"text": "..."}})') from None

def cut(text: str, boundary: str, chars: int) -> Iterator[str]:
    """Pieces of at least `chars` characters (the last may be shorter) that end at a boundary; none is blank."""
    start = 0
    for end in (*(match.end() for match in re.finditer(boundary, text)), len(text)):
        if (end - start >= chars or end == len(text)) and text[start:end].strip():
            yield text[start:end]
            start = end

def content_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

def split_by_hash(documents: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Documents with a hash in the lowest 5 % are validation, once each; what is added later moves none of them."""
    seen = set()
    for text in documents:
        if (key := content_hash(text)) >= VALIDATION_FRACTION * 2**64:
            yield "train", text
        elif key not in seen:
            seen.add(key)
            yield "val", text

def built(folder: Path, source: Callable) -> dict[str, list[Path]]:
    """Parquet files of SHARD_DOCUMENTS (split, text) each; the folder appears when all are complete, and then stays."""
    if not folder.exists():
        documents = (pair for pair in bar(source(folder.parent), desc="shards", unit=" documents") if pair[1])
        with tempfile.TemporaryDirectory(".tmp", dir=folder.parent) as temporary:
            for i, batch in enumerate(iter(lambda: list(itertools.islice(documents, SHARD_DOCUMENTS)), [])):
                for split in {split for split, _ in batch}:
                    table = pyarrow.table({"text": [text for name, text in batch if name == split]})
                    pyarrow.parquet.write_table(table, f"{temporary}/{split}_{i:05d}.parquet")
            os.replace(temporary, folder)
    return {split: sorted(folder.glob(f"{split}_*.parquet")) for split in ("train", "val")}

# == 4. Tokenizer and token cache: flat uint16 files, in which a document is BOS and its tokens ========================
class Tokenizer:
    """Byte-pair encoding: bytes and merges first, then SPECIAL_TOKENS. Learned by rustbpe, used through tiktoken."""
    def __init__(self, path: Path):
        self.bos = VOCAB_SIZE - len(SPECIAL_TOKENS)
        try:
            lines = [line.split() for line in path.read_bytes().splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except (OSError, ValueError):
            ranks = {}
        if list(ranks.values()) != list(range(self.bos)) or not {bytes([i]) for i in range(256)} < ranks.keys():
            raise PrepareError(f"{path}: no tokenizer of {VOCAB_SIZE:,}; delete it and run prepare.py again")
        special = {name: self.bos + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding("bpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        # int64 (V,), from the raw bytes: a lone byte >= 0x80 decodes to U+FFFD, which is three
        self.token_bytes = torch.tensor([*map(len, ranks), *[0] * len(special)])
    @classmethod
    def from_directory(cls, directory: Path | None = None) -> "Tokenizer":
        return cls((Prepared.read(Path(directory)) if directory else Prepared.active()).tokenizer)
    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Token ids of a text, a list of them for a list; `prepend` is an id or the name of a special token."""
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        ids = [token for piece in self.encode_pieces(text) for token in piece.tolist()]
        if prepend is not None:
            ids.insert(0, self.encoding.encode_single_token(prepend) if isinstance(prepend, str) else prepend)
        return ids
    def encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """Token ids, uint32, of each DOCUMENT_CHARS characters; lone surrogates, which UTF-8 has not, become ?."""
        for start in range(0, len(text), DOCUMENT_CHARS):
            piece = text[start : start + DOCUMENT_CHARS].encode("utf-8", "replace").decode()
            yield self.encoding.encode_to_numpy(piece, disallowed_special=())
    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))
    def get_vocab_size(self) -> int:
        return VOCAB_SIZE
    def get_bos_token_id(self) -> int:
        return self.bos

def train_tokenizer(paths: list[Path], target: Path) -> None:
    """Learn merges from the beginnings of the first documents; write tiktoken's format, base64(token) and rank."""
    rows = bar(itertools.chain.from_iterable(map(texts, paths)), desc="tokenizer", unit=" documents")
    beginnings = (text[:TOKENIZER_DOCUMENT_CHARS] for text in rows)
    counted = itertools.accumulate(beginnings, lambda sum, text: (sum[0] + len(text), text), initial=(0, ""))
    first = (text for _, text in itertools.takewhile(lambda item: item[0] <= TOKENIZER_CHARS, counted))
    learner = rustbpe.Tokenizer()
    learner.train_from_iterator(first, VOCAB_SIZE - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = learner.get_mergeable_ranks()
    if (found := len(ranks) + len(SPECIAL_TOKENS)) != VOCAB_SIZE:
        raise PrepareError(f"the corpus yields {found:,} tokens, not {VOCAB_SIZE:,}; bring more varied text")
    with published(target) as file:
        file.writelines(b"%s %d\n" % (base64.b64encode(bytes(token)), rank) for token, rank in ranks)

def tokenize(shard: Path, target: Path, tokenizer: Tokenizer, progress: tqdm) -> None:
    """Write the documents of a shard; at the small scale in pieces of one row at most, T+1 tokens with BOS."""
    bos = np.array([tokenizer.get_bos_token_id()], "<u2").tobytes()
    limit = MAX_SEQ_LEN if SCALE == "small" else DOCUMENT_CHARS * 4  # a character has at most four tokens
    with published(target) as file:
        for text in texts(shard):
            for ids in tokenizer.encode_pieces(text):
                for start in range(0, len(ids), limit):
                    file.write(bos + ids[start : start + limit].astype("<u2").tobytes())
            progress.update()

def documents(paths: list[Path], bos: int, epochs: Iterable[int]) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, epoch) of every document, uint16 views of the mapped files: BOS is at its start and nowhere else."""
    shards = [np.asarray(np.memmap(path, "<u2", "r")) for path in paths if path.stat().st_size]
    for epoch in epochs:
        for tokens in shards:
            starts = np.flatnonzero(tokens == bos).tolist()
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                yield tokens[start:end], epoch

# == 5. Packing and the dataloader =====================================================================================
class Packer:
    """Fills rows of `capacity` tokens with documents: the longest that fits, the earliest among equals; if none fits,
    the shortest (again the earliest) is cropped. While fewer than 1000 are held, the next 128 are appended. The choice
    is O(1): a FIFO for each length, and an integer as the set of the lengths held.
    """
    def __init__(self, documents: Iterator[tuple[np.ndarray, int]], capacity: int):
        self.documents, self.capacity, self.epoch, self.held = documents, capacity, 0, 0
        self.fifos, self.lengths = defaultdict(deque), 0  # bit n is set if fifos[n] is not empty
    def fill(self, row: np.ndarray) -> bool:
        """Fill an integer array of `capacity` tokens; False if the documents ran out."""
        room = self.capacity
        while room:
            while self.held < PACKING_DOCUMENTS and (more := list(itertools.islice(self.documents, PACKING_REFILL))):
                for document, self.epoch in more:
                    self.fifos[len(document)].append(document)
                    self.lengths |= 1 << len(document)
                self.held += len(more)
            if not self.held:
                return False
            fitting = self.lengths & ((2 << room) - 1)
            n = (fitting or self.lengths & -self.lengths).bit_length() - 1  # the highest that fits, else the lowest
            document = self.fifos[n].popleft()[:room]
            if not self.fifos[n]:
                self.lengths ^= 1 << n
            self.held -= 1
            start, room = self.capacity - room, room - len(document)
            row[start : start + len(document)] = document
        return True

def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str = "train", device=None) -> Iterator[tuple]:
    """Endless (inputs, targets, epoch), int64 (B, T); TrainError if drawn before the clock of an Experiment starts."""
    if split != "train":
        raise PrepareError(f"there is no split {split!r} to draw from, only 'train'; evaluate_bpb scores the other one")
    packer = Packer(documents(Prepared.active().tokens, tokenizer.get_bos_token_id(), itertools.count(1)), T + 1)
    cuda = (device := torch.device(device or default_device())).type == "cuda"
    # a buffer is refilled only after its copy, which can be queued behind a whole backward pass
    shape, event = {"size": (B, T + 1), "dtype": torch.int64, "pin_memory": cuda}, torch.cuda.Event if cuda else int
    slots = [(torch.empty(**shape), event()) for _ in range(3)]
    def batches() -> Iterator[tuple]:
        for buffer, copied in itertools.cycle(slots):
            if _experiment and not _experiment.clock_started:
                raise TrainError("training data was drawn before the clock; use random tokens, draw in run.steps()")
            if cuda:
                copied.synchronize()
            for row in buffer.numpy():
                packer.fill(row)
            rows = buffer.to(device, non_blocking=cuda)
            if cuda:
                copied.record()
            yield rows[:, :-1].clone(), rows[:, 1:].clone(), packer.epoch
    return batches()

def validation_rows(paths: list[Path], bos: int) -> np.ndarray:
    """uint16 (rows, T+1): EVAL_TOKENS worth of rows, or as many as the split fills once."""
    packer = Packer(documents(paths, bos, [1]), MAX_SEQ_LEN + 1)
    rows = np.empty((EVAL_TOKENS // MAX_SEQ_LEN, MAX_SEQ_LEN + 1), "<u2")
    rows = rows[: sum(1 for _ in itertools.takewhile(packer.fill, rows))]
    if len(rows) < MIN_VALIDATION_ROWS:
        raise PrepareError(f"the val split fills {len(rows)} rows of the {MIN_VALIDATION_ROWS} needed; bring more text")
    return rows

# == 6. The prepared folder ============================================================================================
class Prepared:
    """A prepared folder, as its manifest has it; `files` are {path: [length, sha256]}."""
    @classmethod
    def read(cls, folder: Path) -> "Prepared":
        self = cls()
        try:
            self.folder, self.manifest = folder, json.loads((folder / "manifest.json").read_text())
            self.files = {folder / name: entry for name, entry in self.manifest["files"].items()}
            self.tokenizer, self.validation = (folder / self.manifest[name] for name in ("tokenizer", "validation"))
            self.tokens = [folder / name for name in self.manifest["train"]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise PrepareError(f"{folder}: no usable manifest ({error}); run prepare.py again") from None
        if self.manifest["layout"] != LAYOUT:
            raise PrepareError(f"{folder}: made for {self.manifest['layout']}, not {LAYOUT}; run prepare.py again")
        return self
    @classmethod
    @functools.cache
    def active(cls) -> "Prepared":
        try:
            return cls.read(CACHE / (CACHE / f"active-{SCALE}").read_text())
        except FileNotFoundError:
            raise PrepareError(f"nothing is prepared for {SCALE} in {CACHE}; run: uv run prepare.py (--help)") from None
    @functools.cached_property
    def rows(self) -> np.ndarray:  # uint16 (rows, T+1)
        return np.fromfile(self.validation, "<u2").reshape(-1, MAX_SEQ_LEN + 1)
    def verify(self) -> None:
        """Raise PrepareError if a file that a score depends on is not what prepare.py wrote."""
        for path in (self.tokenizer, self.validation, *self.tokens):
            if not path.exists() or file_hash(path) != self.files[path][1]:
                raise PrepareError(f"{path}: altered, not as in the manifest; delete it and run prepare.py again")
        self.rows.setflags(write=False)  # they are read now: until the evaluation, a prepare.py may replace the file
    def fingerprint(self, device: torch.device) -> str:
        """Two scores may be compared only if this is equal."""
        data = [self.files[path][1] for path in (self.validation, self.tokenizer)]
        return short_hash(file_hash(Path(__file__)), constants(), data, torch.__version__, device_name(device))

def default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = sys.platform == "linux" and re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else os.uname().machine} {device.type}, {torch.get_num_threads()} threads"

def prepare(data: str, num_shards: int | None, download_workers: int) -> None:
    """Bring a corpus into the cache, as far as it is not there yet, and make it the active one."""
    sources = {"climbmix": None, "tinystories": tinystories, "python": python}
    name, state = data, 10 if num_shards is None else num_shards
    if data != "climbmix" and num_shards is not None:
        raise PrepareError(f"--num-shards is for climbmix, not for {data}; leave it out, or add --data climbmix")
    for option, value, most in ("num-shards", state, CLIMBMIX_SHARDS), ("download-workers", download_workers, 100):
        if not 1 <= value <= most:
            raise PrepareError(f"--{option} is {value}, not 1 to {most}; choose one of these")
    if data not in sources:
        if not os.path.isdir(data):
            raise PrepareError(f"--data {data}: neither {', '.join(sources)} nor a folder; choose one of these")
        own, types = Path(data).resolve(), (".parquet", ".jsonl", ".txt", ".md")
        files = sorted(path for path in own.rglob("*") if path.suffix in types and path.is_file())
        name = f"{own.name}-{short_hash(str(own))}"
        state = short_hash([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    with locked(folder := CACHE / f"{name}-{SCALE}"):
        if not (current := is_current(folder, request := [name, state])):
            if data == "climbmix":
                shards = climbmix(folder, state, download_workers)
            elif data in sources:
                shards = built(folder / "shards", sources[data])
            else:
                shards = built(folder / f"shards-{state}", lambda _: split_by_hash(own_data(files)))
            derive(folder, request, shards)
        with published(folder / "active") as file:
            file.write(folder.name.encode())
        os.replace(folder / "active", CACHE / f"active-{SCALE}")
        prepared = Prepared.read(folder)
    tokens = sum(prepared.files[path][0] for path in prepared.tokens) // 2
    print(f"data: {tokens:,} training tokens; {prepared.manifest['validation_rows']}")
    print(f"ready: {folder}, fingerprint {prepared.fingerprint(default_device())}{', nothing to do' * current}")

def is_current(folder: Path, request: list) -> bool:
    """Whether the folder holds what `request` asks for; a file of another length is removed, to be made again."""
    try:
        prepared = Prepared.read(folder)
    except PrepareError:
        return False
    damaged = [path for path, (n, _) in prepared.files.items() if not path.exists() or path.stat().st_size != n]
    for path in damaged:  # shards are built together
        shards = path.parent.name.startswith("shards")
        shutil.rmtree(path.parent, ignore_errors=True) if shards else path.unlink(missing_ok=True)
    return not damaged and prepared.manifest["request"] == request

def derive(folder: Path, request: list, shards: dict[str, list[Path]]) -> None:
    """Tokenizer, token files and validation rows from a folder's shards, then the manifest that vouches for them."""
    if not all(shards.values()):
        raise PrepareError("the corpus has too few documents for a training and a validation split; bring more text")
    hashes = in_threads(file_hash, [*shards["val"], *shards["train"]])
    print(f"corpus: {request[0]}, {len(hashes)} shards", flush=True)
    # the names say what a file was made from, so that another vocabulary or corpus never finds an old one
    made_from = short_hash(VOCAB_SIZE, SPLIT_PATTERN, TOKENIZER_CHARS, [hashes[path] for path in shards["train"]])
    if not (tokenizer_path := folder / "tokens" / f"tokenizer-{made_from}.txt").exists():
        train_tokenizer(shards["train"], tokenizer_path)
    tokenizer, suffix = Tokenizer(tokenizer_path), file_hash(tokenizer_path)[:8]
    print(f"tokenizer: {tokenizer.get_vocab_size():,} tokens", flush=True)
    targets = {path: tokenizer_path.with_name(f"{path.stem}-{hashes[path][:8]}-{suffix}.bin") for path in hashes}
    with bar(desc="tokens", unit=" documents") as progress:
        missing = [path for path in targets if not targets[path].exists()]
        in_threads(lambda path: tokenize(path, targets[path], tokenizer, progress), missing)
    rows = validation_rows([targets[path] for path in shards["val"]], tokenizer.get_bos_token_id())
    with published(rows_path := tokenizer_path.with_name("validation.bin")) as file:
        file.write(rows.tobytes())
    hashes |= in_threads(file_hash, [tokenizer_path, rows_path, *targets.values()])
    names = {path: str(path.relative_to(folder)) for path in hashes}
    manifest = {
        "layout": LAYOUT,
        "request": request,
        "tokenizer": names[tokenizer_path],
        "validation": names[rows_path],
        "validation_rows": f"{len(rows):,} validation rows of {tokenizer.token_bytes[rows[:, 1:]].sum():,} bytes",
        "train": [names[targets[path]] for path in shards["train"]],
        "files": {names[path]: [path.stat().st_size, sha] for path, sha in hashes.items()},
        "versions": {package.__name__: package.__version__ for package in (torch, tiktoken, pyarrow, np)},
    }
    with published(folder / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())
    for path in {*tokenizer_path.parent.iterdir(), *folder.glob("shards-*")} - {*hashes, shards["val"][0].parent}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()  # of an older corpus

# == 7. Metric =========================================================================================================
@torch.no_grad()
def evaluate_bpb(model: Callable, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of the validation rows: cross-entropies in nats / (ln 2 * bytes of the targets), both summed.

    `model(inputs)` gets int64 (B, T) and returns logits (B, T, V). The number does not depend on `batch_size`, which is
    halved where memory runs out. Targets of no bytes (special tokens) are left out. Inside an Experiment this ends the
    training. MetricError if the logits are not finite or of another shape, or if a probe fails.
    """
    if experiment := _experiment:
        experiment.stop_clock()
    device = next((p.device for p in getattr(model, "parameters", list)()), default_device())
    rows = torch.from_numpy(Prepared.active().rows.astype(np.int64)).to(device)
    batch = min(batch_size, LOGITS_BYTES // (4 * MAX_SEQ_LEN * VOCAB_SIZE), len(rows) // 2)  # probe needs two batches
    if training := getattr(model, "training", False):
        model.eval()
    losses = None
    while losses is None:
        if not batch:
            raise MetricError("out of memory with a single validation row; make the model smaller")
        with contextlib.suppress(torch.OutOfMemoryError):
            losses = score(model, rows, batch)
        batch //= 2
    if training:
        model.train()
    token_bytes = tokenizer.token_bytes.to(device)[rows[:, 1:]]
    val_bpb = losses[token_bytes > 0].cpu().double().sum().item() / (math.log(2) * token_bytes.sum().item())
    if experiment:
        experiment.val_bpb, experiment.eval_seconds = val_bpb, time.perf_counter() - experiment.clock_stopped
    return val_bpb

def score(model: Callable, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Losses, float32 (rows, T) in nats, of a model that stands the probes."""
    # full batches of one shape, so that nothing is compiled twice: the last one is filled up with the first rows
    index = torch.arange(-(-len(rows) // batch) * batch, device=rows.device) % len(rows)
    first, *others = rows[index].split(batch)
    def ask_again(allowed: float, complaint: str) -> float:
        if (moved := (token_losses(model, first) - losses[:batch]).abs().max().item()) > allowed:
            raise MetricError(f"{complaint} by {moved:.3g} nat, more than {allowed:.3g}")
        return moved
    losses = token_losses(model, first)
    noise = ask_again(NOISE_LIMIT, "two identical calls of the model differ")
    losses = torch.cat([losses, *(token_losses(model, other) for other in others)])
    learning = max(TOLERANCE, 3 * noise), "the evaluation must leave the model as it is, but the same rows moved"
    ask_again(*learning)
    probe(model, rows, losses[: len(rows)], batch, max(TOLERANCE, 10 * noise))
    ask_again(*learning)
    return losses[: len(rows)]

def token_losses(model: Callable, rows: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropies, float32 (B, T) in nats, of rows (B, T+1), given other inputs than their own if there are any."""
    inputs = rows[:, :-1].clone() if inputs is None else inputs  # no view: the last target is out of the model's reach
    logits, want = model(inputs), (*inputs.shape, VOCAB_SIZE)
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != want:
        raise MetricError(f"model(inputs) returned {found}, not logits of shape {want}; the metric computes the loss")
    if not all(map(math.isfinite, torch.aminmax(logits))):
        raise MetricError("the model's logits are not finite; look for an overflow or a division by zero")
    few = max(1, 2**22 // (MAX_SEQ_LEN * VOCAB_SIZE))  # rows at a time, so that the float32 copies stay small
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    parts = zip(logits.split(few), rows[:, 1:].split(few), strict=True)
    return torch.cat([loss(x.flatten(0, 1).float(), y.flatten()) for x, y in parts]).view(inputs.shape)

def probe(model: Callable, rows: torch.Tensor, losses: torch.Tensor, batch: int, allowed: float) -> None:
    """Raise MetricError if the future, or another row, moves a loss by more than `allowed` nat.

    Each row keeps its place in the batch, among other rows, and has the inputs of another one from the cut on. Its own
    target at the cut is scored too, so that a leak by one token shows. Of the rows that have a place, the one is taken
    with the commonest token before the cut that no other had, for leaks that only one token opens.
    """
    T, rng, tokens = MAX_SEQ_LEN, np.random.default_rng(PROBES), rows.cpu().numpy()
    worth = np.bincount(tokens.ravel(), minlength=VOCAB_SIZE).astype(float)
    def pick(place: int, cut: int) -> int:
        candidates = place + batch * rng.permutation(len(rows) // batch)
        row = candidates[worth[tokens[candidates, cut - 1]].argmax()]
        worth[tokens[row, cut - 1]] *= 1e-6
        return row
    # stratified over 1..T-1, and the last ten positions on top
    stratified = 1 + ((np.arange(PROBES) + rng.random(PROBES)) * (T - 1) / PROBES).astype(int)
    cuts = rng.permutation([*stratified, *range(T - 10, T)])
    for cut in np.resize(cuts, (-(-len(cuts) // batch), batch, 1)):  # filled up with the first ones
        index = np.array([pick(place, position) for place, position in enumerate(cut[:, 0])])
        other = (index + rng.integers(1, len(rows))) % len(rows)
        index, other, past = (torch.from_numpy(x).to(rows.device) for x in (index, other, np.arange(T) < cut))
        inputs = torch.where(past, rows[index, :-1], rows[other, :-1])
        moved = (token_losses(model, rows[index], inputs) - losses[index]).abs() * past
        if moved.max() > allowed:
            slot, position = divmod(int(moved.argmax()), T)
            found = f"the prediction at position {position} moves by {moved.max():.3g} nat, more than {allowed:.3g}"
            where = f"when inputs from position {int(cut[slot, 0])} on and other rows are replaced"
            raise MetricError(f"{found}, {where}; a model must see only the past of its own row")

# == 8. Notebook: every run is a row of results.tsv and a commit under refs/autoresearch ===============================
def judge(candidate: list[float], incumbent: list[float], sigma: float) -> tuple[str, float, float]:
    """Status (`keep`, `discard` or `maybe`), gain and its standard error, in bits per byte; a gain is positive.

    The lists hold val_bpb, one a seed, in the order of the runs. gain = mean(incumbent) - mean(candidate), se = sigma *
    sqrt(1 / n_incumbent + 1 / n_candidate). Every run of the incumbent counts, of the candidate the first two, so that
    nobody reruns it until it wins. A gain must repeat.
    """
    candidate = candidate[:2]
    gain = sum(incumbent) / len(incumbent) - sum(candidate) / len(candidate)
    se = sigma * math.sqrt(1 / len(incumbent) + 1 / len(candidate))
    repeated = "keep" if gain >= KEEP_SE * se else "discard"
    return "discard" if gain <= 0 else repeated if len(candidate) == 2 else "maybe", gain, se

def pooled_sigma(groups: Iterable[list[float]], default: float) -> float:
    """Standard deviation between seeds: squares about each group's own mean over n - 1; `default` without any."""
    squares = [(value - sum(group) / len(group)) ** 2 for group in groups for value in group]
    freedom = len(squares) - sum(map(bool, groups))
    return math.sqrt(sum(squares) / freedom) if freedom else default

def cause(error: Exception) -> str:
    return (getattr(error, "stderr", b"") or str(error).encode()).decode("utf-8", "replace").split("\n")[0]

def git(*command: str, input: bytes | None = None, env: dict | None = None) -> str:
    """What a git command prints, run in this folder; raises CalledProcessError."""
    options = {"input": input, "env": os.environ | (env or {}), "cwd": HERE, "check": True, "capture_output": True}
    return subprocess.run(["git", *command], **options).stdout.decode("utf-8", "replace").strip()

_FIELDS = (r"\w{4,40}", r"\d+\.\d{6}|nan", r"\d+\.\d", "[a-z]+", r"[^\t\r\n\ufffd]*", r"\d+", r"\w{12}", r"\w+", r"\d+")
ROW = re.compile("^" + r"\t".join(f"({field})" for field in _FIELDS) + r"\r?\n", re.ASCII | re.MULTILINE)

def read_results(set_aside: bool = False) -> list[dict[str, str]]:
    """The rows of results.tsv. What is no row is reported, and with `set_aside` moved away together with its file."""
    text = RESULTS.read_bytes().decode("utf-8", "replace") if RESULTS.exists() else results_text([])
    rows = [dict(zip(COLUMNS.split(), match.groups(), strict=True)) for match in ROW.finditer(text)]
    if text != (sound := results_text(rows)):
        pairs = enumerate(itertools.zip_longest(text.split("\n"), sound.split("\n")), 1)
        line = next(number for number, (found, want) in pairs if found != want)
        print(f"note: {RESULTS.name} is damaged in line {line}; its {len(rows)} good rows are used", flush=True)
        if set_aside:
            RESULTS.rename(aside := RESULTS.with_name(f"{RESULTS.name}.damaged-{time.time_ns()}"))
            print(f"note: the damaged file is {aside.name} now", flush=True)
            write_results(rows)
    return rows

def results_text(rows: list[dict[str, str]]) -> str:
    return "".join("\t".join(fields) + "\n" for fields in (COLUMNS.split(), *(row.values() for row in rows)))
def write_results(rows: list[dict[str, str]]) -> None:
    with published(RESULTS) as file:
        file.write(results_text(rows).encode())

def scores(rows: list[dict[str, str]], fingerprint: str) -> dict[str, dict[int, float]]:
    """val_bpb of finished comparable runs: {code: {seed: first score}}, in the order in which they were run."""
    groups: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["fingerprint"] == fingerprint and row["val_bpb"] != "nan":
            groups[row["code"]].setdefault(int(row["seed"]), float(row["val_bpb"]))
    return dict(groups)

class Notebook:
    """The row and the commit of one run. Branch, index and work tree are never touched. Raises what git() raises."""
    def __init__(self, description: str, fingerprint: str, seed: str | None):
        self.head, self.incumbent, ground = git("rev-parse", "HEAD", "HEAD:./train.py", "HEAD:./prepare.py").split()
        if ground != git("hash-object", "prepare.py"):
            raise PrepareError("prepare.py differs from HEAD's, scores would not compare; git stash push -q prepare.py")
        folder = Path(git("rev-parse", "--absolute-git-dir"), "autoresearch")
        self.lock = locked(folder, "run")  # one in a work tree
        for left_by_a_killed_run in folder / "index.lock", *HERE.glob(f"{RESULTS.name}.*.tmp"):
            left_by_a_killed_run.unlink(missing_ok=True)
        source, running = (HERE / "train.py").read_bytes(), [frame.f_code for frame, _ in traceback.walk_stack(None)]
        if compile(source, "train.py", "exec", dont_inherit=True) not in running:
            raise TrainError("train.py was edited while this run started, so it is not what runs; run it again")
        self.code = git("hash-object", "-w", "--path", "train.py", "--stdin", input=source)
        self.is_baseline, self.fingerprint = self.code == self.incumbent, fingerprint
        self.description = description or ("baseline" if self.is_baseline else "-")
        self.rows = read_results(set_aside=True)
        for row in self.rows:
            row["status"] = row["status"].replace("running", "killed")  # nothing runs: the lock is ours
        self.done = scores(self.rows, fingerprint)
        mine = self.done.get(self.code[:12], {})
        self.seed = int(seed or next(n for n in itertools.count(42) if n not in mine))
        self.remedy = self.find_remedy()
        if others := git("diff", "--name-only", "HEAD", "--", ":/", ":!train.py"):
            print("note: other edits are left alone:", " ".join(others.split("\n"))[:200])
        if self.remedy:
            print(f"note: HEAD's train.py has no score, so this run cannot be judged; {self.remedy}")
        env, mode = {"GIT_INDEX_FILE": str(folder / "index")}, git("ls-tree", self.head, "train.py").split()[0]
        git("read-tree", self.head, env=env)
        git("update-index", "--cacheinfo", f"{mode},{self.code},{git('rev-parse', '--show-prefix')}train.py", env=env)
        self.tree = git("write-tree", env=env)
        # this commit is the last word only if the run is killed
        commit = self.commit(f"val_bpb nan (killed): {self.description}\n\nThe run was ended from outside.")
        fields = (commit, "nan", "0.0", "running", self.description, str(self.seed), self.code[:12], fingerprint, "0")
        self.row = dict(zip(COLUMNS.split(), fields, strict=True))
        self.rows.append(self.row)
        write_results(self.rows)
    def find_remedy(self) -> str:
        """The command that gives this run something to be judged by; empty if it is a first baseline, or has it."""
        code = self.incumbent[:12]
        if code in self.done:
            return ""
        older = git("log", "-n", "1000", "--format=%h").split()[1:]
        blobs = git("cat-file", "--batch-check", input="".join(f"{h}:./train.py\n" for h in older).encode())
        for commit, blob in zip(older, blobs.splitlines(), strict=False):
            if blob[:12] in self.done:  # somebody committed by hand
                return f"git reset --soft {commit}"
        tried = [row["status"] for row in self.rows if (row["code"], row["fingerprint"]) == (code, self.fingerprint)]
        if self.is_baseline or {*tried} - {"killed"}:  # where all of HEAD's runs failed, any score is a beginning
            return ""
        return "git stash push -q train.py && { uv run train.py baseline; git stash pop -q; }"
    def commit(self, message: str) -> str:
        """Make a commit that only a ref under refs/autoresearch holds; its short hash."""
        command = ("commit-tree", self.tree, "-p", self.head, "-F", "-")
        text = message.replace("\0", "").encode("utf-8", "replace")
        try:
            commit = git(*command, input=text)
        except subprocess.CalledProcessError:  # nobody has an identity here
            names = "GIT_AUTHOR_NAME GIT_AUTHOR_EMAIL GIT_COMMITTER_NAME GIT_COMMITTER_EMAIL".split()
            commit = git(*command, input=text, env=dict.fromkeys(names, "autoresearch"))
        short = git("rev-parse", "--short", commit)
        git("update-ref", f"refs/autoresearch/{short}", commit)
        return short
    def settle(self, status: str, subject: str, body: str) -> None:
        stand_in = self.row["commit"]
        self.row |= {"commit": self.commit(f"val_bpb {subject}: {self.description}\n\n{body}"), "status": status}
        write_results(self.rows)
        git("update-ref", "-d", f"refs/autoresearch/{stand_in}")
    def verdict(self) -> tuple[str, str, str]:
        """Status, the number in the commit's subject and a line of reasons, for a run that has a score."""
        groups = {code: list(seeds.values()) for code, seeds in scores(self.rows, self.fingerprint).items()}
        mine, theirs, score = groups[self.code[:12]], groups.get(self.incumbent[:12]), self.row["val_bpb"]
        if self.remedy:
            return "unjudged", f"{score} (unjudged)", "HEAD's train.py has no score to compare with"
        if self.is_baseline:
            reason = f"this is HEAD's train.py, mean {sum(mine) / len(mine):.6f} of {len(mine)} run(s)"
            return "baseline" if self.code[:12] in self.done else "keep", score, reason
        if not theirs:
            return "keep", f"{score} (first score)", "HEAD's train.py never had a score"
        status, gain, se = judge(mine, theirs, pooled_sigma(groups.values(), SIGMA))
        mine, seeds = mine[:2], "2 seeds" if mine[1:] else "1 seed"
        reason = f"gain {gain:+.6f}, standard error {se:.6f}, {seeds} against {len(theirs)}"
        return status, f"{sum(mine) / len(mine):.6f} ({-gain:+.6f}, {seeds})", reason
    def print_next(self, status: str) -> None:
        """Print the status and the command to run next, which destroys no edit that was not measured."""
        commit, moved = self.row["commit"], git("rev-parse", "HEAD") != self.head
        found = git("hash-object", "train.py") if (HERE / "train.py").exists() else ""
        staged = [line.split()[1] for line in git("ls-files", "-s", "train.py").splitlines()]
        edits = {found, *staged} - {self.code, self.incumbent, git("rev-parse", "HEAD:./train.py"), ""}
        command = {
            "keep": f"git merge -q --ff-only --autostash {commit}",
            "maybe": f"uv run train.py {shlex.quote(self.description)}",
            "unjudged": self.remedy,
        }.get(status, "# edit train.py" if self.is_baseline else "git restore -SW train.py")
        if moved or edits or found != self.code:
            what = "HEAD moved" if moved else "train.py was edited"
            print(f"{what} during the run; the next command brings back what was measured")
            then = f" && {command}" if status in ("keep", "maybe") and not moved else ""
            command = f"{'git stash push -q train.py && ' if edits else ''}git restore -s {commit} train.py{then}"
        print(f"status: {status:<11} next: {command}", flush=True)

# == 9. Experiment: one run, its clock and its watchdog ===============================================================
_experiment: "Experiment | None" = None  # the one that is running

class Experiment:
    """One run of train.py: `with Experiment(description) as run:` around all of it.

    run.steps() is the clock, evaluate_bpb stops it, run.summary() prints the result. If the program is train.py in git,
    row, commit and verdict come on exit. `run.exit_code` is 0 if there is a score.
    """
    def __init__(self, description: str = ""):
        self.description = " ".join(description.encode("utf-8", "replace").decode().replace("\ufffd", "?").split())
        self.begun, self.device, self.seed = time.perf_counter(), default_device(), 42
        self._synchronize = torch.accelerator.synchronize if self.device.type != "cpu" else lambda: None
        self.clock_started = self.clock_stopped = 0.0
        self.val_bpb = self.startup_seconds = self.training_seconds = self.eval_seconds = math.nan
        self.exit_code, self.ended, self.finishing = 1, threading.Event(), threading.Lock()
        self.notebook, self.fingerprint, self.known = None, "none", {}
    def __enter__(self) -> "Experiment":
        global _experiment
        try:
            self._begin()
        except BaseException:
            self.__exit__(*sys.exc_info())
            sys.exit(1)
        _experiment = self
        return self
    def _begin(self) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        prepared, seed = Prepared.active(), os.environ.get("SEED")
        self.fingerprint = prepared.fingerprint(self.device)
        if seed is not None and not re.fullmatch(r"\d{1,9}", seed):
            raise TrainError(f"SEED is {seed!r}, not a whole number; unset it")
        self.seed = int(seed or self.seed)
        if Path(sys.argv[0]).resolve() == HERE / "train.py":
            try:
                self.notebook = Notebook(self.description, self.fingerprint, seed)
                self.seed = self.notebook.seed
            except (OSError, subprocess.CalledProcessError) as error:
                if "HEAD:./train.py" not in getattr(error, "cmd", ()) and getattr(error, "filename", "") != "git":
                    raise TrainError(f"the run cannot be recorded: {cause(error)}; mend that, then run again") from None
                print(f"note: the score is printed and not recorded: {cause(error)}")
        check_constants()
        torch.manual_seed(self.seed)
        self.data_check = ThreadPoolExecutor(1).submit(prepared.verify)
        threading.Thread(target=self._watch, daemon=True).start()
        # for a hang that holds the interpreter, so that no thread runs; the next start settles its row
        faulthandler.dump_traceback_later(TIME_BUDGET + GRACE + 30, exit=True, file=sys.__stderr__)
    def _watch(self) -> None:
        if not self.ended.wait(TIME_BUDGET + GRACE):
            faulthandler.dump_traceback(file=sys.__stderr__)
            self._finish("timeout", f"error: not done in {TIME_BUDGET + GRACE} s; the stacks above show where it hangs")
            os._exit(self.exit_code)
    def steps(self) -> Iterator[tuple[int, float]]:
        """(step, progress) of every training step; progress is the used fraction of TIME_BUDGET, 0 to 1. Ends before a
        step that, judged by the last one, would pass the budget. On CUDA the host runs at most one step ahead of the
        device. Raises PrepareError if a file of the corpus was altered.
        """
        if self.clock_started:
            raise MetricError("run.steps() was called twice; a run has one clock")
        self.data_check.result()
        self._synchronize()
        ahead = int(self.device.type == "cuda")  # steps in flight when the next one is decided on
        step_seconds, this = 0.0, None
        now = self.clock_started = time.perf_counter()
        self.startup_seconds = now - self.begun
        for step in itertools.count():
            starts = now - self.clock_started + ahead * step_seconds
            if starts + step_seconds > TIME_BUDGET:
                return
            yield step, min(starts / TIME_BUDGET, 1.0)
            if ahead:
                last, this = this, torch.cuda.current_stream().record_event()
                if last:
                    last.synchronize()
            else:
                self._synchronize()
            before, now = now, time.perf_counter()
            step_seconds = now - before
    def stop_clock(self) -> None:
        """End the training. Raises MetricError if it took too long, has no clock, was reseeded or is scored already."""
        if self.clock_stopped:
            raise MetricError("evaluate_bpb was called twice; a run has one score")
        if not self.clock_started:
            raise MetricError("evaluate_bpb was called before the clock started; train in `for ... in run.steps()`")
        self._synchronize()
        self.clock_stopped = time.perf_counter()
        self.training_seconds = self.clock_stopped - self.clock_started
        if self.training_seconds > (limit := TIME_BUDGET + max(5, 0.02 * TIME_BUDGET)):
            raise MetricError(f"trained for {self.training_seconds:.1f} s, not {limit:.1f} at most; obey run.steps()")
        if (found := torch.initial_seed()) != self.seed:
            raise MetricError(f"torch's seed is {found}, not {self.seed}; leave seeds to the harness")
        check_constants()
    def summary(self, mfu_percent="n/a", total_tokens_M="n/a", num_steps="n/a", num_params_M="n/a", depth="n/a"):
        """Print `---` and the result, as `key: value` lines: what train.py knows, and what was measured here."""
        mfu = mfu_percent if isinstance(mfu_percent, str) else f"{mfu_percent:.2f}"
        self.known = {"mfu_percent": mfu, "total_tokens_M": total_tokens_M, "num_steps": num_steps}
        self.known |= {"num_params_M": num_params_M, "depth": depth}
        print("---", self._lines(), sep="\n", flush=True)
    def _lines(self) -> str:
        values = {"val_bpb": f"{self.val_bpb:.6f}", "training_seconds": self.training_seconds}
        values |= {"total_seconds": time.perf_counter() - self.begun, "peak_vram_mb": peak_memory_mb(self.device)}
        values |= {**self.known, "startup_seconds": self.startup_seconds, "eval_seconds": self.eval_seconds}
        values |= {"seed": self.seed, "fingerprint": self.fingerprint}
        shown = {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in values.items()}
        return "\n".join(f"{key + ':':<18}{value}" for key, value in shown.items())
    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        if error is None and math.isnan(self.val_bpb):
            error = MetricError("the run ended without a score; call evaluate_bpb once, after the training")
        lines = [f"error: {error}"] if error else []
        failure = "invalid" if isinstance(error, MetricError) else "crash" if error else ""
        if isinstance(error, KeyboardInterrupt):
            lines, failure = ["error: interrupted, so there is no score; start the run again"], "killed"
        elif error and not isinstance(error, AutoresearchError):
            lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
            lines[5:-24] = ["  ..."] if len(lines) > 30 else lines[5:-24]
        self._finish(failure, "\n".join(lines))
        list(itertools.starmap(signal.signal, handlers.items()))
        return True
    def _finish(self, failure: str, message: str) -> None:
        global _experiment
        with self.finishing:
            if self.ended.is_set():
                return
            self.ended.set()
            _experiment, self.exit_code = None, int(bool(failure))
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):  # nobody may be there to read it
                sys.stdout.flush()
                print(message, file=sys.stderr, end="\n" if message else "", flush=True)
            if not (notebook := self.notebook):
                return
            row, status, subject, reason = notebook.row, failure, f"nan ({failure})", ""
            row["memory_gb"] = f"{peak_memory_mb(self.device) / 1024:.1f}"
            row["seconds"] = f"{time.perf_counter() - self.begun:.0f}"
            try:
                if not failure:
                    row["val_bpb"] = f"{self.val_bpb:.6f}"
                    status, subject, reason = notebook.verdict()
                notebook.settle(status, subject, f"{self._lines()}\n\n{message}")
            except (OSError, subprocess.CalledProcessError) as error:
                self.exit_code = 1
                print(f"error: not recorded: {cause(error)}; the next run settles the row", file=sys.stderr, flush=True)
            else:
                with contextlib.suppress(OSError, subprocess.CalledProcessError):
                    print(reason, end="\n" * bool(reason))
                    notebook.print_next(status)

def check_constants() -> None:
    if changed := [f"{k} is {v}, not {_CONSTANTS[k]}" for k, v in constants().items() if v != _CONSTANTS[k]]:
        raise MetricError(f"a constant of prepare.py was changed: {', '.join(changed)}; leave it as it is")

def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

# == 10. The morning report ============================================================================================
def report() -> None:
    """Say on the terminal how the night went, and draw it as progress.png. Kept is what stands in HEAD's history."""
    if not (rows := read_results()):
        raise PrepareError(f"{RESULTS}: no experiments yet; run: uv run train.py baseline")
    history, hours = "", sum(int(row["seconds"]) for row in rows) / 3600
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
        history = "\n" + git("log", "--format=%H")
    groups = scores(rows, fingerprint := rows[-1]["fingerprint"])  # only these compare
    alike = {i: row for i, row in enumerate(rows, 1) if row["fingerprint"] == fingerprint}
    kept = {i: row for i, row in alike.items() if row["val_bpb"] != "nan" and f"\n{row['commit']}" in history}
    levels = {i: float(np.mean([*groups[row["code"]].values()][:2])) for i, row in kept.items()}
    failed = sum(row["val_bpb"] == "nan" for row in rows)
    print(f"{len(rows)} experiments in {hours:.1f} hours of running, {len(rows) / max(hours, 1e-3):.1f} per hour")
    print(f"{len(kept)} kept, {len(rows) - failed - len(kept)} dropped or repeated, {failed} without a score")
    if len(alike) < len(rows):
        print(f"{len(rows) - len(alike)} of them do not compare with the last one: another corpus, version or device")
    if kept:
        first, best = next(iter(levels.values())), min(levels.values())
        print(f"val_bpb {first:.6f} -> {best:.6f} ({best - first:+.6f}, {100 * (best / first - 1):+.2f} %)\n")
    for (i, row), before in zip(kept.items(), [None, *levels.values()], strict=False):
        gain = f"{levels[i] - before:+.6f}" if before else "-"
        print(f"{row['commit']}  {levels[i]:.6f}  {gain:>9}  {row['description']}")
    for row in rows[max(kept, default=0) :]:
        if row["status"] == "keep" or row is rows[-1] and row["status"] in ("maybe", "running"):
            print(f"pending: {row['commit']}  {row['val_bpb']}  {row['status']}: {row['description']}")
    draw(alike, kept, levels)
    print(f"\nchart: {HERE / 'progress.png'}")

def draw(rows: dict[int, dict], kept: dict[int, dict], levels: dict[int, float]) -> None:
    """Every run a dot, kept ones labelled, the running best a line; what lies outside the range sits on its edge."""
    from matplotlib.figure import Figure
    axes = (figure := Figure(figsize=(12, 6), layout="constrained")).subplots()
    runs = {i: float(row["val_bpb"]) for i, row in rows.items() if row["val_bpb"] != "nan"}
    lost, end = [i for i in rows if i not in runs], max(rows)
    low, high = min(runs.values(), default=0.0), max([*levels.values(), np.quantile([*runs.values()] or [1.0], 0.8)])
    low, high = low - 0.15 * max(high - low, 1e-3), high + 0.45 * max(high - low, 1e-3)
    beyond = [i for i, value in runs.items() if value > high]
    axes.plot([*runs], [*runs.values()], "o", color="0.7", label="run")
    axes.plot(beyond, [high] * len(beyond), "^", color="0.5", clip_on=False, in_layout=False, label="above the range")
    axes.plot(lost, [low] * len(lost), "x", color="tab:red", clip_on=False, in_layout=False, label="no score")
    if kept:
        axes.stairs(np.minimum.accumulate([*levels.values()]), [*kept, end], baseline=None, color="green", label="best")
        axes.plot([*kept], [*levels.values()], "o", color="green", label="kept")
    for i, row in kept.items():
        text = row["description"][:40].replace("$", r"\$")
        axes.annotate(text, (i, levels[i]), (4, 6), textcoords="offset points", rotation=35, fontsize=8)
    title = f"{len(rows)} runs, {len(kept)} kept, {len(lost)} without a score"
    axes.set(title=title, xlabel="run", ylabel="val_bpb (lower is better)", ylim=(low, high), xlim=(0, 1.15 * end + 1))
    axes.tick_params(axis="y", labelleft=bool(runs))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(HERE / "progress.png", dpi=120)

# == 11. Command line ==================================================================================================
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise PrepareError(f"{message}; see prepare.py --help")

def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="prepare.py", description="Prepare a corpus for train.py, once.")
    about = "climbmix, tinystories, python or a folder of .parquet, .jsonl, .txt, .md (default here: %(default)s)"
    parser.add_argument("--data", default=DEFAULT_CORPUS, help=about)
    parser.add_argument("--report", action="store_true", help="show how the night went and draw progress.png")
    parser.add_argument("--num-shards", type=int, help="training shards of climbmix (default: 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="downloads at once (default: %(default)s)")
    try:
        options = vars(parser.parse_args(argv))
        report() if options.pop("report") else prepare(**options)
        return 0
    except AutoresearchError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or CACHE}: {error.strerror or error}; make room there, or move AUTORESEARCH_CACHE"
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not cut off the line that the first one gets
        message = "interrupted; run prepare.py again to continue"
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 1

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # after an error a thread may still wait for the network

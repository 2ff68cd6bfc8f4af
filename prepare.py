"""The fixed ground of autoresearch: corpus, tokenizer, dataloader, clock, metric and notebook.

    uv run prepare.py [--data climbmix|tinystories|python|DIR]     prepare a corpus, once
    uv run prepare.py --report                                     how a night of experiments went

No experiment edits this file. Part I turns a corpus into the files that train.py reads. Part II is what an
experiment needs: it serves the training data, keeps the time, scores the model, and writes the record.

Shapes: B rows of a batch, T tokens of a row, V tokens of the vocabulary, N heads of width H.
"""

import argparse
import base64
import codecs
import contextlib
import ctypes
import faulthandler
import functools
import gc
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import platform
import re
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
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TextIO

import filelock
import numpy as np
import pyarrow.parquet
import requests
import rustbpe
import tiktoken
import torch
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

# == Constants ===============================================================================================


# dense bfloat16 TFLOP/s by data sheet, by a word of the device's name; the first match counts
DATA_CENTER_TFLOPS = {
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989.5, "H800": 989.5, "H200": 989.5,
    "GH200": 989.5, "B200": 2250, "GB200": 2500, "B300": 2250, "GB300": 2500, "MI300X": 1307, "MI325X": 1307,
    "MI350X": 2300, "MI355X": 2500,
}  # fmt: skip
PEAK_TFLOPS = DATA_CENTER_TFLOPS | {
    "L40S": 362, "L40": 181, "L4": 121, "A10": 125, "A40": 150, "T4": 65, "RTX 5090": 209.5,
    "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


def known_name(name: str) -> str:
    """The first entry of PEAK_TFLOPS that is a whole word of a device's name: RTX A1000 is no A100.

    The empty text for others, and for a slice (MIG) of a device.
    """
    match = re.search(rf"\b({'|'.join(PEAK_TFLOPS)})\b", name)
    if " MIG " in name or not match:
        return ""
    return match[1]


def default_scale() -> str:
    if not torch.cuda.is_available():
        return "small"
    card = torch.cuda.get_device_properties(0)
    is_large = known_name(card.name) in DATA_CENTER_TFLOPS and card.total_memory >= 38 * 2**30
    return "full" if is_large else "desktop"


# set before default_scale(): asking for a device's name starts CUDA
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
SCALE = os.environ.get("AUTORESEARCH_SCALE") or default_scale()
if SCALE not in ("full", "desktop", "small"):
    sys.exit(f"error: AUTORESEARCH_SCALE is {SCALE!r}, not full, desktop, small; unset it or correct it")
# what five minutes of each kind of device can train and score
MAX_SEQ_LEN = {"full": 2048, "desktop": 2048, "small": 256}[SCALE]  # tokens of a row
VOCAB_SIZE = {"full": 8192, "desktop": 8192, "small": 2048}[SCALE]  # tokens, SPECIAL_TOKENS included
EVAL_TOKENS = {"full": 40 * 524_288, "desktop": 10 * 524_288, "small": 2**18}[SCALE]  # that the metric scores
TRAIN_TOKENS = {"full": 0, "desktop": 0, "small": 2**23}[SCALE]  # at most, 0 for all; what one run can read
TRAIN_BYTES = 4 * TRAIN_TOKENS  # of the texts that become these tokens
DEFAULT_CORPUS = {"full": "climbmix", "desktop": "climbmix", "small": "tinystories"}[SCALE]

budget = os.environ.get("AUTORESEARCH_BUDGET") or "300"
if not re.fullmatch(r"\d{1,5}", budget) or not 5 <= int(budget) <= 86_400:
    sys.exit(f"error: AUTORESEARCH_BUDGET is {budget!r}, not 5 to 86400 (whole seconds); unset or correct it")
TIME_BUDGET = int(budget)  # seconds of training
# Seconds to start and to evaluate; then the watchdog ends the run. Estimates for a first run on a card of
# 12 GB: 90 s to compile, as much for each of three smaller micro-batches, 60 s for the metric, and a margin.
GRACE = max(300 if SCALE == "small" else 600, TIME_BUDGET // 10)

try:
    CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
except RuntimeError:
    sys.exit("error: there is no home directory for ~/.cache/autoresearch; set AUTORESEARCH_CACHE")
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.tsv"
REFS = "refs/autoresearch/"  # one for each experiment
# version and scale of a prepared folder; before version 4 no documents were shuffled at the larger scales
LAYOUT = [4, SCALE, MAX_SEQ_LEN, VOCAB_SIZE, EVAL_TOKENS, TRAIN_TOKENS]
DOWNLOADS = "downloads"  # folder of shards as they were published
SHARDS = f"shards-{'-'.join(map(str, LAYOUT))}"  # folder of shards that are built here
PREPARE_AGAIN = "run prepare.py again with the same --data"

CLIMBMIX = "datasets/karpathy/climbmix-400b-shuffle/resolve/main"
CLIMBMIX_SHARDS = 6542  # for training, and one more, which is pinned for validation
TINYSTORIES = "datasets/karpathy/tinystories-gpt4-clean/resolve/main"
DOWNLOAD_ATTEMPTS = 5
DOWNLOAD_TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
SHARD_DOCUMENTS = 2**14  # documents of a shard that is built here, at most
SHARD_BYTES = 64_000_000  # of the texts of such a shard, about: characters are counted
VALIDATION_FRACTION = 0.05  # of the sources of a corpus that comes without a split
VALIDATION_BYTES = max(8 * EVAL_TOKENS, 64_000_000)  # of validation documents, at most
LONG_FILE = 64_000  # characters, or bytes of a .txt or .md; a longer file is divided into blocks
BLOCK = 16_000  # characters of a block, which goes to one split like a file
PIECE = 8 * MAX_SEQ_LEN  # characters of a piece of a text file, at least
OWN_TYPES = (".parquet", ".jsonl", ".txt", ".md")

SPLIT_PATTERN = (  # GPT-4's, with numbers cut after two digits instead of three: the vocabulary is small
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")
TOKENIZER_CHARS = 10**9  # characters that the merges are learned from
TOKENIZER_DOCUMENT_CHARS = 10_000  # of one document at most
DOCUMENT_CHARS = 100_000  # longer texts are encoded in pieces: tiktoken 0.14 panics on 1,000,000 spaces

PACKING_DOCUMENTS = 1000  # documents held to choose from
PACKING_REFILL = 128  # appended at once when fewer are held
MIN_VALIDATION_ROWS = 64

LOGITS_BYTES = 2**31  # of float32 logits that the metric asks for at once
PROBES = 256  # (row, cut) pairs that are asked again, at least
TOLERANCE = 0.005  # nats that the future may move a loss by; more where the model itself is noisy
NOISE_LIMIT = 0.02  # nats that two identical calls may differ by

SIGMA = {"full": 0.0007, "desktop": 0.002, "small": 0.0045}[SCALE]  # of val_bpb between seeds, a first guess
SURE_SE = 4  # standard errors of a gain that is kept at first sight
KEEP_SE = 0.25  # standard errors that a repeated gain must have; simulated in tests/test_verdict.py

LOG_SECONDS = 10  # between two lines of progress
LOSS_LIMIT = 100  # nats; a larger loss ends a run


class AutoresearchError(Exception):
    """What a user can fix. Its one line says what was found, what was expected and what to do."""


class MetricError(AutoresearchError):
    """The run is invalid: it has no score that can be compared."""


TrainError = AutoresearchError  # older train.py files import this name


def constants() -> dict[str, int | float | str]:
    """Every upper-case number and text of this module, as it is now."""
    kinds = int | float | str
    return {name: value for name, value in globals().items() if name.isupper() and isinstance(value, kinds)}


CONSTANTS = constants()  # as they were when this file was loaded


def check_constants() -> None:
    """Raise MetricError if a program has changed one of them."""
    now = constants()
    for name, value in CONSTANTS.items():
        if now.get(name) != value:
            found = f"{name} is {now.get(name)}, not {value}"
            raise MetricError(f"a constant of prepare.py was changed: {found}; leave it as it is")


# == Files and device ========================================================================================

progress_bar = functools.partial(tqdm, disable=None, leave=False, unit_scale=True, mininterval=0.5)


@contextlib.contextmanager
def published(path: Path) -> Iterator:
    """A binary file to write. It appears under `path`, in place of an older one, when the block ends well."""
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


def locked(folder: Path, who: str):
    """Lock a folder for a `with` block, or as long as the result is held; an error names `who`."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(folder / "lock", timeout=0).acquire()
    except filelock.Timeout:
        raise AutoresearchError(f"{folder}: another {who} is at work here; wait until it has ended") from None
    for path in list(folder.rglob("*.tmp")):  # left behind by a process that was killed
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return lock


def in_threads(work: Callable, items: Iterable, workers: int = os.cpu_count() or 1) -> dict:
    """{item: work(item)}. The first error, or Ctrl-C, ends it at once, without waiting for other threads."""
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


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.machine()
    if sys.platform == "linux":
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = found[1] if found else processor
    return f"{processor} {device.type}, {cpu_threads()} threads"


def cpu_threads() -> int:
    """One for each CPU that may be used, or fewer by OMP_NUM_THREADS. More threads than CPUs are slower."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return min(usable_cpus(), int(wanted))
    return usable_cpus()


def usable_cpus(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """The smaller of this process's affinity and the quotas of its cgroups, versions 1 and 2."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    lines = []
    with contextlib.suppress(OSError):  # not Linux
        lines = Path(proc).read_text().splitlines()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        folder = Path(root, controllers, name.lstrip("/"))
        for group in [folder] + list(folder.parents):
            # quota and period stand in one file of version 2, or in two of version 1
            paths = [group / file for file in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
            numbers = ""
            with contextlib.suppress(OSError):  # hidden from this process, or gone meanwhile
                numbers = " ".join(path.read_text() for path in paths if path.exists())
            limit = re.fullmatch(r"(\d+)\s+(\d+)\s*", numbers)  # without a quota it is "max" or -1
            if limit:
                cpus = min(cpus, max(1, int(limit[1]) // int(limit[2])))
    return cpus


def peak_memory_mb(device: torch.device) -> float:
    """Of the device's memory on CUDA, otherwise of this process; nan where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def print_any_text() -> None:
    """Have stdout escape the letters that its encoding lacks, instead of raising an error."""
    with contextlib.suppress(AttributeError, OSError):  # it is closed, or no text file
        sys.stdout.reconfigure(errors="backslashreplace")


def leave(code: int) -> None:
    """End this process without its threads: one may be downloading, torch's can abort a normal exit."""
    with contextlib.suppress(OSError, AttributeError):  # nobody may be there to read it
        sys.stdout.flush()
    os._exit(code)


def keep_freed_memory() -> None:
    """Have glibc keep large buffers for the next step: 28,000 page faults less in each step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD = -1  # of malloc.h, like the next one
        M_MMAP_THRESHOLD = -3
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older releases take
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def hub() -> str:
    """Where public files come from."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def load_flash_attention_3() -> Callable:
    """(q_BTNH, k_BTNH, v_BTNH, window) -> BTNH in bfloat16, for Hopper GPUs.

    The kernel comes from the hub's local cache, or from the hub. Raises whatever keeps it from loading.
    """
    import kernels
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE).glob("*--kernels-community--flash-attn3/snapshots/*")
    try:
        newest = max(snapshots, key=lambda path: path.stat().st_mtime)
        kernel = kernels.get_local_kernel(newest)
    except Exception:  # there is none, half of one, or one for another torch
        requests.head(hub(), timeout=3)  # without a network the hub's own client would try for minutes
        kernel = kernels.get_kernel("kernels-community/flash-attn3", version=1)

    def flash_attention_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        return kernel.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))

    return flash_attention_3


def fit_micro_batch(attempt: Callable[[int], None], rows: int) -> int:
    """The largest of rows, rows / 2, rows / 4, ... for which attempt(rows) does not run out of memory."""
    while True:
        try:
            attempt(rows)
            return rows
        except torch.OutOfMemoryError:
            pass  # not handled here: the exception holds the tensors of the attempt
        if rows == 1:
            remedy = "lower depth or n_embd, or free the device's memory"
            raise AutoresearchError(f"out of memory with a single row; {remedy}")
        print(f"out of memory with {rows} rows, trying {rows // 2}", flush=True)
        rows //= 2
        torch.compiler.reset()  # torch compiles a function 8 times at most; this begins anew
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# == Prepared ================================================================================================


@dataclass(frozen=True)
class Prepared:
    """A prepared folder: the files that train.py reads, as its manifest has them."""

    folder: Path
    tokenizer_path: Path
    validation_path: Path
    train_paths: list[Path]  # flat uint16 token files
    hashes: dict[Path, str]  # sha256 of every file
    rows: np.ndarray  # uint16 (validation rows, T+1)

    @classmethod
    def read(cls, folder: Path) -> "Prepared":
        """What the folder's manifest.json lists; AutoresearchError if it is unusable here."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["layout"] != LAYOUT:
                raise ValueError(f"made for {manifest['layout']}, not {LAYOUT}")
            return cls(
                folder=folder,
                tokenizer_path=folder / manifest["tokenizer"],
                validation_path=folder / manifest["validation"],
                train_paths=[folder / name for name in manifest["train"]],
                hashes={folder / name: sha256 for name, (_, sha256) in manifest["files"].items()},
                rows=np.fromfile(folder / manifest["validation"], "<u2").reshape(-1, MAX_SEQ_LEN + 1),
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise AutoresearchError(f"{folder}: no usable manifest ({error}); {PREPARE_AGAIN}") from None

    @classmethod
    def active(cls) -> "Prepared":
        """The folder that was prepared last."""
        try:
            name = (CACHE / f"active-{SCALE}").read_text()
        except FileNotFoundError:
            remedy = "run: uv run prepare.py, or without a network: uv run prepare.py --data python"
            raise AutoresearchError(f"nothing is prepared for {SCALE} in {CACHE}; {remedy}") from None
        return cls.read(CACHE / name)

    def verify(self) -> None:
        """Raise AutoresearchError if a file that a score depends on is not what prepare.py wrote."""
        for path in (self.tokenizer_path, self.validation_path, *self.train_paths):
            if not path.exists() or file_hash(path) != self.hashes[path]:
                raise AutoresearchError(f"{path}: altered since it was made; delete it and {PREPARE_AGAIN}")

    @property
    def train_tokens(self) -> int:
        return sum(path.stat().st_size for path in self.train_paths) // 2

    @property
    def scored_by(self) -> list[str]:
        """What the metric uses of this corpus: the hashes of validation rows and tokenizer."""
        return [self.hashes[path] for path in (self.validation_path, self.tokenizer_path)]

    def fingerprint(self, device: torch.device) -> str:
        """Two scores may be compared only if this is equal."""
        program = [file_hash(Path(__file__)), constants(), torch.__version__]
        return short_hash(program, self.scored_by, device_name(device), usable_cpus())


# ############################################################################################################
# PART I: a corpus becomes a prepared folder
# ############################################################################################################

# == Corpora =================================================================================================
# A corpus is a function (folder, command line) -> {"train": paths, "val": paths} of parquet files below
# `folder` with a column `text`. To add one, write such a function, name it in CORPORA and commit: an
# experiment refuses a prepare.py that is not committed. Scores from before do not compare with later ones. If
# you change such a function later, delete the corpus's folder in the cache. Shards below DOWNLOADS are as
# they were published, all others are built here, see tokenize_shards; a split has shards of one kind.

Shards = dict[str, list[Path]]


def texts(path: Path, name: str = "") -> Iterator[str]:
    """The rows of a parquet file, nulls as empty texts; broken UTF-8 is replaced."""
    try:
        with open(path, "rb") as raw_file:  # pyarrow does not open a name that is not UTF-8
            file = pyarrow.parquet.ParquetFile(raw_file)
            if "text" not in file.schema_arrow.names:
                raise ValueError(f"no column 'text', only {file.schema_arrow.names}")
            for batch in file.iter_batches(batch_size=64, columns=["text"]):
                for raw in batch.column(0).cast("large_binary").to_pylist():
                    yield (raw or b"").decode("utf-8", "replace")
    except (ValueError, OSError, NotImplementedError) as error:  # pyarrow's errors are subclasses of these
        found = f"{name or path}: unusable parquet, {error}"
        raise AutoresearchError(f"{found}; replace it and run prepare.py again") from None


def download(source: str, paths: list[Path], workers: int = 1) -> None:
    """Fetch the parquet files that are not there yet from the hub's folder `source`."""
    os.environ["NETRC"] = os.devnull  # no credentials for public files: a stale ~/.netrc would mean 401
    retry = {"backoff_factor": 0.5, "status_forcelist": (429, 500, 502, 503, 504), "retry_after_max": 60}
    with requests.Session() as session, progress_bar(desc="download", unit="B") as progress:
        for adapter in session.adapters.values():
            adapter.max_retries = requests.adapters.Retry(DOWNLOAD_ATTEMPTS - 1, **retry)
        fetch = functools.partial(fetch_parquet, session, f"{hub()}/{source}", progress)
        in_threads(fetch, [path for path in paths if not path.exists()], workers)


def fetch_parquet(session: requests.Session, folder_url: str, progress: tqdm, path: Path) -> None:
    """Download one file, check it, publish it.

    A request that the server refuses is repeated by the session; a connection that is cut is resumed here.
    """
    url = f"{folder_url}/{path.name}"
    remedy = f"({url}); check the network and HF_ENDPOINT, then run prepare.py again"
    headers = {"Accept-Encoding": "identity"}  # the bytes of a compressed answer could not be counted
    size = 0
    with published(path) as file:
        for attempt in range(DOWNLOAD_ATTEMPTS):
            time.sleep(0.5 * (2**attempt - 1))
            try:
                response = session.get(url, stream=True, timeout=DOWNLOAD_TIMEOUT, headers=headers)
                response.raise_for_status()
            except requests.RequestException as error:
                raise AutoresearchError(f"{path.name}: {error} {remedy}") from None

            resumed = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            start = int(resumed[1]) if resumed else 0
            progress.update(start - file.tell())  # what has to be fetched again
            progress.total = (progress.total or 0) - size
            file.seek(start)
            file.truncate()
            size = start + int(response.headers.get("Content-Length", 0))
            progress.total += size
            with response, contextlib.suppress(requests.RequestException):
                for block in response.iter_content(2**20):
                    progress.update(file.write(block))
                file.flush()
                rows = texts(Path(file.name), f"{path.name} from {url}")
                next(rows, None)  # raises if the footer or the first rows are broken
                return

            headers["Range"] = f"bytes={file.tell()}-"
            headers["If-Range"] = response.headers.get("ETag", '"unknown"')
        raise AutoresearchError(f"{path.name}: cut off at {file.tell()} of {size} bytes {remedy}")


def climbmix(folder: Path, options: argparse.Namespace) -> Shards:
    """Published shards. The pinned validation shard is downloaded before the others."""
    numbers = [CLIMBMIX_SHARDS, *range(options.num_shards)]
    paths = [folder / DOWNLOADS / f"shard_{number:05d}.parquet" for number in numbers]
    download(CLIMBMIX, paths[:1])
    download(CLIMBMIX, paths[1:], options.download_workers)
    return {"train": paths[1:], "val": paths[:1]}


def tinystories(folder: Path, options: argparse.Namespace) -> Shards:
    """One published file with a suggested split: rows 0 to 9,999 are test data, up to 19,999 validation."""

    def documents() -> Iterator[tuple[str, str]]:
        path = folder / DOWNLOADS / "tinystories_gpt4_clean.parquet"
        download(TINYSTORIES, [path])
        train_bytes = TRAIN_BYTES or math.inf
        for row, text in enumerate(texts(path)):
            if 10_000 <= row < 20_000:
                yield "val", text
            elif row >= 20_000:
                if train_bytes <= 0:
                    return
                train_bytes -= len(text)  # the text is ASCII
                yield "train", text

    return build_shards(folder / SHARDS, documents())


def python(folder: Path, options: argparse.Namespace) -> Shards:
    """The Python sources of this machine, cut at top-level definitions or line ends, each piece once."""

    def sources() -> Iterator[list[str]]:
        for path in progress_bar(list(python_files()), desc="read", unit=" files"):
            with contextlib.suppress(UnicodeDecodeError, OSError):
                text = path.read_text("utf-8")
                yield from blocks(cut_python(text), is_long=len(text) > LONG_FILE)

    # at the larger scales all pieces, but each once
    return build_shards(folder / SHARDS, sample(split_sources(sources()), TRAIN_BYTES or math.inf))


def python_files() -> Iterator[Path]:
    """Those of the standard library and of this environment."""
    for root in {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}:
        for path in root.rglob("*.py"):
            # packages of another environment can lie below the standard library
            if "-packages" not in str(path.relative_to(root)):
                yield path


def cut_python(text: str) -> Iterator[str]:
    """Pieces of about 800 characters: cut at top-level definitions first, then longer ones at line ends."""
    for definition in cut(text, r"(?<=\n\n)(?=@|class |def |async def )", 800):
        yield from cut(definition, "\n", 800)


def cut(text: str, boundary: str, chars: int) -> Iterator[str]:
    """Pieces of `chars` characters or more (the last may have less) that end at a boundary.

    A piece that would be blank is joined to the next one; at the end of the text it is left out.
    """
    ends = [match.end() for match in re.finditer(boundary, text)]
    start = 0
    for end in ends + [len(text)]:
        is_long_enough = end - start >= chars or end == len(text)
        if is_long_enough and text[start:end].strip():
            yield text[start:end]
            start = end


def own_data(folder: Path, options: argparse.Namespace) -> Shards:
    """A folder of .parquet and .jsonl (a row is a document), .txt and .md (which are cut)."""
    paths, skipped = own_files(options.data)
    read = Counter(path.suffix.lower() for path in paths)
    found = f"read {count_types(read) or 'nothing'}, skipped {count_types(skipped) or 'nothing'}"
    if not paths:
        remedy = f"bring {', '.join(OWN_TYPES)}; names that begin with a dot are left out"
        raise AutoresearchError(f"{options.data}: {found}; {remedy}")
    print(f"{options.data}: {found}", flush=True)
    broken = []

    def sources() -> Iterator[list[str]]:
        for path in progress_bar(paths, desc="read", unit=" files"):
            for source in own_sources(path):
                if path not in broken and any("\ufffd" in text for text in source):
                    broken.append(path)
                yield source

    target = folder / f"{SHARDS}-{files_state(paths)}"
    shards = build_shards(target, sample(split_sources(sources()), TRAIN_BYTES or None))
    if broken:
        example = ascii(str(broken[0]))
        found = f"{len(broken)} files have broken characters (U+FFFD), such as {example}"
        print(f"note: {found}; they are not UTF-8, or were damaged before")
    return shards


def count_types(types: Counter) -> str:
    return ", ".join(f"{count} {name or 'without a type'}" for name, count in sorted(types.items()))


def own_files(data: str) -> tuple[list[Path], Counter]:
    """The readable files below a folder, and the number of others by type.

    Names that begin with a dot and the cache are left out. Links are followed; one that leads to nothing, or
    a folder that cannot be listed, is an error: otherwise a part of the corpus would be missing silently.
    """
    paths = []
    skipped = Counter()
    visited = {CACHE.resolve()}

    def visit(folder: Path) -> None:
        if folder.resolve() in visited:
            return
        visited.add(folder.resolve())
        try:
            for path in sorted(folder.iterdir()):
                suffix = path.suffix.lower()
                if path.name.startswith("."):
                    continue
                path.stat()
                if path.is_dir():
                    visit(path)
                elif suffix in OWN_TYPES:
                    paths.append(path)
                else:
                    skipped[suffix] += 1
        except FileNotFoundError as error:
            remedy = "remove it, or bring what it led to"
            raise AutoresearchError(f"{error.filename}: a link to nothing; {remedy}") from None
        except OSError as error:
            found = f"{error.filename}: {error.strerror}"
            raise AutoresearchError(f"{found}; make it readable or move it away") from None

    visit(Path(data).resolve())
    return paths, skipped


def files_state(paths: list[Path]) -> str:
    """Changes when a file is added, removed or written."""
    return short_hash([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths])


def own_sources(path: Path) -> Iterator[list[str]]:
    """The documents of one file, in lists that go to the same split."""
    suffix = path.suffix.lower()
    row = 0
    try:
        with open(path, encoding=file_encoding(path), errors="replace") as file:
            if suffix == ".parquet":
                for text in texts(path):
                    yield [text]
            elif suffix == ".jsonl":
                for line in file:
                    row += 1
                    text = json.loads(line)["text"] if line.strip() else None
                    if text is not None:
                        yield [text.encode("utf-8", "replace").decode()]  # JSON can spell lone surrogates
            else:
                yield from blocks(cut_text(file), is_long=path.stat().st_size > LONG_FILE)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        where = f"{path}, line {row}" if row else str(path)
        remedy = 'correct it (.jsonl wants {"text": "..."})' if row else "make it readable or move it away"
        raise AutoresearchError(f"{where}: {error}; {remedy}") from None


def file_encoding(path: Path) -> str:
    """As the byte-order mark says, otherwise UTF-8. Raises ValueError for a git-lfs pointer."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("this is a git-lfs pointer, not the file itself; run git lfs pull")
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the first begins like that of UTF-16
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"  # with a mark or without one


def cut_text(file: TextIO) -> Iterator[str]:
    """Pieces of a text of any length, see piece_end; a blank one is left out."""
    text = file.read(16 * PIECE)
    while text:
        end = piece_end(text)
        if text[:end].strip():
            yield text[:end]
        text = text[end:]
        if len(text) < 8 * PIECE:  # a piece can be that long
            text += file.read(16 * PIECE)


def piece_end(text: str) -> int:
    """The index at which the first piece ends; distances from the beginning are in units of PIECE characters.

    The first blank line between 1 and 2, otherwise the first line end between 2 and 4, otherwise the first
    space between 4 and 8, otherwise 8.
    """
    boundaries = [(r"\n[ \t]*\n", 1), (r"\n", 2), (r"\s", 4)]
    for boundary, times in boundaries:
        match = re.compile(boundary).search(text, times * PIECE, 2 * times * PIECE)
        if match:
            return match.end()
    return min(8 * PIECE, len(text))


def blocks(pieces: Iterable[str], is_long: bool) -> Iterator[list[str]]:
    """The sources of a file: all pieces together, or in a long file the pieces of each BLOCK characters."""
    block = []
    for piece in pieces:
        block.append(piece)
        if is_long and sum(map(len, block)) >= BLOCK:
            yield block
            block = []
    if block:
        yield block


CORPORA = {"climbmix": climbmix, "tinystories": tinystories, "python": python}


def content_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_sources(sources: Iterable[list[str]]) -> Iterator[tuple[str, str]]:
    """(split, document). Sources with a hash in the lowest 5 % are validation: all of a source goes one way.

    Pieces of one file are siblings: with some of them in the training data, a model that only counts n-grams
    scored 1.015 bpb, but 1.205 on files that it had never seen. Adding a source moves no other one.
    """
    for source in sources:
        is_validation = content_hash("".join(source)) < VALIDATION_FRACTION * 2**64
        for text in source:
            yield "val" if is_validation else "train", text


def sample(documents: Iterable[tuple[str, str]], train_bytes: float | None) -> Iterator[tuple[str, str]]:
    """Up to VALIDATION_BYTES of validation documents, in the order of their hashes, and training documents.

    With `train_bytes` the latter are a sample of that size, each document once, in that order too; otherwise
    all, as they come.
    """
    validation = Sample(VALIDATION_BYTES)
    training = Sample(train_bytes or 0)
    for name, text in documents:
        if name == "val":
            validation.add(text)
        elif train_bytes:
            training.add(text)
        else:
            yield name, text
    for text in validation.in_order():
        yield "val", text
    for text in training.in_order():
        yield "train", text


class Sample:
    """The documents with the lowest content hashes, each once, up to `max_bytes`: an even sample."""

    def __init__(self, max_bytes: float):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.cutoff = 2**64  # hashes from here on are left out
        self.texts: dict[int, str] = {}  # by content hash
        self.heap: list[int] = []  # the hashes, negative, so that the highest comes first

    def add(self, text: str) -> None:
        key = content_hash(text)
        size = len(text.encode())
        # a document longer than max_bytes would push out all others
        if key >= self.cutoff or key in self.texts or size > self.max_bytes:
            return
        self.texts[key] = text
        heapq.heappush(self.heap, -key)
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.cutoff = -heapq.heappop(self.heap)
            removed = self.texts.pop(self.cutoff)
            self.bytes -= len(removed.encode())

    def in_order(self) -> list[str]:
        """By hash, the lowest first."""
        return [text for _, text in sorted(self.texts.items())]


def build_shards(folder: Path, documents: Iterator[tuple[str, str]]) -> Shards:
    """Write (split, text) documents as parquet files. The folder appears when all are complete, and stays."""
    if not folder.exists():
        progress = progress_bar(documents, desc="shards", unit=" documents")
        with tempfile.TemporaryDirectory(suffix=".tmp", dir=folder.parent) as temporary:
            for number, batch in enumerate(batches_of_documents(progress)):
                for split in {name for name, _ in batch}:
                    table = pyarrow.table({"text": [text for name, text in batch if name == split]})
                    pyarrow.parquet.write_table(table, f"{temporary}/{split}_{number:05d}.parquet")
            os.replace(temporary, folder)
    return {split: sorted(folder.glob(f"{split}_*.parquet")) for split in ("train", "val")}


def batches_of_documents(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """What goes into a shard: up to SHARD_DOCUMENTS that are not empty, or SHARD_BYTES."""
    batch = []
    size = 0
    for name, text in documents:
        if text:
            batch.append((name, text))
            size += len(text)
        if len(batch) == SHARD_DOCUMENTS or size > SHARD_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


# == Tokenizer ===============================================================================================


class Tokenizer:
    """Byte-pair encoding: bytes and merges first, then SPECIAL_TOKENS. rustbpe learns it, tiktoken uses it.

    `data` is the prepared folder of the tokenizer: dataloader and metric take the corpus from there.
    """

    def __init__(self, path: Path, data: Prepared | None = None):
        self.data = data
        self.bos = VOCAB_SIZE - len(SPECIAL_TOKENS)
        ranks = read_ranks(path)
        has_bytes = {bytes([i]) for i in range(256)} < ranks.keys()
        if not has_bytes or list(ranks.values()) != list(range(self.bos)):
            raise AutoresearchError(f"{path}: no tokenizer of {VOCAB_SIZE:,}; delete it and {PREPARE_AGAIN}")
        special = {name: self.bos + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        # int64 (V,), the length of each token in bytes. Its decoded text can be longer: a lone byte >= 0x80
        # becomes U+FFFD, which is three bytes long.
        self.token_bytes = torch.tensor([len(token) for token in ranks] + [0] * len(special))

    @classmethod
    def from_directory(cls, directory: Path | None = None) -> "Tokenizer":
        """The tokenizer of a prepared folder, by default of the one that was prepared last."""
        data = Prepared.read(Path(directory)) if directory else Prepared.active()
        return cls(data.tokenizer_path, data)

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Token ids of a text, or a list of them; `prepend` is an id or the name of a special token."""
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        if isinstance(prepend, str):
            prepend = self.encoding.encode_single_token(prepend)
        ids = [] if prepend is None else [prepend]
        for piece in self.encode_pieces(text):
            ids.extend(piece.tolist())
        return ids

    def encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """Token ids, uint32, of each DOCUMENT_CHARS characters. Lone surrogates are replaced."""
        for start in range(0, len(text), DOCUMENT_CHARS):
            piece = text[start : start + DOCUMENT_CHARS].encode("utf-8", "replace").decode()
            yield self.encoding.encode_to_numpy(piece, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def get_vocab_size(self) -> int:
        return VOCAB_SIZE

    def get_bos_token_id(self) -> int:
        return self.bos


def read_ranks(path: Path) -> dict[bytes, int]:
    """The rank of each token, from lines `base64(token) rank`; empty if the file is not like that."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError):
        return {}
    return ranks


def train_tokenizer(paths: list[Path], target: Path) -> None:
    """Learn merges from the beginnings of the first documents; AutoresearchError if there are too few."""

    def beginnings() -> Iterator[str]:
        chars = 0
        documents = itertools.chain.from_iterable(map(texts, paths))
        for text in progress_bar(documents, desc="tokenizer", unit=" documents"):
            beginning = text[:TOKENIZER_DOCUMENT_CHARS]
            chars += len(beginning)
            if chars > TOKENIZER_CHARS:
                return
            yield beginning

    learner = rustbpe.Tokenizer()
    learner.train_from_iterator(beginnings(), VOCAB_SIZE - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = learner.get_mergeable_ranks()
    size = len(ranks) + len(SPECIAL_TOKENS)
    if size != VOCAB_SIZE:
        found = f"the corpus yields {size:,} tokens, not {VOCAB_SIZE:,}"
        raise AutoresearchError(f"{found}; bring more varied text")
    with published(target) as file:
        for token, rank in ranks:
            file.write(b"%s %d\n" % (base64.b64encode(bytes(token)), rank))


def tokenize(
    shards: Sequence[Path], target: Path, tokenizer: Tokenizer, progress: tqdm, longest: int, skip: set[int]
) -> None:
    """Write the documents of some shards as a flat uint16 file: BOS and tokens of each, up to TRAIN_TOKENS.

    Pieces of a document, of DOCUMENT_CHARS characters or `longest` tokens, become documents of their own.
    Those whose content hash is in `skip` are left out.
    """
    bos = np.array([tokenizer.get_bos_token_id()], "<u2").tobytes()
    most_bytes = 2 * TRAIN_TOKENS or math.inf
    with published(target) as file:
        for text in itertools.chain.from_iterable(map(texts, shards)):
            progress.update()
            if content_hash(text) in skip:
                continue
            for ids in tokenizer.encode_pieces(text):
                for start in range(0, len(ids), longest):
                    piece = bos + ids[start : start + longest].astype("<u2").tobytes()
                    if file.tell() + len(piece) > most_bytes:
                        return
                    file.write(piece)


# == Packing =================================================================================================


def documents(paths: list[Path], bos: int, epochs: Iterable[int]) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, epoch) of every document. The tokens are uint16 views of a mapped file; the first is BOS."""
    shards = [np.asarray(np.memmap(path, "<u2", "r")) for path in paths if path.stat().st_size]
    for epoch in epochs:
        for tokens in shards:
            starts = np.flatnonzero(tokens == bos).tolist()
            ends = starts[1:] + [len(tokens)]
            for start, end in zip(starts, ends, strict=True):
                yield tokens[start:end], epoch


def shuffle(paths: list[Path], targets: list[Path], bos: int) -> None:
    """Write the documents of token files to as many other ones, in a random order that is always the same.

    A folder is read in the order of its names, and a long text becomes many documents in a row. Unshuffled,
    a batch would be of one subject, and a run of less than an epoch would not see what comes last.
    """
    shards = [np.asarray(np.memmap(path, "<u2", "r")) for path in paths if path.stat().st_size]
    spans = [np.empty((0, 3), int)]  # (documents, 3) for each shard: its number, start and end
    for number, tokens in enumerate(shards):
        starts = np.flatnonzero(tokens == bos)
        ends = np.append(starts[1:], len(tokens))
        spans.append(np.stack([np.full(len(starts), number), starts, ends], axis=1))
    shuffled = np.random.default_rng(0).permutation(np.concatenate(spans))
    with progress_bar(total=len(shuffled), desc="shuffle", unit=" documents") as progress:
        for target, part in zip(targets, np.array_split(shuffled, len(targets)), strict=True):
            with published(target) as file:
                for number, start, end in part:
                    file.write(shards[number][start:end])
                    progress.update()


def packed(documents: Iterator[tuple[np.ndarray, int]], capacity: int) -> Iterator[tuple[np.ndarray, int]]:
    """(row, epoch): rows of `capacity` tokens, filled with documents without padding.

    The longest document that fits is taken, the earliest among equals. If none fits, the shortest (again the
    earliest) is cropped. While fewer than PACKING_DOCUMENTS are held, the next PACKING_REFILL are appended.

    The choice is O(1): a FIFO for each length, and an integer as the bit set of the lengths that are held.
    That packs 100M tokens/s at T = 2048; scanning a list of 1,000 documents packed 0.8M.
    """
    fifos: dict[int, deque] = defaultdict(deque)
    lengths = 0  # bit n is set if fifos[n] is not empty
    held = 0
    epoch = 0
    row = np.empty(capacity, "<u2")
    room = capacity
    while True:
        while held < PACKING_DOCUMENTS:
            more = list(itertools.islice(documents, PACKING_REFILL))
            if not more:
                break
            for document, _ in more:
                fifos[len(document)].append(document)
                lengths |= 1 << len(document)
            held += len(more)
            epoch = more[-1][1]
        if not held:
            return

        fitting = lengths & ((2 << room) - 1)  # bits 0 to room
        shortest = lengths & -lengths  # the lowest bit
        length = (fitting or shortest).bit_length() - 1
        document = fifos[length].popleft()[:room]
        if not fifos[length]:
            lengths ^= 1 << length
        held -= 1

        start = capacity - room
        row[start : start + len(document)] = document
        room -= len(document)
        if not room:
            yield row, epoch
            row = np.empty(capacity, "<u2")
            room = capacity


def validation_rows(paths: list[Path], bos: int) -> np.ndarray:
    """uint16 (rows, T+1): EVAL_TOKENS worth of rows, or as many as the split fills once."""
    packed_rows = packed(documents(paths, bos, epochs=[1]), MAX_SEQ_LEN + 1)
    rows = [row for row, _ in itertools.islice(packed_rows, EVAL_TOKENS // MAX_SEQ_LEN)]
    if len(rows) < MIN_VALIDATION_ROWS:
        found = f"the val split fills {len(rows)} rows of the {MIN_VALIDATION_ROWS} needed"
        raise AutoresearchError(f"{found}; bring more text")
    return np.array(rows)


# == Prepare =================================================================================================


def prepare(options: argparse.Namespace) -> None:
    """Bring a corpus into the cache, as far as it is not there yet, and make it the active one."""
    check_options(options)
    if options.data in CORPORA:
        corpus = CORPORA[options.data]
        name = options.data
        request = [name, options.num_shards]  # what exactly is asked for
    else:
        corpus = own_data
        own = Path(options.data).resolve()
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", own.name)[:60]  # a file name has 255 bytes at most
        name = f"{readable}-{short_hash(str(own))}"
        request = [name, files_state(own_files(options.data)[0])]
    folder = CACHE / f"{name}-{SCALE}"
    with locked(folder, "prepare.py"):
        was_current = is_current(folder, request)
        if not was_current:
            derive(folder, request, corpus(folder, options))
        with published(folder / "active") as file:  # here, where the lock protects what a kill leaves behind
            file.write(folder.name.encode())
        os.replace(folder / "active", CACHE / f"active-{SCALE}")
        tokenizer = Tokenizer.from_directory(folder)
    data = tokenizer.data
    scored = tokenizer.token_bytes[data.rows[:, 1:]].sum()
    validation = f"{len(data.rows):,} validation rows of {scored:,} bytes"
    print(f"data: {data.train_tokens:,} training tokens; {validation}")
    done = ", nothing to do" if was_current else ""
    print(f"ready: {folder}, fingerprint {data.fingerprint(default_device())}{done}")


def check_options(options: argparse.Namespace) -> None:
    """Raise AutoresearchError for what cannot be done; the default number of shards is filled in."""
    if options.data not in CORPORA and not os.path.isdir(options.data):
        found = f"--data {options.data}: neither {', '.join(CORPORA)} nor a folder"
        raise AutoresearchError(f"{found}; choose one of these")
    if options.num_shards is None:
        options.num_shards = 10
    elif options.data != "climbmix":
        remedy = "leave it out, or use --data climbmix"
        raise AutoresearchError(f"--num-shards is for climbmix, not for {options.data}; {remedy}")
    for option, most in (("num_shards", CLIMBMIX_SHARDS), ("download_workers", 100)):
        value = getattr(options, option)
        if not 1 <= value <= most:
            name = option.replace("_", "-")
            raise AutoresearchError(f"--{name} is {value}, not 1 to {most}; choose a number in this range")


def is_current(folder: Path, request: list) -> bool:
    """Whether the folder holds what `request` asks for. A file of another length is removed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        found = [manifest["layout"], manifest["request"]]
        sizes = {folder / name: size for name, (size, _) in manifest["files"].items()}
        needed = {manifest["tokenizer"], manifest["validation"]}.union(manifest["train"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    damaged = [path for path, size in sizes.items() if not path.exists() or path.stat().st_size != size]
    for path in damaged:
        if path.parent.name.startswith("shards"):  # shards are built together
            shutil.rmtree(path.parent, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return not damaged and found == [LAYOUT, request] and needed <= manifest["files"].keys()


def derive(folder: Path, request: list, shards: Shards) -> None:
    """Make tokenizer, token files and validation rows from shards, and the manifest that vouches for them."""
    if not shards["train"] or not shards["val"]:
        raise AutoresearchError("too few documents for a training and a validation split; bring more text")
    tokens = folder / "tokens"
    hashes = in_threads(file_hash, shards["val"] + shards["train"])
    print(f"corpus: {request[0]}, {len(hashes)} shards", flush=True)

    # names say what a file was made from, so that another vocabulary or corpus never finds an old one
    settings = [VOCAB_SIZE, SPLIT_PATTERN, TOKENIZER_CHARS, TOKENIZER_DOCUMENT_CHARS]
    made_from = short_hash(settings, [hashes[path] for path in shards["train"]])
    tokenizer_path = tokens / f"tokenizer-{made_from}.txt"
    if not tokenizer_path.exists():
        train_tokenizer(shards["train"], tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path)
    print(f"tokenizer: {tokenizer.get_vocab_size():,} tokens", flush=True)

    val_path, train_paths = tokenize_shards(tokens, shards, hashes, tokenizer, file_hash(tokenizer_path))
    rows = validation_rows([val_path], tokenizer.get_bos_token_id())
    rows_path = tokens / "validation.bin"
    with published(rows_path) as file:
        file.write(rows.tobytes())

    hashes |= in_threads(file_hash, [tokenizer_path, rows_path, val_path] + train_paths)
    names = {path: str(path.relative_to(folder)) for path in hashes}
    manifest = {
        "layout": LAYOUT,
        "request": request,
        "tokenizer": names[tokenizer_path],
        "validation": names[rows_path],
        "train": [names[path] for path in train_paths],
        "files": {names[path]: [path.stat().st_size, sha256] for path, sha256 in hashes.items()},
    }
    with published(folder / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())

    current = set(hashes)
    current.update(path.parent for path in hashes)  # a folder of shards is removed as a whole
    for path in set(tokens.iterdir()).union(folder.glob("shards*")) - current:  # not needed any more
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def tokenize_shards(
    tokens: Path, shards: Shards, hashes: dict[Path, str], tokenizer: Tokenizer, tokenizer_hash: str
) -> tuple[Path, list[Path]]:
    """The token file of the validation split and those of the training split, written if they are missing.

    Where the number of training tokens is limited, the limit counts over all shards in their order, so they
    share one file. Otherwise each shard has its own, and the documents of shards that are built here are
    shuffled over all files. Documents of the validation split are not trained on.
    """
    validation = {content_hash(text) for path in shards["val"] for text in texts(path)}
    val_group = tuple(shards["val"])
    train_groups = [tuple(shards["train"])] if TRAIN_TOKENS else [(path,) for path in shards["train"]]
    val_hashes = [hashes[path] for path in val_group]

    def is_published(shard: Path) -> bool:
        """Whether documents are neither cut into rows nor shuffled, as in results that others published."""
        return SCALE != "small" and shard.parent.name == DOWNLOADS

    def token_path(group: tuple[Path, ...]) -> Path:
        sources = [hashes[path] for path in group]
        made_from = short_hash(tokenizer_hash, LAYOUT, is_published(group[0]), val_hashes, sources)
        return tokens / f"{group[0].stem}-{made_from}.bin"

    def tokenize_group(group: tuple[Path, ...]) -> None:
        longest = sys.maxsize if is_published(group[0]) else MAX_SEQ_LEN
        skip = set() if group == val_group else validation
        if not token_path(group).exists():
            tokenize(group, token_path(group), tokenizer, progress, longest, skip)

    in_order = [token_path(group) for group in train_groups]
    train_paths = in_order
    if not TRAIN_TOKENS and not is_published(shards["train"][0]):
        made_from = short_hash([path.name for path in in_order])
        train_paths = [tokens / f"shuffled_{number:05d}-{made_from}.bin" for number in range(len(in_order))]
    groups = [val_group]
    if not all(path.exists() for path in train_paths):
        groups += train_groups
    with progress_bar(desc="tokens", unit=" documents") as progress:
        in_threads(tokenize_group, groups)
    if not all(path.exists() for path in train_paths):
        shuffle(in_order, train_paths, tokenizer.get_bos_token_id())
    if not any(path.stat().st_size for path in train_paths):
        raise AutoresearchError("every training document is a validation document, too; bring more text")
    return token_path(val_group), train_paths


# ############################################################################################################
# PART II: experiments
# ############################################################################################################

# == Clock ===================================================================================================


class Clock:
    """Times the run of this process, and knows what must not change meanwhile. Idle without an Experiment.

    The order of a run: begin(), steps() to train, stop() as evaluate_bpb begins, finish() as it ends.
    """

    def __init__(self):
        self.is_idle = True
        self.val_bpb = math.nan
        # moments in seconds of time.perf_counter(), not a number until they have come
        self.begun_s = self.started_s = self.stopped_s = self.finished_s = math.nan

    def begin(self, device: torch.device, seed: int, data: Prepared) -> None:
        self.__init__()  # forget an earlier run of this process
        self.is_idle = False
        self.begun_s = time.perf_counter()
        self.device = device
        self.seed = seed
        self.data = data

    @property
    def training_seconds(self) -> float:
        return self.stopped_s - self.started_s

    def synchronize(self) -> None:
        """Wait until the device has done all it was asked for."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def steps(self) -> Iterator[tuple[int, float]]:
        """See Experiment.steps."""
        if not math.isnan(self.started_s):
            raise MetricError("run.steps() was called twice; a run has one clock")
        is_cuda = self.device.type == "cuda"
        this_step_done = None
        last_two = deque([0.0, 0.0], maxlen=2)  # seconds that the last two steps took
        self.synchronize()
        seen_s = self.started_s = time.perf_counter()  # when the host last saw the end of a step
        for step in itertools.count():
            # The next step is expected to take as long as the shorter of the last two, so that a single slow
            # one does not end the run. Until two steps are done it is 0, since the first one may be special.
            next_seconds = min(last_two)
            elapsed = seen_s - self.started_s
            if is_cuda and step > 2:
                elapsed += next_seconds  # for the step before this one, which still runs
            if elapsed + next_seconds > TIME_BUDGET:
                return
            yield step, min(elapsed / TIME_BUDGET, 1.0)
            if is_cuda and step >= 2:  # the host goes one step ahead, once two have shown how long they take
                last_step_done = this_step_done
                this_step_done = torch.cuda.current_stream().record_event()
                if step == 2:
                    continue
                last_step_done.synchronize()
            else:
                self.synchronize()
            now_s = time.perf_counter()
            last_two.append(now_s - seen_s)
            seen_s = now_s

    def require_running(self) -> None:
        """Raise AutoresearchError if an Experiment has begun and its clock has not started."""
        if not self.is_idle and math.isnan(self.started_s):
            remedy = "warm up on random tokens, draw in run.steps()"
            raise AutoresearchError(f"training data was drawn before the clock; {remedy}")

    def require_same_data(self, data: Prepared) -> None:
        """Raise MetricError if a run that has begun is given the tokenizer of another corpus."""
        if not self.is_idle and data.scored_by != self.data.scored_by:
            found = f"the tokenizer is that of {data.folder}, but the run began with {self.data.folder}"
            raise MetricError(f"{found}; use Tokenizer.from_directory()")

    def stop(self, data: Prepared) -> None:
        """The training ends. MetricError if it took too long, or if the run is no longer what it was."""
        if self.is_idle:
            return
        if not math.isnan(self.stopped_s):
            raise MetricError("evaluate_bpb was called twice; a run has one score")
        if math.isnan(self.started_s):
            raise MetricError("evaluate_bpb was called before the clock started; train in run.steps()")
        self.synchronize()
        self.stopped_s = time.perf_counter()
        limit = TIME_BUDGET + max(5, 0.02 * TIME_BUDGET)
        if self.training_seconds > limit:
            found = f"trained for {self.training_seconds:.1f} s, not {limit:.1f} at most"
            raise MetricError(f"{found}; obey run.steps()")
        seed = torch.initial_seed()
        if seed != self.seed:
            raise MetricError(f"torch's seed is {seed}, not {self.seed}; leave seeds to the harness")
        self.require_same_data(data)
        check_constants()

    def finish(self, val_bpb: float) -> None:
        """The evaluation ends, with this score."""
        self.finished_s = time.perf_counter()
        self.val_bpb = val_bpb


CLOCK = Clock()

# == Dataloader ==============================================================================================


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split="train", device=None) -> Iterator[tuple]:
    """Endless (inputs, targets, epoch), int64 (B, T): packed rows, each begins with BOS; epoch 1 comes first.

    Raises AutoresearchError if data is drawn before the clock of an Experiment starts.
    """
    if split != "train":
        found = f"there is no split {split!r} to draw from, only 'train'"
        raise AutoresearchError(f"{found}; evaluate_bpb scores the other one")
    CLOCK.require_same_data(tokenizer.data)
    stream = documents(tokenizer.data.train_paths, tokenizer.get_bos_token_id(), epochs=itertools.count(1))
    return batches(packed(stream, T + 1), B, T, torch.device(device or default_device()))


def batches(packed_rows: Iterator[tuple], B: int, T: int, device: torch.device) -> Iterator[tuple]:
    """Batches of packed rows, copied to the device while the host goes on.

    A pinned buffer is filled again only when its copy is done, which can wait for a whole backward pass.
    With a single buffer and no event one batch was trained on twice and another one never.
    """
    is_cuda = device.type == "cuda"
    buffers = [torch.empty(B, T + 1, dtype=torch.int64, pin_memory=is_cuda) for _ in range(3)]
    copied = [torch.cuda.Event() if is_cuda else None for _ in buffers]
    for slot in itertools.cycle(range(len(buffers))):
        CLOCK.require_running()
        if is_cuda:
            copied[slot].synchronize()
        for row in buffers[slot].numpy():
            row[:], epoch = next(packed_rows)
        rows = buffers[slot].to(device, non_blocking=is_cuda)
        if is_cuda:
            copied[slot].record()
        yield rows[:, :-1].clone(), rows[:, 1:].clone(), epoch


# == Metric ==================================================================================================


@torch.no_grad()
def evaluate_bpb(model: Callable, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of the validation rows: their losses in nats / (ln 2 * bytes of their targets).

    `model(inputs)` gets int64 (B, T) and returns logits (B, T, V); it never sees the targets. The number
    does not depend on `batch_size`, which is halved where memory runs out. Targets of no bytes (special
    tokens) are left out. Inside an Experiment this ends the training. Raises MetricError if the logits are
    not finite or of another shape, or if the model fails a probe.
    """
    CLOCK.stop(tokenizer.data)
    parameters = model.parameters() if hasattr(model, "parameters") else iter(())
    first = next(parameters, None)
    device = default_device() if first is None else first.device
    rows = torch.from_numpy(tokenizer.data.rows.astype(np.int64)).to(device)
    # at most half of the rows, so that a probe's row can be chosen from two batches or more
    batch = min(max(1, batch_size), LOGITS_BYTES // (4 * MAX_SEQ_LEN * VOCAB_SIZE), len(rows) // 2)
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    while batch:
        try:
            losses = score(model, rows, batch)
            break
        except torch.OutOfMemoryError:
            batch //= 2
    if not batch:
        raise MetricError("out of memory with a single validation row; make the model smaller")
    if was_training:
        model.train()
    token_bytes = tokenizer.token_bytes.to(device)[rows[:, 1:]]
    nats = losses[token_bytes > 0].cpu().double().sum().item()
    val_bpb = nats / (math.log(2) * token_bytes.sum().item())
    CLOCK.finish(val_bpb)
    return val_bpb


def score(model: Callable, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Losses, float32 (rows, T) in nats, of a model that stands the probes.

    The first batch is asked four times: twice in a row, for the noise of the model itself, then after all
    other batches and after the probes. A model that learns from what it is asked answers differently by then.
    """
    # batches of one shape, so that nothing is compiled twice: the last one is filled up with the first rows
    padded = math.ceil(len(rows) / batch) * batch
    index = torch.arange(padded, device=rows.device) % len(rows)
    row_batches = rows[index].split(batch)
    first = row_batches[0]
    first_losses = token_losses(model, first)

    def change_of_first() -> float:
        return (token_losses(model, first) - first_losses).abs().max().item()

    noise = change_of_first()
    if noise > NOISE_LIMIT:
        found = f"two identical calls of the model differ by {noise:.3g} nat"
        raise MetricError(f"{found}, more than {NOISE_LIMIT:.3g}")

    def require_unchanged() -> None:
        change = change_of_first()
        allowed = max(TOLERANCE, 3 * noise)  # with a margin: noise was measured once
        if change > allowed:
            found = f"the same rows moved by {change:.3g} nat, more than {allowed:.3g}"
            raise MetricError(f"the evaluation must leave the model as it is, but {found}")

    other_losses = [token_losses(model, other) for other in row_batches[1:]]
    losses = torch.cat([first_losses] + other_losses)[: len(rows)]
    require_unchanged()
    # the probes take the largest change of PROBES + 10 rows, so their noise is larger still
    probe(model, rows, losses, batch, allowed=max(TOLERANCE, 10 * noise))
    require_unchanged()
    return losses


def token_losses(model: Callable, rows: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
    """Losses, float32 (B, T) in nats, of the targets of rows (B, T+1), given `inputs` or their own."""
    if inputs is None:
        inputs = rows[:, :-1].clone()  # not a view, from which the model could reach the last target
    logits = model(inputs)
    wanted = (*inputs.shape, VOCAB_SIZE)
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != wanted:
        found = f"model(inputs) returned {found}, not logits of shape {wanted}"
        raise MetricError(f"{found}; the metric computes the loss")
    lowest, highest = torch.aminmax(logits)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise MetricError("the model's logits are not finite; look for an overflow or a division by zero")
    few = max(1, 2**22 // (MAX_SEQ_LEN * VOCAB_SIZE))  # rows at a time, so that the float32 copies stay small
    cross_entropy = torch.nn.CrossEntropyLoss(reduction="none")
    losses = []
    for some_logits, some_targets in zip(logits.split(few), rows[:, 1:].split(few), strict=True):
        losses.append(cross_entropy(some_logits.flatten(0, 1).float(), some_targets.flatten()))
    losses = torch.cat(losses).view(inputs.shape)
    if not torch.isfinite(losses).all():  # finite logits can be too far apart
        raise MetricError("the losses of the model's logits are not finite; keep logits within some hundreds")
    return losses


def probe(model: Callable, rows: torch.Tensor, losses: torch.Tensor, batch: int, allowed: float) -> None:
    """Raise MetricError if the future, or another row, moves a loss by more than `allowed` nat.

    A row is asked again among other rows, and its inputs from position `cut` on are those of another row.
    The losses of its own targets at positions 0 .. cut-1 must not move. A model that sees one token ahead is
    found out only at cut-1: the target there is the token at `cut`, which was replaced in the inputs. The row
    keeps its place in the batch, because kernels may round differently in another one.
    """
    T = MAX_SEQ_LEN
    rng = np.random.default_rng(0)
    tokens = rows.cpu().numpy()
    worth = np.bincount(tokens.ravel(), minlength=VOCAB_SIZE).astype(float)

    def choose_row(place: int, cut: int) -> int:
        """Of the rows scored at this place of a batch one with the commonest unprobed token before the cut.

        A leak may open after one particular token only. After a common one it would move the score most, so
        common ones come first; PROBES is large enough to reach rare ones, too.
        """
        candidates = place + batch * rng.permutation(len(rows) // batch)
        before_cut = tokens[candidates, cut - 1]
        best = worth[before_cut].argmax()
        worth[before_cut[best]] *= 1e-6  # not to 0: when all were probed, the commonest is the first again
        return candidates[best]

    cuts = probe_cuts(rng)
    calls = math.ceil(len(cuts) / batch)
    for cut_B in np.resize(cuts, (calls, batch)):  # the last call is filled up with the first cuts
        probed_B = np.array([choose_row(place, cut) for place, cut in enumerate(cut_B)])
        other_B = (probed_B + rng.integers(1, len(rows))) % len(rows)  # never the row itself
        before_cut_BT = torch.from_numpy(np.arange(T) < cut_B[:, None]).to(rows.device)
        inputs = torch.where(before_cut_BT, rows[probed_B, :-1], rows[other_B, :-1])
        change_BT = (token_losses(model, rows[probed_B], inputs) - losses[probed_B]).abs() * before_cut_BT
        largest = change_BT.max().item()
        if largest > allowed:
            place, position = divmod(int(change_BT.argmax()), T)
            found = f"the prediction at position {position} moves by {largest:.3g} nat"
            where = f"when inputs from position {cut_B[place]} on and other rows are replaced"
            remedy = "a model must see only the past of its own row"
            raise MetricError(f"{found}, more than {allowed:.3g}, {where}; {remedy}")


def probe_cuts(rng: np.random.Generator) -> np.ndarray:
    """PROBES cuts, spread over 1 .. T-1 as a leak may begin anywhere, and the last ten on top."""
    T = MAX_SEQ_LEN
    spread = 1 + ((np.arange(PROBES) + rng.random(PROBES)) * (T - 1) / PROBES).astype(int)
    return rng.permutation(np.concatenate([spread, np.arange(T - 10, T)]))


# == Notebook ================================================================================================
# Each experiment has one ref below refs/autoresearch, named by its start. It holds a commit `unfinished`, and
# when the run ends, unless it is killed, a commit with the outcome instead. These commits are the record;
# results.tsv is a view of it.

COLUMNS = "commit val_bpb memory_gb status description seed steps seconds branch code fingerprint".split()
GIT_LOCATION = (  # set by a hook or an editor, these would lead git to another repository
    "GIT_DIR GIT_WORK_TREE GIT_COMMON_DIR GIT_INDEX_FILE GIT_PREFIX GIT_NAMESPACE "
    "GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES"
).split()


class Run(NamedTuple):
    """One experiment, as its commit records it."""

    status: str  # unfinished, or what became of it: see Outcome.failure and Notebook.compare
    val_bpb: float  # not a number without a score
    seed: int
    code: str  # the blob of its train.py
    fingerprint: str
    description: str = ""
    branch: str = ""
    steps: int = 0
    memory_gb: float = 0.0
    seconds: float = 0.0
    commit: str = ""  # short hash
    ref: str = ""

    @property
    def has_score(self) -> bool:
        return math.isfinite(self.val_bpb)

    def fields(self) -> dict[str, str]:
        """The fields as text, as they stand in the commit and in results.tsv."""
        numbers = {"val_bpb": f"{self.val_bpb:.6f}", "memory_gb": f"{self.memory_gb:.1f}"}
        values = self._asdict() | numbers | {"seconds": f"{self.seconds:.0f}"}
        return {name: str(values[name]) for name in COLUMNS}

    def message(self, number: str, details: str) -> str:
        """The text of the commit. The first block of its body is all that later runs need to know."""
        block = "\n".join(f"{name}: {value}" for name, value in self.fields().items() if name != "commit")
        return f"val_bpb {number}: {self.description}\n\n{block}\n\n{details}"

    @classmethod
    def parse(cls, text: str) -> "Run":
        """From the text of a commit; ValueError or TypeError if it is no record. Other keys are ignored."""
        _, _, body = text.partition("\n\n")
        block, _, _ = body.partition("\n\n")
        values = dict(line.split(": ", 1) for line in block.split("\n"))
        known = {name: kind(values[name]) for name, kind in cls.__annotations__.items() if name in values}
        return cls(**known)


class Outcome(NamedTuple):
    """How a run ended, as Experiment saw it."""

    failure: str  # crash, invalid, timeout or stopped; empty if there is a score
    val_bpb: float
    steps: int
    memory_gb: float
    seconds: float
    details: str  # summary, error and traceback, for people


class Verdict(NamedTuple):
    """What became of a run, why, and the command to run next."""

    status: str
    reason: str
    next: str


# -- git


class GitError(OSError):
    """What git complained of, in one line."""


def git_bytes(*command: str, input: bytes | None = None, env: dict | None = None) -> bytes:
    """What a git command prints, run in this folder; GitError if it fails, OSError if there is no git."""
    environment = {name: value for name, value in os.environ.items() if name not in GIT_LOCATION}
    options = {"env": environment | (env or {}), "cwd": HERE, "check": True, "capture_output": True}
    durable = ("-c", "core.fsync=loose-object,reference")  # a commit must survive a power cut
    try:
        return subprocess.run(["git", *durable, *command], input=input, **options).stdout
    except subprocess.CalledProcessError as error:
        complaint = error.stderr.decode("utf-8", "replace") or str(error)
        raise GitError(" ".join(complaint.split())) from None


def git(*command: str, input: bytes | None = None, env: dict | None = None) -> str:
    return git_bytes(*command, input=input, env=env).decode("utf-8", "replace").strip()


def make_commit(tree: str, parent: str, message: str) -> tuple[str, str]:
    """Write a commit object, which moves no branch; its full and its short hash."""
    command = ("commit-tree", tree, "-p", parent, "-F", "-")
    text = message.replace("\0", "").encode("utf-8", "replace")
    try:
        commit = git(*command, input=text)
    except GitError:  # it knows no user name or e-mail here
        names = "GIT_AUTHOR_NAME GIT_AUTHOR_EMAIL GIT_COMMITTER_NAME GIT_COMMITTER_EMAIL".split()
        commit = git(*command, input=text, env=dict.fromkeys(names, "autoresearch"))
    return commit, git("rev-parse", "--short", commit)


def tree_with(code: str, head: str, folder: Path) -> str:
    """HEAD's tree with the blob `code` as its train.py, made in an index of its own."""
    mode = git("ls-tree", head, "train.py").split()[0]
    name = git("rev-parse", "--show-prefix") + "train.py"
    with tempfile.TemporaryDirectory(suffix=".tmp", dir=folder) as temporary:
        env = {"GIT_INDEX_FILE": f"{temporary}/index"}
        git("read-tree", head, env=env)
        git("update-index", "--cacheinfo", f"{mode},{code},{name}", env=env)
        return git("write-tree", env=env)


def history() -> dict[str, str]:
    """{short hash: blob of its train.py} of HEAD and the commits before it, up to 1,000."""
    commits = git("rev-list", "--abbrev-commit", "-n", "1000", "HEAD").split()
    question = "".join(f"{commit}:./train.py\n" for commit in commits)
    answers = git("cat-file", "--batch-check", input=question.encode()).splitlines()
    return {commit: answer.split()[0] for commit, answer in zip(commits, answers, strict=True)}


def from_here(command: str) -> str:
    """The command as it works in the folder in which the user is."""
    if command.startswith("#") or Path.cwd() == HERE:
        return command
    return f"cd {shlex.quote(str(HERE))} && {command}"


# -- the record


def read_runs(is_again: bool = False) -> list[Run]:
    """All runs of the repository in the order of their starts. Refs that hold none are printed, but once."""
    runs = []
    refs = git("for-each-ref", "--format=%(objectname) %(objectname:short) %(refname)", REFS).splitlines()
    objects = read_objects([line.split()[0] for line in refs])
    for line in refs:
        name, commit, ref = line.split()
        try:
            _, _, text = objects[name].partition("\n\n")
            runs.append(Run.parse(text)._replace(commit=commit, ref=ref))
        except (KeyError, ValueError, TypeError):
            if not is_again:
                print(f"note: {ref} cannot be read, or is not the record of a run; it is left out")
    return runs


def read_objects(names: list[str]) -> dict[str, str]:
    """{name: text} of git objects, without those that cannot be read."""
    try:
        answers = io.BytesIO(git_bytes("cat-file", "--batch", input="\n".join(names).encode()))
    except GitError:  # it ends at the first damaged one: look for it in both halves
        half = len(names) // 2
        if not half:
            return {}
        return read_objects(names[:half]) | read_objects(names[half:])
    objects = {}
    for name in names:
        header = answers.readline().split()  # name, type and size; or name and `missing`
        if len(header) == 3:
            objects[name] = answers.read(int(header[2])).decode("utf-8", "replace")
            answers.readline()
    return objects


def write_results(runs: Iterable[Run]) -> None:
    """Write the record as a table, in the order of the starts. Another file of that name is moved aside."""
    header = "\t".join(COLUMNS) + "\n"
    if RESULTS.is_file() and not RESULTS.read_bytes().startswith(header.encode()):
        aside = RESULTS.with_name(f"{RESULTS.name}.{time_stamp()}")
        RESULTS.rename(aside)
        print(f"note: {RESULTS.name} was written by something else; it is {aside.name} now", flush=True)
    with published(RESULTS) as file:
        file.write(header.encode())
        for run in sorted(runs, key=lambda run: run.ref):
            row = run.fields() | {"code": run.code[:12]}
            file.write(("\t".join(row.values()) + "\n").encode())


def time_stamp() -> str:
    """UTC, to the millisecond: names that begin with it are in the order of time."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")[:-3] + "Z"


# -- the verdict


def judge(candidate: list[float], incumbent: list[float], sigma: float) -> tuple[str, float, float]:
    """Status (`keep`, `discard` or `maybe`), gain and its standard error, in bits per byte.

    The lists hold val_bpb, one a seed, in the order of the runs. gain = mean(incumbent) - mean(candidate),
    se = sigma * sqrt(1 / n_incumbent + 1 / n_candidate). Every run of the incumbent counts, of the candidate
    only the first two: more repeats cannot make it win. A gain must repeat, unless it is beyond doubt.
    """
    candidate = candidate[:2]
    gain = fmean(incumbent) - fmean(candidate)
    se = sigma * math.sqrt(1 / len(incumbent) + 1 / len(candidate))
    if gain <= 0:
        status = "discard"
    elif gain >= SURE_SE * se:
        status = "keep"
    elif len(candidate) == 1:
        status = "maybe"
    else:
        status = "keep" if gain >= KEEP_SE * se else "discard"
    return status, gain, se


def pooled_sigma(groups: Iterable[list[float]], default: float) -> float:
    """Standard deviation between seeds: squares about each group's mean, over n - 1.

    The default counts like four squares, so that two runs that happen to agree do not make noise vanish. Only
    the last three groups count: a weak model at the beginning of a night is ten times as noisy.
    """
    repeated = [group for group in groups if len(group) > 1][-3:]
    squares = 4 * default**2 + sum(len(group) * np.var(group) for group in repeated)
    freedom = 4 + sum(len(group) - 1 for group in repeated)
    return math.sqrt(squares / freedom)


def comparable(runs: Iterable[Run], fingerprint: str) -> dict[str, list[Run]]:
    """Runs with a score, by code, in the order of their starts; of each seed the first.

    A run whose seed was chosen by somebody does not count, so that nobody looks for a lucky one.
    """
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in sorted(runs, key=lambda run: run.ref):
        if run.fingerprint == fingerprint and run.has_score and run.status != "reproduced":
            groups[run.code].setdefault(run.seed, run)
    return {code: list(seeds.values()) for code, seeds in groups.items()}


def scores(runs: list[Run]) -> list[float]:
    return [run.val_bpb for run in runs]


def described(runs: list[Run]) -> str:
    """Scores with their numbers of steps; a single one with its seed, too."""
    values = " and ".join(f"{run.val_bpb:.6f}" for run in runs)
    seed = f"seed {runs[0].seed}, " if len(runs) == 1 else ""
    return f"{values} ({seed}{' and '.join(str(run.steps) for run in runs)} steps)"


# -- the notebook


@dataclass(frozen=True)
class Notebook:
    """The record of an experiment that is under way. Branch, index and tracked files are never touched."""

    run: Run
    head: str  # commit
    incumbent: str  # blob of HEAD's train.py, which the run is compared with
    tree: str  # HEAD's, with the train.py that runs
    unfinished: str  # commit that the ref holds until the run ends
    seed_is_chosen: bool
    lock: object  # until this process ends

    @classmethod
    def open(cls, description: str, fingerprint: str, seed: int | None = None) -> "Notebook":
        """Begin a record. If no seed is given, it is the lowest from 42 up that this code has not finished.

        Raises AutoresearchError for a run that cannot be compared, OSError for one that cannot be recorded.
        """
        branch = git("branch", "--show-current")
        if not branch:
            found = "HEAD is on no branch, what is kept could be lost"
            raise AutoresearchError(f"{found}; make one: git switch -c autoresearch/TAG")
        head, incumbent, ground = git("rev-parse", "HEAD", "HEAD:./train.py", "HEAD:./prepare.py").split()
        found = git("hash-object", "prepare.py")
        if found != ground:
            remedy = from_here(f"mv prepare.py prepare.py.edited-{found[:7]} && git restore -SW prepare.py")
            raise AutoresearchError(f"prepare.py differs from HEAD's, scores would not compare; {remedy}")
        folder = Path(git("rev-parse", "--absolute-git-dir"), "autoresearch")
        lock = locked(folder, "run")  # one at a time in a work tree
        for left_by_a_killed_run in HERE.glob(f"{RESULTS.name}.*.tmp"):
            left_by_a_killed_run.unlink(missing_ok=True)
        code = git("hash-object", "-w", "--path", "train.py", "--stdin", input=running_source())

        runs = read_runs()
        finished = {run.seed for run in comparable(runs, fingerprint).get(code, [])}
        next_seed = next(number for number in itertools.count(42) if number not in finished)
        run = Run(
            status="unfinished",
            val_bpb=math.nan,
            seed=next_seed if seed is None else seed,
            code=code,
            fingerprint=fingerprint,
            description=description,
            branch=branch,
        )
        tree = tree_with(code, head, folder)
        message = run.message("nan (unfinished)", "The run goes on, or it was killed.\n")
        unfinished, commit = make_commit(tree, head, message)
        run = run._replace(commit=commit, ref=f"{REFS}{time_stamp()}-{commit}")
        write_results(runs + [run])  # first, because it may fail
        git("update-ref", run.ref, unfinished, "")  # the empty text: the ref must not exist yet
        others = git("diff", "--name-only", "HEAD", "--", ":/", ":!train.py").splitlines()
        if others:
            print("note: other edits are left alone:", " ".join(others)[:200])
        notebook = cls(run, head, incumbent, tree, unfinished, seed is not None, lock)
        remedy = notebook.remedy(runs, commit)
        if remedy and seed is None:
            found = f"HEAD's train.py has no score with fingerprint {fingerprint}"
            print(f"note: {found}, so this run cannot be judged; {from_here(remedy)}")
        return notebook

    @property
    def is_baseline(self) -> bool:
        return self.run.code == self.incumbent

    def close(self, outcome: Outcome) -> Verdict:
        """Judge the run, replace the unfinished commit by one with the outcome, say what comes next."""
        # read again: other work trees may have measured something in the meantime
        others = [run for run in read_runs(is_again=True) if run.ref != self.run.ref]
        failure, val_bpb, steps, memory_gb, seconds, details = outcome
        run = self.run._replace(val_bpb=val_bpb, steps=steps, memory_gb=memory_gb, seconds=seconds)
        status, number, reason = failure, f"nan ({failure})", ""
        if not failure:
            status, number, reason = self.compare(run, others)
        run = run._replace(status=status)
        commit, short = make_commit(self.tree, self.head, run.message(number, details))
        git("update-ref", run.ref, commit, self.unfinished)
        run = run._replace(commit=short)
        try:
            write_results(others + [run])
        except OSError as error:
            print(f"note: {RESULTS.name} was not written ({error}); git has the record", flush=True)
        try:
            notes = [line for line in (reason, self.save_edits(others)) if line]
            return Verdict(status, "\n".join(notes), from_here(self.next_command(run, others)))
        except OSError as error:
            return Verdict(status, f"the run is recorded, but: {error}", "# look after train.py yourself")

    def compare(self, run: Run, others: list[Run]) -> tuple[str, str, str]:
        """Status, the number in the commit's subject and the reasons, for a run that has a score."""
        shown = f"{run.val_bpb:.6f}"
        if self.seed_is_chosen:
            return "reproduced", f"{shown} (seed {run.seed})", "SEED is set, so this run is not judged"
        if self.remedy(others, run.commit):
            return "unjudged", f"{shown} (unjudged)", "HEAD's train.py has no score to compare with"
        groups = comparable(others + [run], run.fingerprint)
        mine = groups[run.code]
        if self.is_baseline:
            reason = f"this is HEAD's train.py, mean {fmean(scores(mine)):.6f} of {len(mine)} run(s)"
            return "keep" if len(mine) == 1 else "baseline", shown, reason
        if self.incumbent not in groups:
            return "keep", f"{shown} (first score)", "HEAD's train.py failed, so any score is a beginning"
        theirs = groups[self.incumbent]
        sigma = pooled_sigma([scores(group) for group in groups.values()], SIGMA)
        status, gain, _ = judge(scores(mine), scores(theirs), sigma)
        mine = mine[:2]
        reason = f"{described(mine)} against {described(theirs)}; gain {gain:+.6f}, sigma {sigma:.4f}"
        ratio = fmean(run.steps for run in mine) / max(1, fmean(run.steps for run in theirs))
        if ratio and not 0.95 <= ratio <= 1.05:
            again = from_here("uv run train.py baseline")
            doubt = "unless the idea takes or saves time, the machine changed its speed"
            reason += f"\n{ratio:.2f} times as many steps as HEAD's train.py: {doubt}"
            reason += f"; when this idea is decided, measure the branch again: {again}"
        seeds = "2 seeds" if len(mine) == 2 else "1 seed"
        return status, f"{fmean(scores(mine)):.6f} ({-gain:+.6f}, {seeds})", reason

    def remedy(self, runs: list[Run], commit: str) -> str:
        """The command that brings a score to judge this run by; "" if it can be judged.

        A run is compared with HEAD's train.py, which must have a score with this fingerprint. If it never had
        any score, but a commit before HEAD has one that compares, HEAD was committed by hand, and the run is
        to be compared with that commit. Otherwise any score is a beginning if this run is HEAD's train.py
        itself, or if that has failed. `commit` holds the train.py of this run.
        """
        measured = comparable(runs, self.run.fingerprint)
        if self.incumbent in measured:
            return ""
        incumbents = [run for run in runs if run.code == self.incumbent and run.status != "reproduced"]
        if not any(run.has_score for run in incumbents):
            for ancestor, code in history().items():
                if code in measured:
                    return f"git reset --soft {ancestor}"
        failed = [run for run in incumbents if run.status in ("crash", "invalid", "timeout")]
        if self.is_baseline or any(run.fingerprint == self.run.fingerprint for run in failed):
            return ""
        bring_back = f"git restore -s {commit} train.py"
        return f"git restore -SW train.py && {{ uv run train.py baseline; {bring_back}; }}"

    def save_edits(self, others: list[Run]) -> str:
        """Copy versions of train.py that were never measured, so that the printed command destroys none."""
        measured = {run.code for run in others}
        measured |= {self.run.code, self.incumbent, git("rev-parse", "HEAD:./train.py")}
        versions = {line.split()[1] for line in git("ls-files", "-s", "train.py").splitlines()}
        if (HERE / "train.py").exists():
            versions.add(git("hash-object", "-w", "train.py"))
        names = []
        for version in versions - measured:
            name = f"train.py.edited-{version[:7]}"
            (HERE / name).write_bytes(git_bytes("cat-file", "blob", version))
            names.append(name)
        return f"train.py was edited meanwhile; the edit is saved as {' and '.join(names)}" if names else ""

    def next_command(self, run: Run, others: list[Run]) -> str:
        bring_back = f"git restore -s {run.commit} train.py"
        if git("rev-parse", "HEAD") != self.head:
            return f"{bring_back}  # HEAD moved during the run; this is what was measured"
        if run.status == "unjudged":
            return self.remedy(others, run.commit)
        if run.status == "keep":
            command = f"git merge -q --ff-only --autostash {run.commit}"
        elif run.status in ("maybe", "stopped"):
            command = f"uv run train.py {shlex.quote(run.description)}"
        else:
            return "# edit train.py" if self.is_baseline else "git restore -SW train.py"
        was_edited = not (HERE / "train.py").exists() or git("hash-object", "train.py") != run.code
        if was_edited and not (self.is_baseline and run.status == "keep"):  # that merge leaves train.py alone
            return f"{bring_back} && {command}"
        return command


def running_source() -> bytes:
    """train.py's bytes, after a check that they are what runs: compiled, they equal the code on the stack."""
    source = (HERE / "train.py").read_bytes()
    running = [frame.f_code for frame, _ in traceback.walk_stack(None)]
    try:
        code = compile(source, "train.py", "exec", dont_inherit=True)
    except SyntaxError:
        code = None
    if code not in running:
        raise AutoresearchError("train.py was edited while this run started; run it again")
    return source


# == Experiment ==============================================================================================


class TrainingLog:
    """`run.log`: the line of progress. Losses are read two steps late, so that the host never waits."""

    def __init__(self, device: torch.device, bytes_per_token: float):
        self.is_cuda = device.type == "cuda"
        name = known_name(torch.cuda.get_device_name(device)) if self.is_cuda else ""
        self.peak_flops = 1e12 * PEAK_TFLOPS.get(name, 0.0)
        self.bytes_per_token = bytes_per_token
        self.losses = torch.zeros(4, pin_memory=self.is_cuda)
        self.checked = 0  # losses that have been read
        self.average_loss = math.nan
        self.steps = 0
        self.tokens = 0
        self.epoch = 0
        self.flops = 0.0
        self.shown = np.zeros(4)  # seconds, steps, tokens and FLOPs at the last line

    def __call__(
        self,
        loss: torch.Tensor,
        tokens: int = 0,
        flops_per_token: float = 0.0,
        lr_frac: float = math.nan,
        epoch: int = 0,
    ) -> None:
        """Report a step: its mean loss, 0-D in nats, and what it consisted of. A line comes every 10 s.

        Raises AutoresearchError if the loss of two steps ago is not a number or has exploded. A run that
        never logs is scored all the same.
        """
        self.losses[self.steps % 4].copy_(loss.detach(), non_blocking=self.is_cuda)
        self.check(self.steps - 1)
        self.steps += 1
        self.tokens += tokens
        self.epoch = epoch
        self.flops += tokens * flops_per_token
        elapsed = time.perf_counter() - CLOCK.started_s
        if self.checked and elapsed - self.shown[0] >= LOG_SECONDS:
            self.show(elapsed, lr_frac)

    def check(self, steps: int) -> None:
        """Read the losses of the first `steps`; AutoresearchError if one is not a number, or has exploded."""
        for step in range(self.checked, steps):
            loss = self.losses[step % 4].item()
            if not (math.isfinite(loss) and loss <= LOSS_LIMIT):
                found = f"step {step}: the loss is {loss:.4g}, not a number up to {LOSS_LIMIT}"
                raise AutoresearchError(f"{found}; lower the learning rates, or warm up")
            self.average_loss = loss if step == 0 else 0.9 * self.average_loss + 0.1 * loss
            self.checked = step + 1

    def show(self, elapsed: float, lr_frac: float) -> None:
        now = np.array([elapsed, self.steps, self.tokens, self.flops])
        seconds, steps, tokens, flops = now - self.shown
        self.shown = now
        bits_per_byte = self.average_loss / math.log(2) / self.bytes_per_token
        parts = [
            f"step {self.steps:5d}",
            f"{min(1, elapsed / TIME_BUDGET):4.0%}",
            f"loss {self.average_loss:.4f} nat, {bits_per_byte:.3f} bpb",
            f"lr {lr_frac:.2f}",
            f"{1000 * seconds / steps:.0f} ms/step",
            f"{tokens / seconds:,.0f} tok/s",
            f"mfu {self.mfu(flops, seconds)}",
            f"epoch {self.epoch}",
            f"{max(0, TIME_BUDGET - elapsed):.0f} s left",
        ]
        print(" | ".join(parts), flush=True)

    def mfu(self, flops: float, seconds: float) -> str:
        """Model FLOPs utilization: percent of the device's peak that the model's own computing takes."""
        return f"{100 * flops / seconds / self.peak_flops:.2f}" if flops and self.peak_flops else "n/a"


class Experiment:
    """One run of train.py: `with Experiment(description) as run:` around all of it.

    run.steps() is the clock, run.log() the line of progress; evaluate_bpb ends the training; run.summary()
    prints the result. With a description a run of train.py is recorded and judged, without one its score is
    printed and that is all. `run.exit_code` is 0 if there is a score, recorded if it was to be.
    """

    def __init__(self, description: str = ""):
        text = description.encode("utf-8", "replace").decode()  # without lone surrogates
        self.description = " ".join(text.split())
        if len(self.description) > 200:
            print("note: the description is cut after 200 characters", flush=True)
            self.description = self.description[:200].rstrip()
        self.device = default_device()
        self.exit_code = 1
        self.notebook: Notebook | None = None
        self.told: dict[str, float | str] = {}  # what train.py knows of the result
        self.has_ended = threading.Event()
        self.finishing = threading.Lock()
        self.stderr = sys.__stderr__ or open(os.devnull, "w")  # a shell can close it

    def __enter__(self) -> "Experiment":
        try:
            self._begin()
        except BaseException:
            self.__exit__(*sys.exc_info())
            sys.exit(1)
        return self

    def _begin(self) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
        print_any_text()
        if self.description.startswith("--"):  # a mistyped option must not train for five minutes
            found = f"there is no option {self.description}"
            raise AutoresearchError(f"{found}; a description does not begin with --, see train.py --help")
        keep_freed_memory()
        torch.set_num_threads(cpu_threads())
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        if wanted.isdigit() and int(wanted) > cpu_threads():
            print(f"note: OMP_NUM_THREADS is {wanted}, but only {cpu_threads()} CPUs may be used, and are")

        tokenizer = Tokenizer.from_directory()
        self.data = tokenizer.data
        self.fingerprint = self.data.fingerprint(self.device)
        chosen_seed = os.environ.get("SEED")
        if chosen_seed is not None and not re.fullmatch(r"\d{1,9}", chosen_seed):
            raise AutoresearchError(f"SEED is {chosen_seed!r}, not 1 to 9 digits; unset it")
        self.seed = int(chosen_seed or 42)
        CLOCK.begin(self.device, self.seed, self.data)
        bytes_per_token = tokenizer.token_bytes[self.data.rows[:, 1:]].double().mean().item()
        self.log = TrainingLog(self.device, bytes_per_token)
        if self.description and Path(sys.argv[0]).resolve() == HERE / "train.py":
            try:
                seed = None if chosen_seed is None else self.seed
                self.notebook = Notebook.open(self.description, self.fingerprint, seed)
            except OSError as error:
                remedy = "fix that, or run without a description, which records nothing"
                raise AutoresearchError(f"the run cannot be recorded: {error}; {remedy}") from None
            self.seed = CLOCK.seed = self.notebook.run.seed
        check_constants()
        torch.manual_seed(self.seed)

        kind = "experiment" if self.notebook else "plain run, not recorded"
        print(f"{kind}: {SCALE} scale, {TIME_BUDGET} s, seed {self.seed}, {device_name(self.device)}")
        corpus = self.data.folder.name.removesuffix(f"-{SCALE}")
        tokens = self.data.train_tokens
        epoch = f"at most {tokens // (MAX_SEQ_LEN + 1):,} rows an epoch, {bytes_per_token:.2f} bytes a token"
        print(f"corpus: {corpus}, {tokens:,} training tokens, {epoch}", flush=True)

        self.data_check = ThreadPoolExecutor(1).submit(self.data.verify)
        threading.Thread(target=self._watch, daemon=True).start()
        # for a hang that holds the interpreter, so that no thread runs; its record stays unfinished
        faulthandler.dump_traceback_later(TIME_BUDGET + GRACE + 30, exit=True, file=self.stderr)

    def _watch(self) -> None:
        if not self.has_ended.wait(TIME_BUDGET + GRACE):
            faulthandler.dump_traceback(file=self.stderr)
            found = f"error: not done in {TIME_BUDGET + GRACE} s"
            self._finish("timeout", f"{found}; the stacks above show where it hangs")
            os._exit(self.exit_code)

    def steps(self) -> Iterator[tuple[int, float]]:
        """(step, progress) of every training step; progress is the used fraction of TIME_BUDGET, 0 to 1.

        Ends before a step that would pass the budget. On CUDA the host runs at most one step ahead of the
        device. Raises AutoresearchError if a file of the corpus was altered.
        """
        self.data_check.result()
        yield from CLOCK.steps()
        CLOCK.synchronize()
        self.log.check(self.log.steps)

    def summary(self, **told: float | str) -> None:
        """Print `---` and the result, `key: value` lines.

        What train.py tells: num_params_M, depth, attention (its back end), otherwise "n/a"; and mfu_percent,
        total_tokens_M, num_steps, otherwise as logged. Other keys are ignored.
        """
        self.told = told
        log = self.log
        if log.tokens:
            share = log.tokens / self.data.train_tokens
            epoch = f", up to epoch {log.epoch}" if log.epoch else ""
            print(f"read {log.tokens:,} tokens, {share:.2f} of the corpus{epoch}")
        print("---", self._summary(), sep="\n", flush=True)

    def _summary(self) -> str:
        log = self.log
        told = self.told
        values = {
            "val_bpb": f"{CLOCK.val_bpb:.6f}",
            "training_seconds": CLOCK.training_seconds,
            "total_seconds": time.perf_counter() - CLOCK.begun_s,
            "peak_vram_mb": peak_memory_mb(self.device),
            "mfu_percent": told.get("mfu_percent", log.mfu(log.flops, CLOCK.training_seconds)),
            "total_tokens_M": told.get("total_tokens_M", log.tokens / 1e6 or "n/a"),
            "num_steps": told.get("num_steps", log.steps or "n/a"),
            "num_params_M": told.get("num_params_M", "n/a"),
            "depth": told.get("depth", "n/a"),
            "startup_seconds": CLOCK.started_s - CLOCK.begun_s,
            "eval_seconds": CLOCK.finished_s - CLOCK.stopped_s,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "attention": told.get("attention", "n/a"),
        }
        lines = []
        for key, value in values.items():
            digits = 2 if key == "mfu_percent" else 1
            shown = f"{value:.{digits}f}" if isinstance(value, float) else value
            lines.append(f"{key + ':':<18}{shown}")
        return "\n".join(lines)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):  # nothing may cut off the record
            handlers[number] = signal.signal(number, signal.SIG_IGN)
        if error is None and math.isnan(CLOCK.val_bpb):
            error = MetricError("the run ended without a score; call evaluate_bpb once, after the training")
        failure = ""
        message = f"error: {error}" if error else ""
        if isinstance(error, KeyboardInterrupt):
            failure = "stopped"
            message = "error: interrupted, so there is no score; start the run again"
        elif isinstance(error, MetricError):
            failure = "invalid"
        elif error:
            failure = "crash"
            if not isinstance(error, AutoresearchError):
                lines = "".join(traceback.format_exception(error)).splitlines()
                if len(lines) > 30:  # an agent reads the end of the log
                    lines[5:-24] = ["  ..."]
                message = "\n".join(lines)
        self._finish(failure, message)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return True  # the error is printed and recorded, not raised

    def _finish(self, failure: str, message: str) -> None:
        """The end of a run, whichever thread comes first: say what went wrong, record, print the verdict."""
        with self.finishing:
            if self.has_ended.is_set():
                return
            self.has_ended.set()
            CLOCK.is_idle = True
            self.exit_code = 1 if failure else 0
            with contextlib.suppress(OSError):  # nobody may be there to read it
                print(end="", flush=True)
                if message:
                    print(message, file=sys.stderr, flush=True)
            faulthandler.cancel_dump_traceback_later()  # not before: a full pipe can block the lines above
            if self.notebook:
                self._record(failure, message)

    def _record(self, failure: str, message: str) -> None:
        steps = self.told.get("num_steps")
        outcome = Outcome(
            failure=failure,
            val_bpb=math.nan if failure else CLOCK.val_bpb,
            steps=steps if isinstance(steps, int) else self.log.steps,
            memory_gb=peak_memory_mb(self.device) / 1024,
            seconds=time.perf_counter() - CLOCK.begun_s,
            details=f"{self._summary()}\n\n{message}",
        )
        try:
            verdict = self.notebook.close(outcome)
        except OSError as error:
            self.exit_code = 1
            print(f"error: not recorded: {error}; fix that and run it again", file=sys.stderr, flush=True)
            return
        with contextlib.suppress(OSError):
            if verdict.reason:
                print(verdict.reason)
            print(f"status: {verdict.status:<11} next: {verdict.next}", flush=True)


# == Report ==================================================================================================


def report() -> None:
    """Say on the terminal how the night went, and draw it as progress.png."""
    try:
        runs = read_runs()
        codes = set(history().values())
        branch = git("branch", "--show-current")
    except OSError as error:
        raise AutoresearchError(f"there is no record to report: {error}") from None
    if not runs:
        raise AutoresearchError(f"{HERE}: no experiments yet; run: uv run train.py baseline")
    write_results(runs)
    on_branch = [run for run in runs if run.branch == branch]
    fingerprint = (on_branch or runs)[-1].fingerprint
    alike = [run for run in runs if run.fingerprint == fingerprint]
    groups = comparable(runs, fingerprint)
    kept = []  # for each code in HEAD's history its run with status keep, otherwise its first
    for code in groups.keys() & codes:
        merged = [run for run in groups[code] if run.status == "keep"]
        kept.append((merged or groups[code])[0])
    kept.sort(key=lambda run: run.ref)
    levels = [fmean(scores(groups[run.code])) for run in kept]
    print_night(runs, alike, kept, levels)
    print_pending([run for run in on_branch if run.status != "keep" or run.code not in codes], kept)
    print_branches(runs)
    try:
        draw(alike, kept, levels)
        print(f"\nchart: {HERE / 'progress.png'}")
    except ImportError:
        print("\nno chart: matplotlib is not installed; uv sync brings it")


def print_night(runs: list[Run], alike: list[Run], kept: list[Run], levels: list[float]) -> None:
    """Counts of all runs, then the kept ones with their scores (`levels`); `alike` runs can be compared."""
    hours = sum(run.seconds for run in runs) / 3600
    failed = sum(not run.has_score for run in runs)
    others = len(runs) - failed - len(kept)
    pace = f"{hours:.1f} hours of running, {len(runs) / max(hours, 1e-3):.1f} per hour"
    print(f"{len(runs)} experiments in {pace}")
    print(f"{len(kept)} kept on the last corpus and budget, {others} others, {failed} without a score")
    if len(alike) < len(runs):
        why = "another corpus, budget, version or device"
        print(f"{len(runs) - len(alike)} of them do not compare with the last one here: {why}")
    if levels and levels[0]:
        first = levels[0]
        best = min(levels)
        print(f"val_bpb {first:.6f} -> {best:.6f} ({best - first:+.6f}, {100 * (best / first - 1):+.2f} %)\n")

    lines = []
    for i, run in enumerate(kept):
        gain = f"{levels[i] - levels[i - 1]:+.6f}" if i else "-"
        lines.append(f"{run.commit}  {levels[i]:.6f}  {gain:>9}  {run.description}")
    if len(lines) > 20:
        print(f"the last 20 of {len(lines)} kept ones:")
    print("\n".join(lines[-20:]))


def print_pending(unmerged: list[Run], kept: list[Run]) -> None:
    """Runs of this branch after the last kept one that wait: kept but not merged, or undecided and newest."""
    last_kept = max((run.ref for run in kept), default="")
    pending = []
    for run in unmerged:
        is_undecided = run is unmerged[-1] and run.status in ("maybe", "stopped", "unfinished")
        if run.ref > last_kept and (run.status == "keep" or is_undecided):
            pending.append(run)
    for run in pending[-3:]:
        print(f"pending: {run.commit}  {run.val_bpb:.6f}  {run.status}: {run.description}")


def print_branches(runs: list[Run]) -> None:
    """A line for each branch, up to eight, so that agents with different instructions can be compared."""
    branches: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        branches[run.branch].append(run)
    for branch, own in list(branches.items())[-8:]:
        kept = [run for run in own if run.status == "keep"]
        fingerprint = own[-1].fingerprint
        alike = [run for run in own if run.fingerprint == fingerprint]
        groups = comparable(runs, fingerprint)
        judged = [run for run in alike if run.status == "keep" and run.code in groups]
        levels = [fmean(scores(groups[run.code])) for run in judged]
        hours = max(sum(run.seconds for run in alike) / 3600, 1e-3)
        gain = f", {(levels[0] - min(levels)) / hours:.4f} bpb an hour" if levels else ""
        print(f"branch {branch or '-'}: {len(own)} runs, {len(kept)} kept{gain}")


def draw(alike: list[Run], kept: list[Run], levels: list[float]) -> None:
    """Every run a dot, kept ones labelled, the best so far a line. A cross: no score, or above the top."""
    os.environ.pop("MPLBACKEND", None)  # Jupyter sets one that may not exist here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots()
    values = [run.val_bpb for run in alike if run.has_score] or [1.0]
    low = min(values)
    high = max([*levels, np.quantile(values, 0.8)])
    height = max(high - low, 1e-3)
    top = high + 0.45 * height  # room for the labels
    numbers = {run: number for number, run in enumerate(alike, 1)}
    shown = {number: run.val_bpb for run, number in numbers.items() if run.val_bpb <= top}
    crosses = [number for number in numbers.values() if number not in shown]
    kept_numbers = [numbers[run] for run in kept]
    best = np.minimum.accumulate(levels)

    axes.plot(list(shown), list(shown.values()), "o", color="0.7", label="run")
    axes.plot(crosses, [top] * len(crosses), "rx", label="no score, or above", clip_on=False)
    axes.stairs(best, kept_numbers + [len(alike)], baseline=None, color="green", label="best")
    axes.plot(kept_numbers, levels, "o", color="green", label="kept")
    for number, level, run in zip(kept_numbers, levels, kept, strict=True):
        label = run.description[:40].replace("$", r"\$")
        axes.annotate(label, (number, level), (4, 6), textcoords="offset points", rotation=35, fontsize=8)

    axes.set_title(f"{len(alike)} runs, {len(kept)} kept")
    axes.set(xlabel="run", ylabel="val_bpb (lower is better)")
    axes.set(xlim=(0, 1.15 * len(alike) + 1), ylim=(low - 0.15 * height, top))
    axes.tick_params(axis="y", labelleft=bool(shown))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(HERE / "progress.png", dpi=120)


# == Command line ============================================================================================


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise AutoresearchError(f"{message}; see prepare.py --help")


def main(argv: list[str] | None = None) -> int:
    print_any_text()
    parser = Parser(prog="prepare.py", description="Prepare a corpus for train.py, once.")
    corpora = f"{', '.join(CORPORA)} or a folder of {', '.join(OWN_TYPES)}"
    parser.add_argument("--data", default=DEFAULT_CORPUS, help=f"{corpora} (default here: %(default)s)")
    parser.add_argument("--report", action="store_true", help="show how the night went and draw progress.png")
    parser.add_argument("--num-shards", type=int, help="training shards of climbmix (default: 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="downloads at once (default: 8)")
    try:
        arguments = parser.parse_args(argv)
        if arguments.report:
            report()
        else:
            prepare(arguments)
        return 0
    except AutoresearchError as error:
        message = str(error)
    except BrokenPipeError:  # nobody reads on, as after `head -1`
        sys.stdout = None
        return 1
    except OSError as error:
        name = error.filename or CACHE
        remedy = "make room there, or make it writable"
        if str(CACHE) in str(name):
            remedy = "make room there, or move AUTORESEARCH_CACHE"
        message = f"{name}: {error.strerror or error}; {remedy}"
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut off the line below
        message = "interrupted; run prepare.py again to continue"
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    leave(main())

"""The packer and the dataloader against a scan over a plain list, row for row; so are the validation rows."""

import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.experiments import keep_cuda_busy
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
from prepare import AutoresearchError, make_dataloader, validation_rows

BOS = 7
Document = list[int]


def best_fit_by_scan(stream: Iterator[tuple[Document, int]], capacity: int) -> Iterator[tuple[Document, int]]:
    """(row, epoch of the last document appended), by looking at every document held before every choice."""
    held = []
    epoch = 0
    while True:
        row = []
        while len(row) < capacity:
            while len(held) < 1000 and (more := list(itertools.islice(stream, 128))):
                held += [document for document, _ in more]
                epoch = more[-1][1]
            if not held:
                return
            room = capacity - len(row)
            fitting = [i for i, document in enumerate(held) if len(document) <= room]
            if fitting:  # min and max return the earliest among equals
                best = max(fitting, key=lambda i: len(held[i]))
            else:
                best = min(range(len(held)), key=lambda i: len(held[i]))
            row += held.pop(best)[:room]
        yield row, epoch


def documents_of(lengths: list[int]) -> list[Document]:
    """Documents of these lengths; hardly any two are alike, and BOS is only at their start."""
    documents = []
    count = itertools.count()
    for n in lengths:
        documents.append([BOS, *(BOS + 1 + next(count) % 65_000 for _ in range(n - 1))])
    return documents


def random_lengths(seed: int, count: int, longest: int) -> list[int]:
    """Mostly short, now and then up to `longest`; with few lengths there are many ties."""
    return np.random.default_rng(seed).geometric(3 / (longest + 2), count).clip(1, longest).tolist()


def endless(documents: list[Document]) -> Iterator[tuple[Document, int]]:
    return ((document, epoch) for epoch in itertools.count(1) for document in documents)


def written(folder: str | Path, documents: list[Document], shards: int = 1) -> list[Path]:
    """Token files as prepare.py leaves them."""
    paths = []
    for i in range(shards):
        part = documents[len(documents) * i // shards : len(documents) * (i + 1) // shards]
        paths.append(Path(folder) / f"{i}.bin")
        np.array(list(itertools.chain.from_iterable(part)), "<u2").tofile(paths[-1])
    return paths


def tokenizer_of(paths: list[Path]) -> SimpleNamespace:
    """What a dataloader needs of a tokenizer."""
    return SimpleNamespace(get_bos_token_id=lambda: BOS, data=SimpleNamespace(train_paths=paths))


def loader(folder: str | Path, documents: list[Document], B: int, T: int, shards: int = 1) -> Iterator[tuple]:
    return make_dataloader(tokenizer_of(written(folder, documents, shards)), B, T, device="cpu")


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(3, 1500),
    B=st.integers(1, 5),
    T=st.integers(1, 40),
    longest=st.integers(1, 90),
    shards=st.integers(1, 3),
)
@example(seed=0, count=3, B=2, T=9, longest=1, shards=3)  # BOS alone: 1000 documents held are 334 epochs
@example(seed=1, count=1400, B=3, T=30, longest=31, shards=2)  # up to exactly a row
@example(seed=2, count=1400, B=3, T=5, longest=90, shards=2)  # mostly longer than a row
def test_packing_equals_brute_force(seed, count, B, T, longest, shards):
    documents = documents_of(random_lengths(seed, count, longest))
    expected = best_fit_by_scan(endless(documents), T + 1)
    with tempfile.TemporaryDirectory() as folder:
        for inputs, targets, epoch in itertools.islice(loader(folder, documents, B, T, shards), 12):
            rows, epochs = zip(*itertools.islice(expected, B), strict=True)
            assert torch.cat((inputs, targets[:, -1:]), 1).tolist() == list(rows)
            assert epoch == epochs[-1]


@pytest.mark.parametrize("n", [1, 16, 17, 18, 100])
def test_equal_lengths_keep_the_order_of_the_corpus(tmp_path, n):
    documents = documents_of([n] * 1300)
    inputs, targets, _ = next(loader(tmp_path, documents, 50, 16, shards=2))
    rows = torch.cat((inputs, targets[:, -1:]), 1).tolist()
    if n < 17:  # as many whole ones as fit, then the beginning of one more
        per_row = -(-17 // n)
        firsts = [documents[i * per_row : (i + 1) * per_row] for i in range(50)]
        assert rows == [list(itertools.chain.from_iterable(first))[:17] for first in firsts]
    else:
        assert rows == [document[:17] for document in documents[:50]]


def test_every_document_comes_before_one_comes_again(tmp_path):
    documents = documents_of([10] * 1500)  # two fill a row of 20 exactly, so nothing is cropped
    batches = loader(tmp_path, documents, 5, 19)
    drawn = [row for _ in range(150) for row in next(batches)[0].tolist()]
    starts = [tuple(row[i : i + 9]) for row in drawn for i in (0, 10)]
    assert sorted(starts) == sorted(tuple(document[:9]) for document in documents)


def test_the_epoch_is_that_of_the_last_appended(tmp_path):
    batches = loader(tmp_path, documents_of([17] * 1100), 1, 16)
    epochs = [next(batches)[2] for _ in range(200)]
    # the first choice appends 8 * 128 = 1024 documents; 999 are held before the 26th, which appends 128 more
    assert epochs == [1] * 25 + [2] * 175


def test_targets_are_inputs_one_token_on(tmp_path):
    inputs, targets, epoch = next(loader(tmp_path, documents_of(random_lengths(0, 1100, 60)), 5, 13))
    for tensor in (inputs, targets):
        assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (torch.int64, (5, 13), True)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert (inputs[:, 0] == BOS).all()
    assert epoch == 1


def test_a_batch_is_never_overwritten(tmp_path):
    batches = loader(tmp_path, documents_of(random_lengths(1, 1100, 60)), 4, 16)
    held = [next(batches)[:2] for _ in range(20)]
    copies = [(inputs.clone(), targets.clone()) for inputs, targets in held]
    again = list(itertools.islice(batches, 20))
    assert not torch.equal(again[0][0], held[0][0])
    for (inputs, targets), (inputs_then, targets_then) in zip(held, copies, strict=True):
        assert torch.equal(inputs, inputs_then) and torch.equal(targets, targets_then)


def test_two_dataloaders_do_not_disturb_each_other(tmp_path):
    tokenizer = tokenizer_of(written(tmp_path, documents_of(random_lengths(2, 1100, 60))))
    one = make_dataloader(tokenizer, 3, 16, device="cpu")
    two = make_dataloader(tokenizer, 3, 16, device="cpu")
    ahead = [next(one)[0] for _ in range(10)]
    assert all(torch.equal(inputs, next(two)[0]) for inputs in ahead)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_is_flat_over_many_batches(tmp_path):
    def anonymous_mb() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    batches = loader(tmp_path, documents_of(random_lengths(3, 3000, 300)), 32, 256)
    for _ in range(50):
        next(batches)
    before = anonymous_mb()
    for _ in range(300):
        inputs, _, epoch = next(batches)
    kept_mb = 300 * 2 * inputs.nbytes / 2**20
    assert kept_mb > 35 and epoch > 5
    assert anonymous_mb() - before < 10


@pytest.mark.parametrize("split", ["val", "test", ""])
def test_only_the_training_split_is_served(split):
    with pytest.raises(AutoresearchError, match="evaluate_bpb"):
        make_dataloader(tokenizer_of([]), 2, 16, split=split)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 700), longest=st.integers(1, 900))
@example(seed=0, count=1, longest=1)
@example(seed=4, count=700, longest=150)  # 128 rows of 257 tokens
def test_validation_rows_fill_the_split_once(seed, count, longest):
    # a file without a single document cannot be mapped, so an empty split holds too little for a row
    documents = documents_of(random_lengths(seed, count, longest)) or [[BOS]]
    stream = iter([(document, 1) for document in documents])
    expected = [row for row, _ in best_fit_by_scan(stream, prepare.MAX_SEQ_LEN + 1)]
    with tempfile.TemporaryDirectory() as folder:
        paths = written(folder, documents)
        if len(expected) < 64:
            with pytest.raises(
                AutoresearchError, match=f"fills {len(expected)} rows .* 64 .*bring more text"
            ):
                validation_rows(paths, BOS)
        else:
            assert validation_rows(paths, BOS).tolist() == expected


def test_validation_rows_end_with_eval_tokens(tmp_path):
    documents = documents_of(random_lengths(4, 2200, 450))
    wanted = prepare.EVAL_TOKENS // prepare.MAX_SEQ_LEN
    stream = iter([(document, 1) for document in documents])
    rows = [row for row, _ in best_fit_by_scan(stream, prepare.MAX_SEQ_LEN + 1)]
    assert len(rows) > wanted
    found = validation_rows(written(tmp_path, documents, shards=2), BOS)
    assert found.tolist() == rows[:wanted]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_batches_equal_those_of_the_cpu(tmp_path):
    """While every copy is queued behind work that is still running."""
    tokenizer = tokenizer_of(written(tmp_path, documents_of(random_lengths(5, 3000, 300))))
    on_cpu = make_dataloader(tokenizer, 16, 64, device="cpu")
    on_cuda = make_dataloader(tokenizer, 16, 64, device="cuda")
    held = []
    for _ in range(20):
        keep_cuda_busy()
        held.append(next(on_cuda))
    for inputs, targets, epoch in held:
        want_inputs, want_targets, want_epoch = next(on_cpu)
        assert torch.equal(inputs.cpu(), want_inputs) and torch.equal(targets.cpu(), want_targets)
        assert epoch == want_epoch

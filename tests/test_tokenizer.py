"""The tokenizer: bytes in, the same bytes out, on disk as text."""

import base64
import pickle
import re
from pathlib import Path

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
from prepare import AutoresearchError, Prepared, Tokenizer

PLANES = st.one_of(
    st.characters(min_codepoint=i << 16, max_codepoint=(i << 16) + 0xFFFF, exclude_categories=["Cs"])
    for i in range(17)
)
PIECES = [
    *("<|bos|>", "<|", "  ", "\n\n", "\r\n", "'ll", "def ", "1234"),
    *("\0", "\ufeff", "e\u0301\u0327", "\u0644\u0627"),
]
MIXED = st.lists(st.one_of(st.sampled_from(PIECES), st.text())).map("".join)
TEXTS = st.one_of(st.text(), st.text(PLANES), MIXED)


@pytest.fixture(scope="module")
def tokenizer(cache: Path) -> Tokenizer:
    return Tokenizer.from_directory()


@pytest.fixture(scope="module")
def ranks(cache: Path) -> dict[bytes, int]:
    """The file on disk, read independently."""
    lines = [line.split() for line in Prepared.active().tokenizer_path.read_text("ascii").splitlines()]
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}


def slow_encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding, spelled out: in every piece, join the pair of the lowest rank, again and again."""
    ids = []
    for piece in regex.findall(prepare.SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            neighbours = zip(parts, parts[1:], strict=False)
            pairs = [(ranks.get(a + b, 2**32), i) for i, (a, b) in enumerate(neighbours)]
            rank, i = min(pairs, default=(2**32, 0))
            if rank == 2**32:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_the_file_is_bytes_and_merges_in_order(ranks):
    """Text, with every single byte, and then merges of what stands before."""
    tokens = sorted(ranks, key=ranks.get)
    count = prepare.VOCAB_SIZE - len(prepare.SPECIAL_TOKENS)
    assert [ranks[token] for token in tokens] == list(range(count))
    assert {token for token in tokens if len(token) == 1} == {bytes([byte]) for byte in range(256)}
    for token in tokens[256:]:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        assert any(max(ranks.get(half, 2**32) for half in pair) < ranks[token] for pair in halves), token


def test_a_token_is_as_long_as_its_raw_bytes(ranks, tokenizer):
    specials = len(prepare.SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() == prepare.VOCAB_SIZE == len(tokenizer.token_bytes)
    found = {token: tokenizer.token_bytes[rank].item() for token, rank in ranks.items()}
    assert found == {token: len(token) for token in ranks}
    assert tokenizer.decode([ranks[b"\xc3"]]) == "\ufffd", "three bytes: the trap that this test is about"
    assert tokenizer.token_bytes[-specials:].tolist() == [0] * specials
    assert tokenizer.get_bos_token_id() == prepare.VOCAB_SIZE - specials


@given(TEXTS)
@example("".join(map(chr, range(0x3000))))
@example(" ".join(chr(c) for c in range(0x3000, 0x110000, 331) if not 0xD800 <= c < 0xE000))  # of every plane
@settings(max_examples=100, deadline=None)
def test_encoding_equals_the_slow_way(ranks, tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == slow_encode(text, ranks)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.token_bytes[ids].tolist()) == len(text.encode())


def test_names_of_special_tokens_are_plain_text(tokenizer):
    text = "".join(prepare.SPECIAL_TOKENS) + " <|endoftext|>"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.get_bos_token_id() and tokenizer.decode(ids) == text


def test_prepend_puts_a_special_token_first(tokenizer):
    bos = tokenizer.get_bos_token_id()
    plain = tokenizer.encode("some text")
    for prepend in (bos, "<|bos|>"):
        assert tokenizer.encode("some text", prepend=prepend) == [bos, *plain]
    assert tokenizer.encode(["some text", ""], prepend=bos) == [[bos, *plain], [bos]]
    assert tokenizer.encode(["some text", ""]) == [plain, []] and tokenizer.encode("") == []


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "\udc80 \udcff", "\ud83d", "reversed \ude00\ud83d"])
def test_lone_surrogates_are_replaced(tokenizer, text):
    """A Python string can hold them, UTF-8 cannot."""
    found = tokenizer.decode(tokenizer.encode(text))
    assert re.sub("[\ufffd?]", "R", found) == re.sub("[\ud800-\udfff]", "R", text)


@pytest.mark.slow
@pytest.mark.parametrize("character", ["x", " ", "\n", "7", "\u0627", "\u0301", "\U0001f600"])
def test_a_million_equal_characters_are_no_trouble(tokenizer, character):
    text = character * 10**6
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) > 1000


def damaged(lines: list[bytes]) -> dict[str, bytes]:
    """Contents of a tokenizer's file that are wrong."""
    first = lines[0].split()[0]
    last = lines[-1].split()[0]
    no_merge = base64.b64encode(b"no such merge")
    contents = {
        "empty": [],
        "a pickle": [pickle.dumps({b"a": 1})],
        "one token missing": lines[:-1],
        "a token twice": [*lines[:-1], lines[5]],
        "a rank twice": [first + b" 1", *lines[1:]],
        "a rank too high": [*lines[:-1], last + b" 99999"],
        "a negative rank": [*lines[:-1], last + b" -1"],
        "a byte missing": [no_merge + b" 0", *lines[1:]],
        "no base64": [b"*** 0", *lines[1:]],
        "no rank": [first, *lines[1:]],
        "another vocabulary": [*lines, no_merge + b" %d" % len(lines)],
    }
    return {defect: b"\n".join(content) for defect, content in contents.items()}


def test_a_damaged_tokenizer_is_refused_by_name(cache_copy):
    folder = cache_copy / (cache_copy / "active-small").read_text()
    path = Prepared.read(folder).tokenizer_path
    outcomes = {}
    for defect, content in damaged(path.read_bytes().splitlines()).items():
        path.write_bytes(content)
        try:
            outcomes[defect] = Tokenizer.from_directory(folder)
        except BaseException as error:  # tiktoken panics with a BaseException
            outcomes[defect] = type(error) is AutoresearchError and str(path) in str(error) or error
    assert outcomes == dict.fromkeys(outcomes, True)


def test_a_tokenizer_knows_its_folder(cache_copy):
    """The one that it is asked for, or the one that was prepared last."""
    folder = cache_copy / (cache_copy / "active-small").read_text()
    assert Tokenizer.from_directory(folder).data.folder == folder
    assert Tokenizer.from_directory(str(folder)).data.tokenizer_path.parent.parent == folder
    assert Tokenizer.from_directory().data.folder == prepare.CACHE / folder.name

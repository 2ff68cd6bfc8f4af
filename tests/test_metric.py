"""evaluate_bpb: the number against numpy, honest models that it lets through, and models that see too much."""

import base64
import functools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prepare
from prepare import MetricError, Tokenizer, evaluate_bpb

T, V = prepare.MAX_SEQ_LEN, prepare.VOCAB_SIZE
BATCH = 6  # small batches are the quickest on a CPU


@pytest.fixture(scope="module")
def tokenizer(cache) -> Tokenizer:
    # freed at once, and from then on glibc keeps blocks up to this size instead of mapping them anew: twice as fast
    torch.empty(31 * 2**20, dtype=torch.uint8)
    return Tokenizer.from_directory()


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(prepare, "default_device", lambda: torch.device("cpu"))


class Net(nn.Module):
    """A bigram model with small random weights, plus what `mix(h, inputs)` brings from elsewhere in the batch."""

    def __init__(self, mix=None, size=1.0, seed=0):
        super().__init__()
        random_numbers = torch.Generator().manual_seed(seed)
        self.wte = nn.Parameter(torch.randn(V, 32, generator=random_numbers))
        self.lm_head = nn.Parameter(torch.randn(32, V, generator=random_numbers) / 20)
        self.mix, self.size = mix, size

    def forward(self, inputs):
        h = F.embedding(inputs, self.wte)
        if self.mix:
            h = h + self.size * self.mix(h, inputs)
        return h @ self.lm_head


@functools.cache
def bigram_bpb(tokenizer) -> float:
    return evaluate_bpb(Net(), tokenizer, BATCH)


def uniform(inputs):
    return torch.zeros(*inputs.shape, V)


def tilted(inputs, size):
    """Logits with which every loss is about `size` nat away from uniform."""
    return 2 * size * (torch.arange(V) < V // 2).expand(*inputs.shape, V)


def rows_and_lengths() -> tuple[np.ndarray, np.ndarray]:
    """The validation rows, and the bytes of each token as the tokenizer's text file has them."""
    prepared = prepare.Prepared.active()
    lengths = np.zeros(V, int)
    for line in prepared.tokenizer.read_text().splitlines():
        token, rank = line.split()
        lengths[int(rank)] = len(base64.b64decode(token))
    return prepared.rows.astype(int), lengths


# -- the number --------------------------------------------------------------------------------------------------------


def test_bpb_of_a_uniform_model_is_log2_vocab_per_byte(tokenizer):
    rows, lengths = rows_and_lengths()
    bytes_of_targets = lengths[rows[:, 1:]]
    assert (bytes_of_targets == 0).any() and (bytes_of_targets > 1).any()
    expected = math.log2(V) * (bytes_of_targets > 0).sum() / bytes_of_targets.sum()
    assert evaluate_bpb(uniform, tokenizer, BATCH) == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_bpb_of_known_probabilities_equals_numpy_at_every_batch_size(tokenizer, batch_size):
    rows, lengths = rows_and_lengths()
    bigram = torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    logits = bigram.double().numpy()
    nats = np.log(np.exp(logits).sum(1))[rows[:, :-1]] - logits[rows[:, :-1], rows[:, 1:]]
    bytes_of_targets = lengths[rows[:, 1:]]
    expected = nats[bytes_of_targets > 0].sum() / math.log(2) / bytes_of_targets.sum()
    found = evaluate_bpb(lambda inputs: F.embedding(inputs, bigram), tokenizer, batch_size)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@given(st.integers(2, 100), st.integers(1, 120), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_bpb_equals_numpy_for_any_rows_and_batch_size(tokenizer, count, batch_size, seed):
    rng, (_, lengths) = np.random.default_rng(seed), rows_and_lengths()
    rows = rng.integers(0, V, (count, prepare.MAX_SEQ_LEN + 1))
    bias = torch.randn(V, generator=torch.Generator().manual_seed(seed))
    nats = (bias.logsumexp(0) - bias).double().numpy()[rows[:, 1:]]
    bytes_of_targets = lengths[rows[:, 1:]]
    expected = nats[bytes_of_targets > 0].sum() / math.log(2) / bytes_of_targets.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.Prepared.active(), "rows", rows)
        found = evaluate_bpb(lambda inputs: bias.expand(*inputs.shape, V).clone(), tokenizer, batch_size)
    assert found == pytest.approx(expected, abs=1e-6)


def test_targets_without_bytes_are_left_out(tokenizer):
    rows, lengths = rows_and_lengths()
    bos = tokenizer.get_bos_token_id()
    assert (rows[:, 1:] == bos).sum() > 20

    def never_bos(inputs):  # 10,000 nat for every BOS
        return uniform(inputs).index_fill(2, torch.tensor(bos), -1e4)

    bytes_of_targets = lengths[rows[:, 1:]]
    expected = math.log2(V - 1) * (bytes_of_targets > 0).sum() / bytes_of_targets.sum()
    assert evaluate_bpb(never_bos, tokenizer, BATCH) == pytest.approx(expected, rel=2e-7)


# -- what the model meets ----------------------------------------------------------------------------------------------


def test_the_model_meets_full_batches_of_one_shape_and_no_target(tokenizer):
    met = set()

    def model(inputs):  # not a view of the rows: the target of the last position is not within reach
        met.add((inputs.dtype, tuple(inputs.shape), inputs.untyped_storage().nbytes()))
        return uniform(inputs)

    evaluate_bpb(model, tokenizer, 7)
    assert met == {(torch.int64, (7, T), 7 * T * 8)}


@pytest.mark.parametrize("mebibytes, rows", [(2, 1), (11, 5), (2**11, 9)])
def test_logits_stay_below_the_cap(tokenizer, monkeypatch, mebibytes, rows):
    assert prepare.LOGITS_BYTES == 2 * 2**30
    monkeypatch.setattr(prepare, "LOGITS_BYTES", mebibytes * 2**20)  # a row has 256 * 2048 * 4 bytes
    sizes = set()
    evaluate_bpb(lambda inputs: sizes.add(len(inputs)) or uniform(inputs), tokenizer, 9)
    assert sizes == {rows}


class Hungry(Net):
    """Out of memory with more than `limit` rows."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.sizes = limit, []

    def forward(self, inputs):
        self.sizes.append(len(inputs))
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError("toy")
        return super().forward(inputs)


def test_out_of_memory_halves_the_batch_and_the_number_stays(tokenizer):
    model = Hungry(limit=5)
    assert evaluate_bpb(model, tokenizer, 24) == pytest.approx(bigram_bpb(tokenizer), abs=1e-6)
    assert model.sizes[:3] == [24, 12, 6] and set(model.sizes[3:]) == {3}


def test_out_of_memory_with_one_row_is_an_error(tokenizer):
    with pytest.raises(MetricError, match="out of memory with a single validation row; make the model smaller"):
        evaluate_bpb(Hungry(limit=0), tokenizer, 8)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_scored_in_evaluation_mode_and_keeps_the_mode_it_had(tokenizer, training):
    class Dropout(Net):
        def forward(self, inputs):
            modes.add(self.training)
            return F.dropout(super().forward(inputs), training=self.training)

    modes, model = set(), Dropout().train(training)
    assert evaluate_bpb(model, tokenizer, BATCH) == bigram_bpb(tokenizer)
    assert modes == {False} and model.training is training


def test_no_gradient_and_no_random_state_is_left_behind(tokenizer):
    model = Net()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    evaluate_bpb(model, tokenizer, BATCH)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert model.wte.grad is None


# -- honest models, and the same ones with a leak ----------------------------------------------------------------------


def shift(h, k):
    """What stands k positions before; with a negative k, what comes later."""
    return F.pad(h, (0, 0, k, -k))


def attention(h, causal):
    q = k = v = h.unflatten(2, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Convolution(nn.Conv1d):
    """Four taps that end at the position itself, or `ahead` of it."""

    def __init__(self, ahead=0):
        torch.manual_seed(1)
        super().__init__(32, 32, 4)
        self.ahead = ahead

    def forward(self, h, inputs):
        return super().forward(F.pad(h.mT, (3 - self.ahead, self.ahead))).mT


class Recurrence(nn.GRU):
    def __init__(self, backward=False):
        torch.manual_seed(1)
        super().__init__(32, 32, batch_first=True)
        self.backward = backward

    def forward(self, h, inputs):
        return super().forward(h.flip(1))[0].flip(1) if self.backward else super().forward(h)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mix", [lambda h, inputs: attention(h, causal=True), Convolution(), Recurrence()], ids=["attention", "conv", "gru"]
)
def test_honest_models_pass(tokenizer, mix, dtype):
    found = evaluate_bpb(Net(mix).to(dtype), tokenizer, BATCH)
    assert 1e-4 < abs(found - bigram_bpb(tokenizer)) < 1  # the mix matters


def block_means(h):
    return h.unflatten(1, (-1, 64)).mean(2).repeat_interleave(64, 1)


@functools.cache
def rare_token() -> int:
    """One that stands in about one row of ten."""
    rows = rows_and_lengths()[0]
    in_rows = np.array([(rows == token).any(1).sum() for token in range(V - 4)])
    return int(abs(in_rows - len(rows) / 10).argmin())


def behind_rare(inputs):
    return (inputs == rare_token()).cumsum(1).gt(0)[..., None]


def last_ten(h):
    return torch.arange(T)[:, None] >= T - 10


def chosen(scores, count):
    """1 where the score is among the `count` highest of the row: experts that choose their tokens."""
    return torch.zeros_like(scores).scatter(1, scores.topk(count, dim=1).indices, 1)[..., None]


def odd_rows(h):
    return (torch.arange(len(h)) % 2)[:, None, None]


def large(h):
    return len(h) >= 16


LEAKS = {  # what leaks, and the honest twin that does the same with the past of the row
    "attention without a mask": (lambda h, x: attention(h, False), lambda h, x: attention(h, True)),
    "convolution that is centred": (Convolution(ahead=1), Convolution()),
    "recurrence from the end": (Recurrence(backward=True), Recurrence()),
    "one token": (lambda h, x: shift(h, -1), lambda h, x: shift(h, 1)),
    "exactly 64 tokens": (lambda h, x: shift(h, -64), lambda h, x: shift(h, 64)),
    "T/2 tokens": (lambda h, x: shift(h, -T // 2), lambda h, x: shift(h, T // 2)),
    "a summary of the block": (lambda h, x: block_means(h), lambda h, x: shift(block_means(h), 64)),
    "a norm over the row": (
        lambda h, x: 4 * h / h.square().mean((1, 2), True).sqrt(),
        lambda h, x: F.rms_norm(h, (32,)),
    ),
    "experts that choose": (lambda h, x: h * chosen(h.sum(2), T // 2), lambda h, x: h * (h.sum(2, True) > 0)),
    "behind one rare token": (lambda h, x: shift(h, -1) * behind_rare(x), lambda h, x: shift(h, 1) * behind_rare(x)),
    "in the last ten positions": (lambda h, x: shift(h, -1) * last_ten(h), lambda h, x: shift(h, 1) * last_ten(h)),
    "in odd rows": (lambda h, x: shift(h, -1) * odd_rows(h), lambda h, x: h * 0.5),
    "in large batches": (lambda h, x: shift(h, -1) * large(h), lambda h, x: shift(h, 1) * large(h)),
    "batch statistics": (lambda h, x: -h.mean(0, keepdim=True), lambda h, x: -h.mean(2, keepdim=True)),
    "the previous row": (lambda h, x: h.roll(1, 0), lambda h, x: shift(h, 1)),
}


@pytest.mark.parametrize("size", [1.0, 0.1])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_caught(tokenizer, leak, size):
    with pytest.raises(MetricError, match=r"at position \d+ moves by .* nat.*; a model must see only the past"):
        evaluate_bpb(Net(LEAKS[leak][0], size), tokenizer, 16 if leak == "in large batches" else BATCH)


@pytest.mark.parametrize("leak", LEAKS)
def test_the_honest_twin_of_a_leak_passes(tokenizer, leak):
    batch_size = 16 if leak == "in large batches" else BATCH
    found = evaluate_bpb(Net(LEAKS[leak][1]), tokenizer, batch_size)
    assert abs(found - bigram_bpb(tokenizer)) > 1e-5  # the mix matters


def test_a_leak_in_large_batches_only_is_none_in_small_ones(tokenizer):
    model = Net(LEAKS["in large batches"][0])
    assert evaluate_bpb(model, tokenizer, 15) == pytest.approx(bigram_bpb(tokenizer), abs=1e-6)


def test_a_leak_by_one_at_a_single_rare_token_is_nearly_always_caught(tokenizer):
    inputs = rows_and_lengths()[0][:, :-1]
    frequency = np.bincount(inputs.flatten(), minlength=V) / inputs.size
    caught, tokens = 0, abs(frequency - 0.002).argsort()[:6].tolist()
    for token in tokens:
        try:
            evaluate_bpb(Net(lambda h, x, token=token: shift(h, -1) * (x == token)[..., None]), tokenizer, BATCH)
        except MetricError:
            caught += 1
    assert caught >= 5


class Nudged(Net):
    """A bigram model that moves the logit of the token to come by `nat`."""

    def __init__(self, nat):
        super().__init__()
        self.nat = nat

    def forward(self, inputs):
        nudge = F.one_hot(inputs[:, 1:], V) * self.nat
        return super().forward(inputs) + F.pad(nudge, (0, 0, 0, 1))


def test_a_hundredth_of_a_nat_through_the_future_is_caught(tokenizer):
    with pytest.raises(MetricError, match=r"moves by 0\.01\d* nat, more than 0\.005,"):
        evaluate_bpb(Nudged(0.01), tokenizer, BATCH)


def test_a_thousandth_of_a_nat_through_the_future_passes(tokenizer):
    gain = bigram_bpb(tokenizer) - evaluate_bpb(Nudged(0.001), tokenizer, BATCH)
    assert 1e-4 < gain < 1e-3


# -- models that change, and what is not logits ------------------------------------------------------------------------


class Unsteady:
    """Every second call differs by `nat` from the first."""

    def __init__(self, nat):
        self.nat, self.calls = nat, 0

    def __call__(self, inputs):
        self.calls += 1
        return tilted(inputs, self.nat * (self.calls % 2))


def test_identical_calls_that_differ_too_much_are_invalid(tokenizer):
    with pytest.raises(MetricError, match=r"two identical calls of the model differ by 0\.03\d* nat, more than 0\.02"):
        evaluate_bpb(Unsteady(0.03), tokenizer, BATCH)


@pytest.mark.parametrize("nat", [0.0003, 0.003])
def test_kernels_that_are_not_deterministic_pass(tokenizer, nat):
    model = Unsteady(nat)
    evaluate_bpb(model, tokenizer, BATCH)
    assert model.calls > 50


class Learns(Net):
    """Raises the logits of the tokens that it has met: `rate` nat for one in a hundred."""

    def __init__(self, rate):
        super().__init__()
        self.rate, self.bias = rate, torch.zeros(V)

    def forward(self, inputs):
        logits = super().forward(inputs) + self.bias
        self.bias += self.rate * 100 * inputs.flatten().bincount(minlength=V) / inputs.numel()
        return logits


@pytest.mark.parametrize("batch_size", [BATCH, 48])
@pytest.mark.parametrize("rate", [3e-4, 0.01])
def test_a_model_that_learns_during_evaluation_is_caught(tokenizer, rate, batch_size):
    with pytest.raises(MetricError, match=r"the same rows moved by .* nat, more than|two identical"):
        evaluate_bpb(Learns(rate), tokenizer, batch_size)


def test_a_model_that_counts_what_it_meets_but_does_not_use_it_passes(tokenizer):
    model = Learns(1e-9)
    evaluate_bpb(model, tokenizer, BATCH)
    assert model.bias.abs().max() > 0


def nan_in_the_last_rows(inputs):
    last = torch.from_numpy(prepare.Prepared.active().rows[-1, :T].astype(np.int64))
    logits = uniform(inputs)
    logits[(inputs == last).all(1), 200, 5] = math.nan
    return logits


NO_LOGITS = {
    "a loss": (lambda inputs: uniform(inputs).mean(), r"returned \(\), not logits of shape \(6, 256, 2048\)"),
    "logits and a loss": (lambda inputs: (uniform(inputs), None), r"returned tuple, not logits"),
    "nothing": (lambda inputs: None, r"returned NoneType, not logits"),
    "a wrong vocabulary": (lambda inputs: uniform(inputs)[..., 4:], r"returned \(6, 256, 2044\), not .*2048"),
    "flat logits": (lambda inputs: uniform(inputs).flatten(0, 1), r"returned \(1536, 2048\), not"),
    "NaN": (lambda inputs: uniform(inputs).index_fill(2, torch.tensor(9), math.nan), "not finite"),
    "infinity": (lambda inputs: uniform(inputs).index_fill(2, torch.tensor(9), math.inf), "not finite"),
    "minus infinity": (lambda inputs: uniform(inputs).index_fill(2, torch.tensor(9), -math.inf), "not finite"),
    "one NaN in the last row": (nan_in_the_last_rows, "not finite"),
}


@pytest.mark.parametrize("what", NO_LOGITS)
def test_what_is_not_finite_logits_of_the_right_shape_is_invalid(tokenizer, what):
    model, message = NO_LOGITS[what]
    with pytest.raises(MetricError, match=message):
        evaluate_bpb(model, tokenizer, BATCH)

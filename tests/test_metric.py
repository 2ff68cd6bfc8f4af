"""evaluate_bpb: the number against numpy, honest models, which pass, and models that see too much."""

import base64
import functools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_corpus
from helpers.experiments import still_clock, toy, uniform
from helpers.script import main
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prepare
from prepare import MetricError, Tokenizer, evaluate_bpb

T, V = prepare.MAX_SEQ_LEN, prepare.VOCAB_SIZE
BATCH = 6  # small batches are the quickest on a CPU


@pytest.fixture(scope="module")
def tokenizer(cache) -> Tokenizer:
    """With few validation rows, to save time."""
    prepare.keep_freed_memory()
    whole = Tokenizer.from_directory()
    return with_rows(whole, whole.data.rows[-48:])  # the first ones have no BOS inside


def with_rows(tokenizer: Tokenizer, rows: np.ndarray) -> Tokenizer:
    """The same tokenizer with other validation rows."""
    return Tokenizer(tokenizer.data.tokenizer_path, replace(tokenizer.data, rows=rows))


class Model(nn.Module):
    """A function of the inputs as a model, with a parameter that says that it is on the CPU."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, inputs):
        return self.function(inputs)


class Net(nn.Module):
    """A bigram model with small random weights, plus what `mix(h, inputs)` brings from elsewhere."""

    def __init__(self, mix=None, size=1.0, seed=0):
        super().__init__()
        random_numbers = torch.Generator().manual_seed(seed)
        self.wte = nn.Parameter(torch.randn(V, 32, generator=random_numbers))
        self.lm_head = nn.Parameter(torch.randn(32, V, generator=random_numbers) / 20)
        self.mix = mix
        self.size = size

    def forward(self, inputs):
        h = F.embedding(inputs, self.wte)
        if self.mix:
            h = h + self.size * self.mix(h, inputs)
        return h @ self.lm_head


class Rounded(Net):
    """All that it computes is rounded to bfloat16; a CPU takes minutes to compute in it."""

    def forward(self, inputs):
        h = F.embedding(inputs, self.wte).bfloat16().float()
        h = (h + self.mix(h, inputs).bfloat16().float()).bfloat16()
        return (h.float() @ self.lm_head.bfloat16().float()).bfloat16()


class Half(Net):
    """What it mixes is computed in bfloat16."""

    def forward(self, inputs):
        h = F.embedding(inputs, self.wte)
        h = h + self.mix(h, inputs)
        return (h.float() @ self.lm_head.float()).bfloat16()


@functools.cache
def bigram_bpb(tokenizer) -> float:
    return evaluate_bpb(Net(), tokenizer, BATCH)


def tilted(inputs, size):
    """Logits with which every loss is about `size` nat away from uniform."""
    return 2 * size * (torch.arange(V) < V // 2).expand(*inputs.shape, V)


def lengths(tokenizer) -> np.ndarray:
    """The bytes of each token, as the tokenizer's text file has them."""
    found = np.zeros(V, int)
    for line in tokenizer.data.tokenizer_path.read_text().splitlines():
        token, rank = line.split()
        found[int(rank)] = len(base64.b64decode(token))
    return found


# -- the number ----------------------------------------------------------------------------------------------


def test_a_uniform_model_has_log2_vocab_per_token(tokenizer):
    bytes_of_targets = lengths(tokenizer)[tokenizer.data.rows[:, 1:]]
    assert (bytes_of_targets == 0).any() and (bytes_of_targets > 1).any()
    expected = math.log2(V) * (bytes_of_targets > 0).sum() / bytes_of_targets.sum()
    assert evaluate_bpb(uniform, tokenizer, BATCH) == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_known_probabilities_equal_numpy(tokenizer, batch_size):
    rows = tokenizer.data.rows.astype(int)
    bigram = torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    logits = bigram.double().numpy()
    nats = np.log(np.exp(logits).sum(1))[rows[:, :-1]] - logits[rows[:, :-1], rows[:, 1:]]
    bytes_of_targets = lengths(tokenizer)[rows[:, 1:]]
    expected = nats[bytes_of_targets > 0].sum() / math.log(2) / bytes_of_targets.sum()
    found = evaluate_bpb(Model(lambda inputs: F.embedding(inputs, bigram)), tokenizer, batch_size)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@given(st.integers(2, 100), st.integers(1, 120), st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_any_rows_and_batch_size_equal_numpy(tokenizer, count, batch_size, seed):
    rows = np.random.default_rng(seed).integers(0, V, (count, T + 1))
    bias = torch.randn(V, generator=torch.Generator().manual_seed(seed))
    nats = (bias.logsumexp(0) - bias).double().numpy()[rows[:, 1:]]
    bytes_of_targets = lengths(tokenizer)[rows[:, 1:]]
    expected = nats[bytes_of_targets > 0].sum() / math.log(2) / bytes_of_targets.sum()
    model = Model(lambda inputs: bias.expand(*inputs.shape, V))
    found = evaluate_bpb(model, with_rows(tokenizer, rows), batch_size)
    assert found == pytest.approx(expected, abs=1e-6)


def test_targets_without_bytes_are_left_out(tokenizer):
    rows = tokenizer.data.rows
    bos = tokenizer.get_bos_token_id()
    assert (rows[:, 1:] == bos).sum() > 10
    never_bos = torch.zeros(V).index_fill(0, torch.tensor(bos), -1e4)  # 10,000 nat for every BOS
    bytes_of_targets = lengths(tokenizer)[rows[:, 1:]]
    expected = math.log2(V - 1) * (bytes_of_targets > 0).sum() / bytes_of_targets.sum()
    found = evaluate_bpb(Model(lambda inputs: never_bos.expand(*inputs.shape, V)), tokenizer, BATCH)
    assert found == pytest.approx(expected, rel=2e-7)


# -- the tokenizer -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_corpus_is_refused_in_an_experiment(cache, tmp_path, capsys):
    """The score is that of the tokenizer's own folder, but the run began with the active one."""
    result = main("--data", write_corpus(tmp_path / "texts", 1.8), AUTORESEARCH_CACHE=tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "cache" / (tmp_path / "cache" / "active-small").read_text()
    whole = Tokenizer.from_directory(folder)
    active = Tokenizer.from_directory()
    assert whole.data.hashes.keys().isdisjoint(active.data.hashes)
    other = with_rows(whole, whole.data.rows[:12])
    with still_clock() as clock, toy() as run:
        for _ in run.steps():
            clock.now += 100
        with pytest.raises(MetricError) as refused:
            evaluate_bpb(uniform, other, BATCH)
    assert run.exit_code == 1 and "without a score" in capsys.readouterr().err
    assert str(folder) in str(refused.value) and str(active.data.folder) in str(refused.value)

    bytes_of_targets = lengths(other)[other.data.rows[:, 1:]]
    expected = math.log2(V) * (bytes_of_targets > 0).sum() / bytes_of_targets.sum()
    assert evaluate_bpb(uniform, other, BATCH) == pytest.approx(expected, rel=2e-7)


# -- what the model meets ------------------------------------------------------------------------------------


def test_the_model_meets_full_batches_and_no_target(tokenizer):
    met = set()

    def model(inputs):  # not a view of the rows: the target of the last position is not within reach
        met.add((inputs.dtype, tuple(inputs.shape), inputs.untyped_storage().nbytes()))
        return uniform(inputs)

    evaluate_bpb(Model(model), tokenizer, 7)
    assert met == {(torch.int64, (7, T), 7 * T * 8)}


class Met(Exception):
    """The first batch has come."""


@pytest.mark.parametrize("rows, batch_size, met", [(4000, 1500, 1024), (4000, 700, 700), (90, 700, 45)])
def test_logits_stay_below_two_gibibytes(tokenizer, rows, batch_size, met):
    """And half of the rows are left, for a probe to choose from."""
    assert 1024 * T * V * 4 == 2 * 2**30

    def model(inputs):
        raise Met(len(inputs))

    many = with_rows(tokenizer, np.resize(tokenizer.data.rows, (rows, T + 1)))
    with pytest.raises(Met, match=f"^{met}$"):
        evaluate_bpb(Model(model), many, batch_size)


class Hungry(Net):
    """Out of memory with more than `limit` rows."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.sizes = []

    def forward(self, inputs):
        self.sizes.append(len(inputs))
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError("toy")
        return super().forward(inputs)


@pytest.mark.slow
def test_out_of_memory_halves_the_batch(tokenizer):
    model = Hungry(limit=5)
    assert evaluate_bpb(model, tokenizer, 24) == pytest.approx(bigram_bpb(tokenizer), abs=1e-6)
    assert model.sizes[:3] == [24, 12, 6] and set(model.sizes[3:]) == {3}


def test_out_of_memory_with_one_row_is_an_error(tokenizer):
    with pytest.raises(MetricError, match="out of memory with a single validation row; make the"):
        evaluate_bpb(Hungry(limit=0), tokenizer, 8)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_scored_in_evaluation_mode(tokenizer, training):
    """And keeps the mode that it had."""

    class Dropout(Net):
        def forward(self, inputs):
            modes.add(self.training)
            return F.dropout(super().forward(inputs), training=self.training)

    modes = set()
    model = Dropout().train(training)
    assert evaluate_bpb(model, tokenizer, BATCH) == bigram_bpb(tokenizer)
    assert modes == {False} and model.training is training


def test_no_gradient_or_random_state_is_left(tokenizer):
    model = Net()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    evaluate_bpb(model, tokenizer, BATCH)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert model.wte.grad is None


# -- honest models, and the same ones with a leak ------------------------------------------------------------


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


HONEST = {
    "attention": lambda h, inputs: attention(h, causal=True),
    "convolution": Convolution(),
    "recurrence": Recurrence(),
}


@pytest.mark.parametrize("kind", [pytest.param(Net, marks=pytest.mark.slow), Rounded])
@pytest.mark.parametrize(
    "mix", ["attention", *(pytest.param(mix, marks=pytest.mark.slow) for mix in HONEST if mix != "attention")]
)
def test_honest_models_pass(tokenizer, mix, kind):
    found = evaluate_bpb(kind(HONEST[mix]), tokenizer, BATCH)
    assert 1e-4 < abs(found - bigram_bpb(tokenizer)) < 1  # the mix matters


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["attention", "convolution"])
def test_honest_models_of_bfloat16_pass(tokenizer, mix):
    found = evaluate_bpb(Half(HONEST[mix]).bfloat16(), tokenizer, BATCH)
    assert 1e-4 < abs(found - bigram_bpb(tokenizer)) < 1


def block_means(h):
    return h.unflatten(1, (-1, 64)).mean(2).repeat_interleave(64, 1)


@functools.cache
def rare_token() -> int:
    """One that stands in about one validation row of ten."""
    rows = prepare.Prepared.active().rows
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
    "behind one rare token": (
        lambda h, x: shift(h, -1) * behind_rare(x),
        lambda h, x: shift(h, 1) * behind_rare(x),
    ),
    "in the last ten positions": (
        lambda h, x: shift(h, -1) * last_ten(h),
        lambda h, x: shift(h, 1) * last_ten(h),
    ),
    "in odd rows": (lambda h, x: shift(h, -1) * odd_rows(h), lambda h, x: h * 0.5),
    "in large batches": (lambda h, x: shift(h, -1) * large(h), lambda h, x: shift(h, 1) * large(h)),
    "batch statistics": (lambda h, x: -h.mean(0, keepdim=True), lambda h, x: -h.mean(2, keepdim=True)),
    "the previous row": (lambda h, x: h.roll(1, 0), lambda h, x: shift(h, 1)),
}


CHEAP_LEAKS = ("attention without a mask", "one token", "a summary of the block", "T/2 tokens")


def batch_size_for(leak: str) -> int:
    return 16 if leak == "in large batches" else BATCH


@pytest.mark.parametrize("size", [pytest.param(1.0, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_caught(tokenizer, leak, size):
    with pytest.raises(
        MetricError, match=r"at position \d+ moves by .* nat.*; a model must see only the past"
    ):
        evaluate_bpb(Net(LEAKS[leak][0], size), tokenizer, batch_size_for(leak))


@pytest.mark.parametrize(
    "leak", [pytest.param(leak, marks=[pytest.mark.slow] * (leak not in CHEAP_LEAKS)) for leak in LEAKS]
)
def test_the_honest_twin_of_a_leak_passes(tokenizer, leak):
    found = evaluate_bpb(Net(LEAKS[leak][1]), tokenizer, batch_size_for(leak))
    assert abs(found - bigram_bpb(tokenizer)) > 1e-5  # the mix matters


def test_a_leak_in_large_batches_is_none_in_small_ones(tokenizer):
    model = Net(LEAKS["in large batches"][0])
    assert evaluate_bpb(model, tokenizer, 15) == pytest.approx(bigram_bpb(tokenizer), abs=1e-6)


@pytest.mark.slow
def test_a_leak_behind_one_rare_token_is_caught(tokenizer):
    """A leak by one position, and nearly always."""
    inputs = tokenizer.data.rows[:, :-1]
    frequency = np.bincount(inputs.flatten(), minlength=V) / inputs.size
    caught = 0
    for token in abs(frequency - 0.002).argsort()[:6].tolist():
        model = Net(lambda h, x, token=token: shift(h, -1) * (x == token)[..., None])
        try:
            evaluate_bpb(model, tokenizer, BATCH)
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


def test_a_hundredth_of_a_nat_is_caught(tokenizer):
    with pytest.raises(MetricError, match=r"moves by 0\.01\d* nat, more than 0\.005,"):
        evaluate_bpb(Nudged(0.01), tokenizer, BATCH)


@pytest.mark.slow
def test_a_thousandth_of_a_nat_passes(tokenizer):
    gain = bigram_bpb(tokenizer) - evaluate_bpb(Nudged(0.001), tokenizer, BATCH)
    assert 1e-4 < gain < 1e-3


# -- models that change, and what is not logits --------------------------------------------------------------


class Unsteady(nn.Module):
    """Every second call differs by `nat` from the first."""

    def __init__(self, nat):
        super().__init__()
        self.nat = nat
        self.calls = 0
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        return tilted(inputs, self.nat * (self.calls % 2))


def test_identical_calls_must_not_differ(tokenizer):
    with pytest.raises(
        MetricError, match=r"two identical calls of the model differ by 0\.03\d* nat, more than 0\.02"
    ):
        evaluate_bpb(Unsteady(0.03), tokenizer, BATCH)


@pytest.mark.parametrize("nat", [0.0003, 0.003])
def test_unsteady_kernels_pass(tokenizer, nat):
    model = Unsteady(nat)
    evaluate_bpb(model, tokenizer, BATCH)
    assert model.calls > 50


class Learns(Net):
    """Raises the logits of the tokens that it has met: `rate` nat for one in a hundred."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.bias = torch.zeros(V)

    def forward(self, inputs):
        logits = super().forward(inputs) + self.bias
        self.bias += self.rate * 100 * inputs.flatten().bincount(minlength=V) / inputs.numel()
        return logits


@pytest.mark.parametrize("batch_size", [BATCH, 48])
@pytest.mark.parametrize("rate", [3e-4, 0.01])
def test_a_model_that_learns_is_caught(tokenizer, rate, batch_size):
    five_batches = np.resize(tokenizer.data.rows, (5 * batch_size, T + 1))
    # whichever check comes to it first
    caught = r"the same rows moved by .* nat, more than|two identical|the prediction .* moves by"
    with pytest.raises(MetricError, match=caught):
        evaluate_bpb(Learns(rate), with_rows(tokenizer, five_batches), batch_size)


def test_a_model_that_only_counts_passes(tokenizer):
    model = Learns(1e-9)
    evaluate_bpb(model, tokenizer, BATCH)
    assert model.bias.abs().max() > 0


def nan_in_the_last_row(inputs):
    last = torch.from_numpy(prepare.Prepared.active().rows[-1, :T].astype(np.int64))
    logits = uniform(inputs).clone()
    logits[(inputs == last).all(1), 200, 5] = math.nan
    return logits


def with_one(number: float):
    """A model whose logits are uniform but for one token."""
    logits = torch.zeros(V).index_fill(0, torch.tensor(9), number)
    return lambda inputs: logits.expand(*inputs.shape, V)


NO_LOGITS = {
    "a loss": (lambda inputs: uniform(inputs).mean(), r"returned \(\), not logits of shape \(6, 256, 2048\)"),
    "logits and a loss": (lambda inputs: (uniform(inputs), None), "returned tuple, not logits"),
    "nothing": (lambda inputs: None, "returned NoneType, not logits"),
    "a wrong vocabulary": (
        lambda inputs: uniform(inputs)[..., 4:],
        r"returned \(6, 256, 2044\), not .*2048",
    ),
    "flat logits": (lambda inputs: uniform(inputs).flatten(0, 1), r"returned \(1536, 2048\), not"),
    "NaN": (with_one(math.nan), "not finite"),
    "infinity": (with_one(math.inf), "not finite"),
    "minus infinity": (with_one(-math.inf), "not finite"),
    "one NaN in the last row": (nan_in_the_last_row, "not finite"),
}


@pytest.mark.parametrize("what", NO_LOGITS)
def test_what_is_no_finite_logits_is_invalid(tokenizer, what):
    function, message = NO_LOGITS[what]
    with pytest.raises(MetricError, match=message):
        evaluate_bpb(Model(function), tokenizer, BATCH)

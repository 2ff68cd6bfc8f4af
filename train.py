"""Train a GPT for five minutes and report its val_bpb: the file that an experiment edits.

    uv run train.py "what is different"

The order is that of a run: config, model, optimizer, schedules, warm-up, loop. prepare.py has the data, the clock and
the metric. Shapes: B rows, T tokens, D model width, N heads, K key-value heads, H head width, V vocabulary, L layers.
"""

import functools
import gc
import math
import os
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import (
    MAX_SEQ_LEN,
    SCALE,
    TIME_BUDGET,
    VOCAB_SIZE,
    Experiment,
    Tokenizer,
    TrainError,
    evaluate_bpb,
    make_dataloader,
)

# == 1. Config =========================================================================================================


@dataclass(frozen=True)
class Config:
    """Every number worth tuning. "branch": the best published overnight branch, val_bpb 0.9697 on an H100."""

    # model
    depth: int = 9  # layers; branch
    n_embd: int = 640  # model width D; branch
    head_dim: int = 128  # H; branch
    queries_per_kv: int = 1  # heads that share a key-value head, N / K; 1 is plain attention
    windows: str = "SSSSL"  # one letter a layer, repeated: Short or Long window; the last layer is long; branch
    short_window: int = 256  # tokens before itself that a token sees in a short layer; branch
    rotary_base: float = 200_000.0  # longest wavelength / 2 pi; branch
    mlp_ratio: int = 4  # hidden width of the MLP / D
    gate_channels: int = 32  # of a block's input that steer the value embeddings
    logit_softcap: float = 15.0  # logits stay within +- this
    init_scale: float = 0.68  # of the matrices that read the residual stream, times 1/sqrt(D); branch
    x0_init: float = 0.05  # share of the first embedding that every layer starts with; branch
    # batch
    batch_tokens: int = 2**18  # tokens of an optimizer step; branch
    micro_rows: int = 128  # rows of a forward pass, halved until they fit into memory; branch
    eval_rows: int = 32  # the same in the evaluation; more than 32 exceed the 2 GiB of logits that it allows
    # Muon, for the matrices of the blocks
    matrix_lr: float = 0.04  # spectral norm moved per step; branch
    matrix_weight_decay: float = 0.2  # falls to 0 over the run; branch
    muon_momentum: tuple[float, float] = (0.85, 0.95)  # at the first step and after the ramp
    muon_ramp_steps: int = 200  # branch
    muon_beta2: float = 0.95  # NorMuon's second moment
    polar_steps: int = 5  # of the orthogonalisation; there are coefficients for 5
    # AdamW, for everything else; learning rates of embeddings and head are those of D = 768 and scale with D^-0.5
    embedding_lr: float = 0.9  # token and value embeddings; branch
    head_lr: float = 0.005  # branch
    scalar_lr: float = 0.5  # of the x0 scalars
    resid_lr_frac: float = 0.01  # of scalar_lr, for the residual scalars: every layer multiplies by them
    embedding_weight_decay: float = 0.001  # branch
    value_weight_decay: float = 0.003  # branch
    head_weight_decay: float = 0.01  # branch
    adam_betas: tuple[float, float] = (0.8, 0.95)
    x0_betas: tuple[float, float] = (0.96, 0.95)
    adam_eps: float = 1e-10  # gradients are tiny: the loss is a mean over all tokens
    # schedule, in fractions of the time budget
    warmup_frac: float = 0.0  # any warm-up hurt in the published search
    warmdown_frac: float = 0.75  # branch
    final_lr_frac: float = 0.05  # of the learning rate, at the end; branch

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_dim

    @property
    def n_kv_head(self) -> int:
        return self.n_head // self.queries_per_kv

    def __post_init__(self):
        if self.n_embd % self.head_dim or self.head_dim % 2:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of head_dim {self.head_dim}, an even number")
        if self.n_head % self.queries_per_kv:
            raise ValueError(f"{self.n_head} heads cannot be shared out by queries_per_kv {self.queries_per_kv}")
        if not self.windows or set(self.windows) - {"S", "L"}:
            raise ValueError(f"windows is {self.windows!r}; write one S or L for each layer, such as SSSL")
        if not 0 <= self.warmup_frac <= 1 - self.warmdown_frac <= 1:
            raise ValueError("warmup_frac and warmdown_frac must be in 0..1 and not exceed 1 together")
        if not 1 <= self.polar_steps <= len(POLAR_EXPRESS):
            raise ValueError(f"polar_steps is {self.polar_steps}, not in 1..{len(POLAR_EXPRESS)}")


POLAR_EXPRESS = (  # (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T, step by step; arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

FULL = Config()
SMALL = replace(
    FULL,
    depth=4,  # depth 4 and width 192 to 256 did best in 300 s on two cores
    n_embd=192,
    head_dim=64,
    windows="SSSL",
    short_window=64,  # T / 4; also the block that attention is cut into on the CPU
    batch_tokens=2**13,  # 2^12 and 2^14 were worse
    micro_rows=32,
    eval_rows=32,
)

# == 2. Attention: (q_BTNH, k_BTKH, v_BTKH, window) -> BTNH ============================================================
# A window of W lets a token see itself and the W tokens before it. All back ends are tested against window_mask.


@functools.lru_cache
def window_mask(queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 where the last `queries` of `keys` tokens may look and -inf elsewhere, (queries, keys)."""
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)
    allowed = (i >= j) & (i - j <= window)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(~allowed, -math.inf)


def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention: runs everywhere."""
    T = q.size(1)
    mask = None if window >= T - 1 else window_mask(T, T, window, q.dtype, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": q.size(1) != k.size(1)}
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Plain matrix products, for the CPU: a short window is cut into blocks that see themselves and the one before.

    A training step of SMALL took 720 ms with it and 796 ms with scaled_dot_product_attention in the same blocks.
    """
    B, T, N, H = q.shape
    shared = N // k.size(2)
    k, v = (x.repeat_interleave(shared, dim=2) if shared > 1 else x for x in (k, v))
    block = max(window, 16) if 2 * max(window, 16) < T else T
    blocks = -(-T // block)

    def in_blocks(x: torch.Tensor, before: int) -> torch.Tensor:  # B, blocks, N, before + block, H
        x = F.pad(x, (0, 0, 0, 0, before, blocks * block - T)).view(B, -1, block, N, H)
        return (torch.cat((x[:, :-1], x[:, 1:]), dim=2) if before else x).transpose(2, 3)

    before = block if blocks > 1 else 0
    mask = window_mask(block, before + block, window, q.dtype, q.device).expand(blocks, 1, -1, -1)
    if before:  # nothing is before the first block
        mask = mask.clone()
        mask[0, :, :, :block] = -math.inf
    scores = in_blocks(q * H**-0.5, 0) @ in_blocks(k, before).mT
    y = scores.add_(mask).softmax(dim=-1) @ in_blocks(v, before)
    return y.transpose(2, 3).reshape(B, -1, N, H)[:, :T]


class FlexAttention:
    """FlexAttention, for CUDA: compiled by Triton, skips the blocks that no token may see."""

    def __init__(self, seq_len: int, windows: set[int], device: torch.device):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def block_mask(window: int):
            allowed = lambda b, h, i, j: (i >= j) & (i - j <= window)  # noqa: E731 (flex_attention reads its source)
            return create_block_mask(allowed, None, None, seq_len, seq_len, device=device)

        self.attend = torch.compile(flex_attention, dynamic=False)
        self.masks = {window: block_mask(window) for window in windows}  # once: building one takes milliseconds

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shared = q.size(1) != k.size(1)
        return self.attend(q, k, v, block_mask=self.masks[window], enable_gqa=shared).transpose(1, 2)


class FlashAttention3:
    """FlashAttention-3 from the Hugging Face kernel hub: Hopper, bfloat16."""

    def __init__(self):
        url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        if not urllib.request.getproxies():
            try:
                socket.create_connection((url.hostname, url.port or 443), timeout=3).close()
            except OSError:  # without a network the hub's client would try again and again, instead of its cache
                os.environ["HF_HUB_OFFLINE"] = "1"
        import kernels

        self.attend = kernels.get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        return self.attend(q, k, v, causal=True, window_size=(window, 0))


def choose_attention(device: torch.device, dtype: torch.dtype, seq_len: int, windows: set[int]) -> Callable:
    """The fastest back end that works here; one line says so when the first choice does not load."""
    if device.type == "cpu":
        return block_attention
    if not can_compile(device):
        return sdpa_attention
    if torch.cuda.get_device_capability(device) == (9, 0) and dtype == torch.bfloat16:
        try:
            return FlashAttention3()
        except Exception as error:  # hub, network, wrong build: whatever it is, there is another back end
            reason = str(error).partition("\n")[0]
            print(f"FlashAttention-3 does not load ({type(error).__name__}: {reason}); using FlexAttention", flush=True)
    return FlexAttention(seq_len, windows, device)


# == 3. Model ==========================================================================================================


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, without gains: x / sqrt(mean(x^2)).

    Spelled out because F.rms_norm makes three times as many passes on the CPU: 688 instead of 766 ms a step of SMALL.
    """
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) * x.size(-1) ** -0.5
    return x * rms.clamp_min(1e-6).reciprocal().to(x.dtype)


def rotary_tables(seq_len: int, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the angles position * base^(-2i/H), float32 (T, 1, H/2)."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency)[:, None]
    return angles.cos(), angles.sin()


def rotate(x_BTNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: turns pairs of channels by an angle that grows with the position, so scores see only i - j."""
    a, b = x_BTNH.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Linear(nn.Linear):
    """Without a bias; float32 weights, used in the input's dtype."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int, window: int, vocab_size: int, attention: Callable):
        super().__init__()
        self.head_dim, self.window, self.attention = config.head_dim, window, attention
        n_kv = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, n_kv)
        self.c_v = Linear(config.n_embd, n_kv)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        # value embeddings: every other layer, the last one included, looks a part of its values up by the token
        self.value_embed = nn.Embedding(vocab_size, n_kv) if (config.depth - 1 - layer) % 2 == 0 else None
        self.value_gate = Linear(config.gate_channels, config.n_kv_head) if self.value_embed else None

    def forward(self, x_BTD: torch.Tensor, idx_BT: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = (*idx_BT.shape, -1, self.head_dim)
        q, k, v = (linear(x_BTD).view(heads) for linear in (self.c_q, self.c_k, self.c_v))
        if self.value_embed:
            gate = 2 * torch.sigmoid(self.value_gate(x_BTD[..., : self.value_gate.in_features]))
            v = v + gate[..., None] * self.value_embed(idx_BT).to(v.dtype).view(heads)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        return self.c_proj(self.attention(q, k, v, self.window).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_ratio * config.n_embd)
        self.c_proj = Linear(config.mlp_ratio * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: Config, layer: int, window: int, vocab_size: int, attention: Callable):
        super().__init__()
        self.attn = Attention(config, layer, window, vocab_size, attention)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, idx: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(norm(x), idx, cos, sin)
        return x + self.mlp(norm(x))


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of logits(x, weight), 512 positions at a time; the gradients are taken in the same pass.

    The logits are the largest tensor by far, and 512 of them stay in the CPU's cache: head and loss of SMALL take 126
    instead of 318 ms of a step.
    """

    @staticmethod
    def forward(ctx, x_MD: torch.Tensor, weight_VD: torch.Tensor, targets_M: torch.Tensor, logits: Callable):
        weight = weight_VD.detach().to(x_MD.dtype).requires_grad_()
        loss, dx, dw = torch.zeros((), device=x_MD.device), torch.empty_like(x_MD), torch.zeros_like(weight_VD)
        for x, targets, dx_part in zip(x_MD.split(512), targets_M.split(512), dx.split(512), strict=True):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                part = F.cross_entropy(logits(x, weight), targets, reduction="sum") / len(targets_M)
                dx_part[:], dw_part = torch.autograd.grad(part, (x, weight))
            loss, dw = loss + part.detach(), dw.add_(dw_part)
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw * grad, None, None


class GPT(nn.Module):
    """A pre-norm transformer. Weights are float32, the activations `dtype`, logits and loss float32."""

    def __init__(self, config: Config, vocab_size: int, seq_len: int, attention: Callable, dtype: torch.dtype):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        layers = enumerate(layer_windows(config, seq_len))
        self.blocks = nn.ModuleList(Block(config, i, window, vocab_size, attention) for i, window in layers)
        self.resid_lambdas = nn.Parameter(torch.ones(config.depth))
        self.x0_lambdas = nn.Parameter(torch.ones(config.depth))
        self.lm_head = Linear(config.n_embd, vocab_size)
        cos, sin = rotary_tables(seq_len, config.head_dim, config.rotary_base)
        self.register_buffer("cos", cos.to(self.wte.weight.device, dtype), persistent=False)
        self.register_buffer("sin", sin.to(self.wte.weight.device, dtype), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Blocks start as the identity: what they write is 0, and the gates of the value embeddings are open at 1."""
        s = math.sqrt(3 / self.config.n_embd)  # U(-s, s) has a standard deviation of 1 / sqrt(D)
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(self.config.x0_init)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -s * self.config.init_scale, s * self.config.init_scale)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.value_embed:
                nn.init.uniform_(block.attn.value_embed.weight, -s, s)
                nn.init.zeros_(block.attn.value_gate.weight)

    def logits(self, x: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """Next-token logits, float32, softly capped: c * tanh(z / c)."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(F.linear(x, weight_VD.to(x.dtype)).float() / cap)

    def forward(self, idx_BT: torch.Tensor, targets_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V), or the mean cross-entropy in nats where targets are given."""
        cos, sin = self.cos[: idx_BT.size(1)], self.sin[: idx_BT.size(1)]
        resid, start = self.resid_lambdas.to(self.dtype), self.x0_lambdas.to(self.dtype)
        x = x0 = norm(self.wte(idx_BT).to(self.dtype))
        for i, block in enumerate(self.blocks):
            x = block(resid[i] * x + start[i] * x0, idx_BT, cos, sin)
        x, weight = norm(x), self.lm_head.weight
        if targets_BT is None:
            return self.logits(x, weight)
        if x.is_cuda:  # the compiler fuses the loss with the soft-cap
            return F.cross_entropy(self.logits(x, weight).flatten(0, 1), targets_BT.flatten())
        return ChunkedLoss.apply(x.flatten(0, 1), weight, targets_BT.flatten(), self.logits)

    def flops_per_token(self) -> float:
        """Of forward and backward: 6 per matrix parameter, 12 N H per token seen (window or T, as it is published)."""
        matrices = sum(p.numel() for module in self.modules() if isinstance(module, Linear) for p in module.parameters())
        seen = sum(min(block.attn.window, len(self.cos)) for block in self.blocks)
        return 6 * matrices + 12 * self.config.n_embd * seen


def layer_windows(config: Config, seq_len: int) -> list[int]:
    """The window of every layer; the last one is long, so that every token can reach the whole row."""
    letters = [config.windows[i % len(config.windows)] for i in range(config.depth - 1)] + ["L"]
    return [seq_len if letter == "L" else min(config.short_window, seq_len) for letter in letters]


# == 4. Optimizer ======================================================================================================
# The updates are plain functions. Numbers come as 0-D CPU tensors, so that a new learning rate does not recompile them.


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def adamw_update(param, grad, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay) -> None:
    """One AdamW step in place, arXiv 1711.05101: the same result as torch.optim.AdamW."""
    param.mul_(1 - lr * weight_decay)
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(grad.square() * (1 - beta2))
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    param.sub_(exp_avg / denominator * (lr / (1 - beta1**step)))


def orthogonalize(matrices: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: (..., R, C) with singular values near 1, in `dtype`.

    Polar Express, arXiv 2505.16932: a polynomial of odd powers for each step, which works on singular values alone.
    """
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # A is the smaller of the two Gram matrices
    x = x / (torch.linalg.matrix_norm(x, dtype=torch.float32, keepdim=True) * 1.02 + 1e-6).to(dtype)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def normalize_neurons(update: torch.Tensor, second_moment: torch.Tensor, *, beta2) -> torch.Tensor:
    """NorMuon, arXiv 2510.05491: equal step sizes for the neurons of the longer side; the Frobenius norm stays."""
    dim = -1 if update.size(-2) >= update.size(-1) else -2
    second_moment.mul_(beta2).add_(update.square().mean(dim, keepdim=True) * (1 - beta2))
    scaled = update * second_moment.clamp_min(1e-10).rsqrt()
    size, scaled_size = (torch.linalg.matrix_norm(x, keepdim=True) for x in (update, scaled))
    return scaled * (size / scaled_size.clamp_min(1e-10))


def muon_update(
    params, grads, momentum_buffer, second_moment, *, lr, momentum, beta2, weight_decay, polar_steps, dtype
) -> None:
    """One step in place for a stack of matrices (matrices, R, C): Nesterov momentum, orthogonalised (Muon), normalised
    (NorMuon). Weight decay is cautious (arXiv 2510.12402): only where it and the update pull the same way.
    """
    momentum_buffer.mul_(momentum).add_(grads * (1 - momentum))
    update = orthogonalize(grads * (1 - momentum) + momentum_buffer * momentum, polar_steps, dtype)
    update = normalize_neurons(update.float(), second_moment, beta2=beta2)
    lr = lr * max(1.0, params.size(-2) / params.size(-1)) ** 0.5
    agree = update * params > 0
    params.sub_(lr * (update + weight_decay * params * agree))


def parameter_groups(model: GPT, config: Config) -> list[dict]:
    """Muon gets the matrices of the blocks, a group for each shape; AdamW the rest. `lr` is the peak."""
    attns = [block.attn for block in model.blocks]
    values = [attn.value_embed.weight for attn in attns if attn.value_embed]
    by_width = (config.n_embd / 768) ** -0.5

    def adamw(params: list, lr: float, betas: tuple[float, float], weight_decay: float) -> dict:
        return {"kind": "adamw", "params": params, "lr": lr, "betas": betas, "weight_decay": weight_decay}

    groups = [
        adamw([model.wte.weight], config.embedding_lr * by_width, config.adam_betas, config.embedding_weight_decay),
        adamw(values, config.embedding_lr * by_width, config.adam_betas, config.value_weight_decay),
        adamw([model.lm_head.weight], config.head_lr * by_width, config.adam_betas, config.head_weight_decay),
        adamw([model.resid_lambdas], config.scalar_lr * config.resid_lr_frac, config.adam_betas, 0.0),
        adamw([model.x0_lambdas], config.scalar_lr, config.x0_betas, 0.0),
    ]
    shapes: dict[torch.Size, list] = {}
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            shapes.setdefault(module.weight.shape, []).append(module.weight)
    for params in shapes.values():
        groups.append({"kind": "muon", "params": params, "lr": config.matrix_lr})
    covered = {id(param) for group in groups for param in group["params"]}
    if forgotten := [name for name, param in model.named_parameters() if id(param) not in covered]:
        raise ValueError(f"no optimizer group has {', '.join(forgotten)}; add them in parameter_groups")
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """Muon for stacks of matrices, AdamW for the rest; `schedule` moves the groups' numbers, `step` applies them."""

    def __init__(self, groups: list[dict], config: Config, dtype: torch.dtype, compiled: bool):
        super().__init__([{"initial_lr": group["lr"], **group} for group in groups], {})
        self.config, self.dtype = config, dtype
        compiler = functools.partial(torch.compile, dynamic=False, fullgraph=True) if compiled else lambda f: f
        self.adamw_update, self.muon_update = compiler(adamw_update), compiler(muon_update)
        self.schedule(0, 0.0)

    def schedule(self, step: int, progress: float) -> float:
        """Set the groups' numbers for this step; returns the fraction of the peak learning rate."""
        lr_frac = learning_rate_frac(progress, self.config)
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr_frac
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, self.config)
                group["weight_decay"] = matrix_weight_decay(progress, self.config)
        return lr_frac

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._step_muon(group)
            else:
                for param in group["params"]:
                    self._step_adamw(param, group)

    def _step_adamw(self, param: torch.Tensor, group: dict) -> None:
        state = self.state[param]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        state["step"] += 1
        numbers = {name: group[name] for name in ("lr", "weight_decay")} | {"eps": self.config.adam_eps}
        numbers |= {"step": state["step"], "beta1": group["betas"][0], "beta2": group["betas"][1]}
        self.adamw_update(param, param.grad, state["exp_avg"], state["exp_avg_sq"], **scalars(**numbers))

    def _step_muon(self, group: dict) -> None:
        params = torch.stack(group["params"])
        grads = torch.stack([param.grad for param in group["params"]])
        state = self.state[group["params"][0]]  # the first matrix holds the state of the whole stack
        if not state:
            mean_dim = -1 if params.size(-2) >= params.size(-1) else -2
            state.update(momentum_buffer=torch.zeros_like(params), second_moment=params.mean(mean_dim, True).zero_())
        numbers = {name: group[name] for name in ("lr", "momentum", "weight_decay")} | {"beta2": self.config.muon_beta2}
        fixed = {"polar_steps": self.config.polar_steps, "dtype": self.dtype}
        self.muon_update(params, grads, state["momentum_buffer"], state["second_moment"], **scalars(**numbers), **fixed)
        torch._foreach_copy_(group["params"], list(params.unbind(0)))


# == 5. Schedules: functions of the clock's progress, 0 to 1 ===========================================================


def learning_rate_frac(progress: float, config: Config) -> float:
    """Of the peak: up from 0 over warmup_frac, flat, then down to final_lr_frac over warmdown_frac."""
    if progress < config.warmup_frac:
        return progress / config.warmup_frac
    left = min(1.0, (1 - progress) / config.warmdown_frac) if config.warmdown_frac else 1.0
    return left + (1 - left) * config.final_lr_frac


def muon_momentum(step: int, config: Config) -> float:
    """A ramp over steps, not time: it waits for the buffer to fill, and the buffer counts steps."""
    first, last = config.muon_momentum
    return first + (last - first) * min(1.0, step / config.muon_ramp_steps)


def matrix_weight_decay(progress: float, config: Config) -> float:
    return config.matrix_weight_decay * (1 - progress)


# == 6. Device =========================================================================================================

PEAK_TFLOPS = {  # dense bfloat16, by the first name found in the device's; for MFU only
    "B200": 2250, "H200": 989.5, "GH200": 989.5, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989.5, "A100": 312,
    "L40S": 362, "L4": 121, "A10G": 70, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


def can_compile(device: torch.device) -> bool:
    """CUDA with Triton. On the CPU compiling made a step of SMALL 1.25x as fast (645 to 516 ms), but took 45 to 90 s at
    the first start and 9 to 20 s at every other.
    """
    if device.type != "cuda":
        return False
    from torch.utils._triton import has_triton

    return has_triton()


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it pays. On the CPU AMX made a step 1.8x as fast, AVX512-BF16 2.7x (1,777 to 650 ms on an EPYC);
    without either it is slower. MPS stays in float32: causal attention in 16 bits has leaked the future there.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), None)


# == 7. Warm-up and micro-batches ======================================================================================


def accumulate_gradients(model: nn.Module, batches: Iterator, micro_batches: int) -> tuple[torch.Tensor, int]:
    """Add the gradients of the mean loss over several micro-batches; returns that loss, on the device, and the epoch."""
    total = 0.0
    for _ in range(micro_batches):
        inputs, targets, epoch = next(batches)
        loss = model(inputs, targets) / micro_batches
        loss.backward()
        total = total + loss.detach()
    return total, epoch


def count_micro_batches(config: Config, rows: int, seq_len: int) -> int:
    micro_batches, rest = divmod(config.batch_tokens, rows * seq_len)
    if rest or not micro_batches:
        found = f"batch_tokens {config.batch_tokens} is not a multiple of {rows} rows of {seq_len} tokens"
        raise TrainError(f"{found}; make batch_tokens and micro_rows powers of two")
    return micro_batches


def random_batches(rows: int, seq_len: int, vocab_size: int, device: torch.device) -> Iterator:
    while True:
        tokens = torch.randint(vocab_size, (rows, seq_len + 1), device=device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 0


def warm_up(model: GPT, optimizer: MuonAdamW, batches: Iterator, micro_batches: int, eval_rows: int) -> None:
    """Two training steps and one evaluation pass on `batches`, so that the clock sees no compilation and memory is as
    full as it gets. Weights, optimizer and random numbers are afterwards what they were before.
    """
    device = model.wte.weight.device
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    generators = [torch] + ([torch.get_device_module(device)] if device.type != "cpu" else [])
    random_states = [generator.get_rng_state() for generator in generators]
    for _ in range(2):
        accumulate_gradients(model, batches, min(micro_batches, 2))
        optimizer.step()
        model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        model(next(batches)[0][:eval_rows])
    model.train()
    model.load_state_dict(saved)
    optimizer.state.clear()
    for generator, state in zip(generators, random_states, strict=True):
        generator.set_rng_state(state)


def fit_micro_batch(attempt: Callable[[int], None], rows: int, clean_up: Callable[[], None]) -> int:
    """The first of rows, rows / 2, rows / 4, ... with which attempt(rows) does not run out of memory."""
    while True:
        try:
            attempt(rows)
            return rows
        except torch.OutOfMemoryError:
            pass  # the exception holds the tensors of the attempt; it must be gone before memory can be freed
        clean_up()
        if rows == 1:
            raise TrainError("out of memory with a single row; make depth or n_embd smaller, or free the device")
        rows //= 2
        print(f"out of memory: trying micro-batches of {rows} rows", flush=True)

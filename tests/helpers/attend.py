"""What train.py chooses for its attention on a Hopper GPU, and whether it computes the right thing.

A CPU stands in for the GPU, and nothing for FlexAttention, whose compiler takes ten seconds to import. This
is the one place where the tests replace any of that. Prints JSON.
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: E402

train.can_compile = lambda device: True
torch.cuda.get_device_capability = lambda device: (9, 0)
train.flex_attention_for = lambda seq_len, windows, device: f"flex_attention {sorted(windows)} of {seq_len}"

SEQ_LEN = 96
torch.manual_seed(0)
config = train.Config(head_dim=16, n_embd=32, short_window=20, depth=3)
begun = time.monotonic()
attend = train.choose_attention(config, torch.device("cpu"), torch.bfloat16, SEQ_LEN)
seconds = time.monotonic() - begun
found = {"name": getattr(attend, "__name__", attend), "seconds": seconds, "errors": {}}
if callable(attend):
    for window in (0, 1, 20, SEQ_LEN):
        q, k, v = torch.randn(3, 2, SEQ_LEN, 4, 16)
        error = attend(q, k, v, window) - train.sdpa_attention(q, k, v, window)
        found["errors"][window] = error.abs().max().item()
print(json.dumps(found))

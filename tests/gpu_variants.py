"""Train variants of the Config one after another: run by hand, not by pytest, in a half hour with a GPU.

    AUTORESEARCH_BUDGET=75 python tests/gpu_variants.py base: "bigrams: ngram_length=2" "wide: n_embd=768"

A variant is a name, a colon, and NAME=VALUE pairs that take the place of fields of this device's Config. Each
is a plain run of train.py in a process of its own, with seed 42 or SEED, and becomes a row of a table. What
the runs print goes to stderr.
"""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402
import train  # noqa: E402

COLUMNS = "val_bpb num_steps total_tokens_M mfu_percent peak_vram_mb startup_seconds eval_seconds".split()
NAME = train.config_name(prepare.default_device())  # of the Config that this device uses


def config_of(variant: str) -> train.Config:
    """The Config of a variant; TypeError or ValueError if there is none like that."""
    _, colon, pairs = variant.partition(":")
    if not colon:
        raise ValueError(f"{variant!r} has no colon after its name")
    fields = {}
    for pair in pairs.split():
        field, _, value = pair.partition("=")
        fields[field] = ast.literal_eval(value)
    return dataclasses.replace(train.CONFIGS[NAME], **fields)


def train_variant(variant: str) -> int:
    """In a process of its own: train.py with another Config."""
    train.CONFIGS[NAME] = config_of(variant)
    sys.argv = ["train.py"]  # no description: nothing is recorded
    return train.main()


def main(variants: list[str]) -> int:
    if not variants:
        print(__doc__)
        return 1
    for variant in variants:
        config_of(variant)  # a typing error must not show after ten minutes
    device = prepare.device_name(prepare.default_device())
    print(f"{device}, {prepare.SCALE} scale, {prepare.TIME_BUDGET} s, seed {os.environ.get('SEED', 42)}\n")
    print("| variant | " + " | ".join(COLUMNS) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|", flush=True)
    failed = 0
    for variant in variants:
        command = [sys.executable, __file__, "--one", variant]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"\n{variant}\n{done.stdout}", file=sys.stderr, flush=True)
        values = dict(re.findall(r"^(\w+): +(\S+)$", done.stdout, re.M))
        print(f"| {variant} | " + " | ".join(values.get(name, "-") for name in COLUMNS) + " |", flush=True)
        failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        prepare.leave(train_variant(sys.argv[2]))
    sys.exit(main(sys.argv[1:]))

"""Records of runs that nobody has run, in the form in which the harness writes them, by `git fast-import`.

write_records(lab, [record(1), record(2, status="keep", val_bpb="1.05", train="# an idea\\n")])
"""

import hashlib
import random
from pathlib import Path

from helpers.lab import TRAIN, Lab

WHO = "Ada <ada@example.org> 1700000000 +0000"


def blob(text: str) -> str:
    """git's hash of a file."""
    raw = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


def record(number: int, **more: str) -> dict[str, str]:
    """The fields of a run; `train` is the text of its train.py, `details` what follows the first block."""
    fields = {
        "val_bpb": f"1.{number:06}",
        "memory_gb": "1.0",
        "status": "discard",
        "description": f"idea {number}",
        "seed": "42",
        "steps": "100",
        "seconds": "380",
        "branch": "main",
        "train": f"# idea {number}\n",
        "fingerprint": "0123abcd",
        "details": "",
    }
    fields |= more
    fields.setdefault("code", blob(fields["train"]))
    return fields


def text_of(fields: dict[str, str]) -> str:
    """The text of a record's commit."""
    block = [f"{name}: {value}" for name, value in fields.items() if name not in ("train", "details")]
    subject = f"val_bpb {fields.get('val_bpb')}: {fields.get('description')}"
    return "\n\n".join([subject, "\n".join(block), fields["details"]])


def ref(number: int) -> str:
    return f"refs/autoresearch/20250101T{number:06}.000Z-{number:07x}"


def write_records(lab: Lab, records: list[dict[str, str]], merged: bool = False) -> list[str]:
    """A ref and a commit for each; their short hashes. If `merged`, the branch moves along the kept ones."""
    head = lab.git("rev-parse", "HEAD")
    stream = []

    def data(text: str) -> None:
        raw = text.encode()
        stream.extend([b"data %d\n" % len(raw), raw, b"\n"])

    for number, fields in enumerate(records, 1):
        stream.append(f"commit {ref(number)}\nmark :{number}\ncommitter {WHO}\n".encode())
        data(text_of(fields))
        stream.append(f"from {head}\nM 100644 inline train.py\n".encode())
        data(fields["train"])
        if merged and fields["status"] == "keep":
            head = f":{number}"
    stream.append(f"reset {lab.git('symbolic-ref', 'HEAD')}\nfrom {head}\n".encode())
    lab.git("fast-import", "--quiet", "--force", input=b"".join(stream))
    lab.git("restore", "-SW", ".")
    names = lab.git(
        "for-each-ref", "--format=%(objectname:short)", *(ref(n + 1) for n in range(len(records)))
    )
    return names.split()


def write_night(folder: Path, count: int, only_crashes: bool = False) -> tuple[Lab, list[dict[str, str]]]:
    """A repository after `count` runs, of which some crashed and some were kept, and its records."""
    lab = Lab.create(folder)
    rng = random.Random(count)
    records = []
    level = 1.15
    for number in range(count):
        fields = record(number)
        if number == 0:
            fields |= {"train": TRAIN, "code": blob(TRAIN)}
        if only_crashes or (number and rng.random() < 0.1):
            fields |= {"val_bpb": "nan", "status": "crash"}
        elif number == 0 or rng.random() < 0.15:
            level -= abs(rng.gauss(0, 0.004)) * (number > 0)
            fields |= {"val_bpb": f"{level:.6f}", "status": "keep"}
        else:
            value = 3.2 if number == 7 else level + abs(rng.gauss(0, 0.006))
            fields["val_bpb"] = f"{value:.6f}"
        records.append(fields)
    commits = write_records(lab, records, merged=True)
    return lab, [fields | {"commit": commit} for fields, commit in zip(records, commits, strict=True)]

"""A script in a process whose machine differs from this one: other CPUs, modules or users.

outcome = on_machine(tmp_path / "job", lab, "train.py", first=block("fcntl", "resource"))
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from helpers.fork_server import Request
from helpers.forks import Job
from helpers.lab import Lab

# of the process that runs the script, before it does
NOBODY = "import os; os.setresuid(54321, 0, 0)"  # a user without an entry in passwd, with root's rights
NO_STDOUT = "import os, sys; os.close(1); sys.stdout = sys.__stdout__ = None"  # as Python begins with >&-
# root may read everything, except without its capabilities
NOT_ROOT = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0, ctypes.get_errno()
"""
NOT_ROOT = NOT_ROOT if hasattr(os, "geteuid") and os.geteuid() == 0 else ""


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """This process belongs to that user."""
    os.setresuid(54321, 0, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def block(*modules: str, forget: tuple[str, ...] = ()) -> str:
    """These modules cannot be imported; `forget` are imported afresh, as is all that lies in them."""
    return f"""
import sys
for name in list(sys.modules):
    if name.split(".")[0] in {(*modules, *forget)!r}:
        del sys.modules[name]
for name in {modules!r}:
    sys.modules[name] = None
"""


def use_cpus(*cpus: int) -> str:
    return f"import os; os.sched_setaffinity(0, {set(cpus)!r})"


def on_machine(folder: Path, lab: Lab, *command: object, first: str = "", without=(), **env: object) -> Job:
    """`python COMMAND` in the lab's folder; variables in `without` are unset."""
    environment = lab.env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": ""}
    for name, value in env.items():
        environment[name] = os.fspath(value)
    for name in without:
        environment.pop(name, None)
    return Job(folder, Request(str(lab.folder), environment, list(map(str, command)), first)).wait()

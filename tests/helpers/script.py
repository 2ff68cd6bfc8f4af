"""prepare.py in this process: real arguments, environment, files and network, without the cost of a process.

    prepare = load(AUTORESEARCH_CACHE=folder)       # the module once more, under other environment variables
    result = main("--data", corpus, AUTORESEARCH_CACHE=folder)
    assert result.returncode == 0

Signals and exit codes need a process: see forks.py.
"""

import contextlib
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PREPARE = Path(__file__).resolve().parents[2] / "prepare.py"


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def environment(**variables: object) -> Iterator[None]:
    """With these variables set, and those that are None unset."""
    before = dict(os.environ)
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = str(value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def load(**variables: object) -> ModuleType:
    """A module of its own, with its own constants and clock."""
    spec = importlib.util.spec_from_file_location("prepare_once_more", PREPARE)
    module = importlib.util.module_from_spec(spec)
    with environment(**variables):
        spec.loader.exec_module(module)
    return module


def main(*arguments: object, module: ModuleType | None = None, **variables: object) -> Result:
    """`prepare.py ARGUMENTS`; an unexpected error is raised."""
    stdout = io.StringIO()
    stderr = io.StringIO()
    module = module or load(**variables)
    with environment(**variables), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        returncode = module.main(list(map(str, arguments)))
    return Result(returncode, stdout.getvalue(), stderr.getvalue())

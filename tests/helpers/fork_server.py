"""A process that has imported torch already, and forks for every script that is to be run.

Each script runs as `__main__` in a process and a session of its own, a tenth of a second later: arguments,
environment, working folder, open files, exit code and signals are real. One server serves a whole session of
tests; address() starts it.

A request, over a socket: the length of a JSON text in eight bytes, with the three standard files, then the
text. The answer: a line with the process id, and, when it has ended, a line with its exit code. A byte to the
server is a signal for the script; a connection that is closed kills it.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROBES = 6  # of a train.py here; prepare.py has 256, which would take most of a run


class Request(NamedTuple):
    folder: str
    environment: dict[str, str]
    arguments: list[str]  # the script first
    first: str = ""  # code to run before the script


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.005)


@functools.cache
def address() -> Path:
    """The socket of the server, which ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="autoresearch-forks-"))
    path = folder / "socket"
    command = [sys.executable, "-W", "ignore", __file__, str(path)]  # 3.12 warns of forks beside threads
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)

    def end() -> None:
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder)

    atexit.register(end)
    wait_for(path.exists, 60)
    return path


def ask(request: Request, files: tuple[int, int, int]) -> socket.socket:
    """Have a script run; the answer comes on the socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(address()))
    text = json.dumps(request._asdict()).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "big")], files)
    connection.sendall(text)
    return connection


# -- the server


class Server:
    def __init__(self, path: str):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{path}.new")
        self.listener.listen()
        os.rename(f"{path}.new", path)  # only now does anybody find it
        self.connections: dict[int, socket.socket] = {}  # by process id
        self.a_child_ended, self.wakeup = socket.socketpair()
        for end in (self.a_child_ended, self.wakeup):
            end.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector = selectors.DefaultSelector()
        for file in (self.listener, self.a_child_ended, sys.stdin):
            self.selector.register(file, selectors.EVENT_READ)

    def serve(self) -> Request | None:
        """Fork for every request; returns in the child that is to run it, or None when stdin ends."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    for pid in self.connections:
                        os.kill(pid, signal.SIGKILL)
                    return None
                elif key.fileobj is self.listener:
                    request = self.fork()
                    if request:
                        return request
                elif key.fileobj is self.a_child_ended:
                    self.a_child_ended.recv(1000)
                    self.tell_of_ended_children()
                elif key.data in self.connections:  # otherwise it has just ended
                    self.pass_signals_on(key.data)

    def fork(self) -> Request | None:
        """The request in the child, None in the server."""
        connection, _ = self.listener.accept()
        length, files, _, _ = socket.recv_fds(connection, 8, 3)
        text = connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL) if len(files) == 3 else b""
        try:
            request = Request(**json.loads(text))
        except ValueError:  # the client was killed
            connection.close()
            for file in files:  # whoever reads its output would wait for their end
                os.close(file)
            return None
        pid = os.fork()
        if pid == 0:
            connection.close()
            self.become_child(request, files)
            return request
        for file in files:
            os.close(file)
        self.connections[pid] = connection
        self.selector.register(connection, selectors.EVENT_READ, pid)
        tell(connection, pid)
        return None

    def become_child(self, request: Request, files: list[int]) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for own in (self.listener, self.a_child_ended, self.wakeup, *self.connections.values()):
            own.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.setsid()
        os.chdir(request.folder)
        os.environ.clear()
        os.environ.update(request.environment)

    def tell_of_ended_children(self) -> None:
        with contextlib.suppress(ChildProcessError):  # there are none any more
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                connection = self.connections.pop(pid)
                tell(connection, os.waitstatus_to_exitcode(status))
                with contextlib.suppress(KeyError):
                    self.selector.unregister(connection)
                connection.close()

    def pass_signals_on(self, pid: int) -> None:
        connection = self.connections[pid]
        try:
            numbers = connection.recv(100)
        except ConnectionResetError:
            numbers = b""
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)
        if not numbers:  # the client is gone
            self.selector.unregister(connection)


def tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{number}\n".encode())


def run_script(request: Request) -> None:
    """What `python ARGUMENTS` does."""
    script = request.arguments[0]
    sys.argv = request.arguments
    sys.path[0] = str(Path(script).resolve().parent)
    sys.dont_write_bytecode = False  # as most people have it: compiling prepare.py takes a tenth of a second
    code = 1
    try:
        exec(request.first, {})
        if Path(script).name == "train.py":
            be_quick()
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(code)  # taking torch apart costs two seconds


def be_quick() -> None:
    """The one place where the harness is not as users have it. RUN_LIMIT: when its watchdog ends a run."""
    import prepare

    prepare.PROBES = PROBES
    if limit := os.environ.get("RUN_LIMIT"):
        prepare.GRACE = float(limit) - prepare.TIME_BUDGET
    prepare.CONSTANTS = prepare.constants()


if __name__ == "__main__":
    import concurrent.futures.thread  # noqa: F401

    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import numpy  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import requests  # noqa: F401
    import rustbpe  # noqa: F401
    import tiktoken  # noqa: F401
    import torch
    import tqdm  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()
    if request := Server(sys.argv[1]).serve():
        run_script(request)

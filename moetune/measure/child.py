"""`Child` runs a function in a separate Python process, which may hang or die without harm to this one.

`multiprocessing` is not used: its spawned processes run the user's script again, and its helper processes keep running.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pickle
import resource
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Any, Self

from moetune.errors import NoResultError
from moetune.measure.reasons import reason_of_death

DYING_S = 60.0
"""How long `Child.kill` waits. A killed process whose GPU still runs a kernel normally ends within seconds."""
ENDING_S = 1.0
"""How long a process whose connection is closed or garbled may take to end by itself."""
MESSAGE_S = 10
"""How long a message may take from its first byte to its last, in whole seconds."""
SWEEPING_S = 10.0
"""How long processes that have left a killed process's group are looked for."""
MOST_BYTES = 1 << 26
"""The largest message from a child. A longer one is none: its length is text that was written there."""
MARK_VARIABLE = "MOETUNE_CHILD"
_NOTE_BYTES = 4096
_LOG_TAIL_BYTES = 4096


class ChildDiedError(Exception):
    """The process has ended. The message says how."""


class GarbledError(OSError):
    """Something else than a message came from the other end, for instance because a kernel's code has written there."""


class Channel:
    """One end of the connection between parent and child.

    Both ends send and receive messages, which are picklable objects. The child also writes a note, which the parent can
    read at any time. A note does not wake the parent, so it does not disturb what the child is timing.

    Args:
        connection: this end of the connection.
        note: the descriptor of the note's file.
        most_bytes: the largest message that this end receives, or None.
    """

    def __init__(self, connection: Connection[Any, Any], note: int, most_bytes: int | None = None) -> None:
        self.connection = connection
        self._note = note
        self._most_bytes = most_bytes
        self._last: Any = None
        self._inode = os.fstat(connection.fileno()).st_ino

    def send(self, message: object) -> None:
        """Sends a copy of the message.

        The message is pickled here because `Connection.send`, once torch is loaded, shares the memory of tensors.

        Raises:
            OSError: the other end is closed.
        """
        self.connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def receive(self) -> Any:
        """Waits for the next message and returns it.

        Raises:
            EOFError, OSError: the other end is closed.
            GarbledError: what came is no message.
        """
        message = self.connection.recv_bytes(self._most_bytes)
        try:
            return pickle.loads(message)
        except Exception as error:  # bytes that are no pickle can raise anything
            raise GarbledError(f"{len(message)} bytes that are no message") from error

    def require_open(self) -> None:
        """Checks that nobody has closed this end's descriptor, or opened something else under its number.

        Raises:
            OSError: somebody has.
        """
        with contextlib.suppress(OSError):
            if os.fstat(self.connection.fileno()).st_ino == self._inode:
                return
        raise OSError("it closed its connection to moetune")

    def note(self, value: object) -> None:
        """Replaces the note. This takes microseconds."""
        os.pwrite(self._note, pickle.dumps(value), 0)
        self._last = value

    def noted(self) -> Any:
        """Returns the last note, or the one read before if something else was written over it."""
        note = os.pread(self._note, _NOTE_BYTES, 0)
        while note != (again := os.pread(self._note, _NOTE_BYTES, 0)):
            note = again  # a read during a write may mix two notes; two equal reads are one whole note
        with contextlib.suppress(Exception):  # bytes that are no pickle can raise anything
            if isinstance(value := pickle.loads(note), type(self._last)):
                self._last = value
        return self._last


class Child:
    """A process that runs `serve(channel, *arguments)` and then ends.

    It imports from the parent's `sys.path`. It ignores Ctrl-C, SIGTERM and SIGHUP, which a whole job may get, and is
    killed when its parent ends. When memory runs out, the system kills it before other processes. It writes nothing
    to the parent's stdout or stderr.

    With it, everything is killed that it has started. Processes that have left its group, such as daemons, are found by
    a mark in their environment.

    Args:
        serve: a function defined in a module; it and its arguments are pickled.
        note: the channel's note until the child writes one.
        environment: environment variables to set in addition to the parent's.
        niceness: the process's niceness, 0 to 19; a higher value gives it less CPU time.
    """

    def __init__(
        self,
        serve: Callable[..., None],
        *arguments: object,
        note: object = None,
        environment: Mapping[str, str] = {},
        niceness: int = 0,
    ) -> None:
        # files, not pipes: a file never blocks its writer and can be read after the process has ended
        self._log, self._note = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        parent_end, child_end = Pipe()
        _limit_waits(parent_end.fileno())
        self.channel = Channel(parent_end, self._note.fileno(), MOST_BYTES)
        self._note.seek(_NOTE_BYTES)  # what else is written to this descriptor lands after the note
        self._mark = secrets.token_hex(16)
        handles = (child_end.fileno(), self._note.fileno())
        with child_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *map(str, handles), str(niceness)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                pass_fds=handles,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
                    **environment,
                    MARK_VARIABLE: self._mark,
                },
                process_group=0,  # so that compilers it starts can be killed with it, and Ctrl-C does not reach it
            )
        self.give(serve, *arguments, note=note)

    def give(self, serve: Callable[..., None], *arguments: object, note: object = None) -> None:
        """Sends the process a function to run, with its arguments. It is killed if they cannot be pickled.

        Args:
            serve, arguments, note: as for the class.
        """
        self.channel.note(note)
        try:
            self.channel.send((serve, arguments))
        except ConnectionError:  # the process has already ended; the next `receive` raises EOFError
            pass
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its process group."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def died(self) -> ChildDiedError:
        """Returns the error that says how the process ended. Call it once the channel is closed or garbled.

        It also kills everything that the process started.
        """
        has_ended = True
        try:
            self._process.wait(timeout=ENDING_S)
        except subprocess.TimeoutExpired:
            has_ended = False
        self._log.seek(max(0, os.fstat(self._log.fileno()).st_size - _LOG_TAIL_BYTES))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.kill()
        code = self._process.returncode
        assert code is not None
        if not has_ended and code == -signal.SIGKILL:
            return ChildDiedError("the process wrote something else than messages to its connection to moetune")
        return ChildDiedError(reason_of_death(code, lines[-1].strip() if lines else ""))

    def kill(self) -> None:
        """Kills the process and everything that it started, and waits until it has ended.

        Raises:
            NoResultError: the process has not ended within `DYING_S`.
        """
        kill_all([self])

    def _reap(self) -> None:
        try:
            self._process.wait(timeout=DYING_S)
        except subprocess.TimeoutExpired:
            raise NoResultError(
                f"Process {self.pid} was killed and has not ended within {DYING_S:g} s.",
                "Its GPU may need a reset. Look at the output of nvidia-smi and dmesg.",
            ) from None
        finally:
            self.channel.connection.close()
            self._log.close()
            self._note.close()


def kill_all(children: Iterable[Child]) -> None:
    """Kills processes as `Child.kill` does, with one look at the system's processes for all of them."""
    alive = [child for child in children if not child._log.closed]
    for child in alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses to signal a dead group
            os.killpg(child.pid, signal.SIGKILL)
    if alive:
        _kill_marked([child._mark for child in alive])
    for child in alive:
        child._reap()


def _kill_marked(marks: Iterable[str]) -> None:
    """Kills all processes, apart from this one, that have one of the marks in their environment."""
    wanted = [f"{MARK_VARIABLE}={mark}".encode() for mark in marks]
    deadline = time.monotonic() + SWEEPING_S
    while time.monotonic() < deadline:
        found = [pid for pid, environment in _environments() if any(mark in environment for mark in wanted)]
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.002)  # until they are gone, and with them what they may have started meanwhile


def _environments() -> Iterator[tuple[int, bytes]]:
    """Yields the other processes that this user may look into, each with the environment that it was started with."""
    for folder in glob.iglob("/proc/[0-9]*"):
        pid = int(folder.rpartition("/")[2])
        with contextlib.suppress(OSError), open(f"{folder}/environ", "rb") as file:
            if pid != os.getpid():
                yield pid, file.read()


def _limit_waits(descriptor: int) -> None:
    """Ends the read of a message whose end does not come with an error, after `MESSAGE_S`."""
    with socket.socket(fileno=os.dup(descriptor)) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", MESSAGE_S, 0))


def _main(connection: int, note: int, niceness: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: None)  # no SIG_IGN, which compilers that it starts would inherit
    threading.Thread(target=_die_with_parent, args=(connection,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # to write the core dump of a CUDA process takes minutes
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    os.nice(niceness)
    ours: Connection[Any, Any] = Connection(connection)
    for number in (connection, note):
        os.set_inheritable(number, False)  # or a process that outlives this one would keep them open
    os.register_at_fork(after_in_child=lambda: _leave(ours, note))
    channel = Channel(ours, note)
    try:
        serve, arguments = channel.receive()
        serve(channel, *arguments)
    except BaseException:
        traceback.print_exc()  # `Child.died` reports the last line
        os._exit(1)
    os._exit(0)  # skips clean-up, which could hang on a broken device


def _leave(connection: Connection[Any, Any], note: int) -> None:
    """Closes what a copy of the process, which a kernel's code has forked, must not answer or note by."""
    for close in (connection.close, partial(os.close, note)):
        with contextlib.suppress(OSError):
            close()


def _die_with_parent(connection: int) -> None:
    hang_up = select.poll()
    hang_up.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
    hang_up.poll()
    _kill_marked([os.environ.get(MARK_VARIABLE, "")])
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))

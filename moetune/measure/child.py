"""`Child` runs a function in a separate Python process, which may hang or die without harm to this one.

`multiprocessing` is not used: its spawned processes run the user's script again, and its helper processes keep running.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any, Self

from moetune.errors import NoResultError
from moetune.measure.reasons import reason_of_death

DYING_S = 60.0
"""How long `Child.kill` waits. A killed process whose GPU still runs a kernel normally ends within seconds."""
_NOTE_BYTES = 4096
_LOG_TAIL_BYTES = 4096


class ChildDiedError(Exception):
    """The process has ended. The message says how."""


class Channel:
    """One end of the connection between parent and child.

    Both ends send and receive messages, which are picklable objects. The child also writes a note, which the parent can
    read at any time. A note does not wake the parent, so it does not disturb what the child is timing.
    """

    def __init__(self, connection: Connection[Any, Any], note: int) -> None:
        self.connection = connection
        self._note = note

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
        """
        return pickle.loads(self.connection.recv_bytes())

    def note(self, value: object) -> None:
        """Replaces the note. This takes microseconds."""
        os.pwrite(self._note, pickle.dumps(value), 0)

    def noted(self) -> Any:
        """Returns the last note."""
        note = os.pread(self._note, _NOTE_BYTES, 0)
        while note != (again := os.pread(self._note, _NOTE_BYTES, 0)):
            note = again  # a read during a write may mix two notes; two equal reads are one whole note
        return pickle.loads(note)


class Child:
    """A process that runs `serve(channel, *arguments)` and then ends.

    It imports from the parent's `sys.path`. It ignores Ctrl-C and is killed when its parent ends. When memory runs out,
    the system kills it before other processes. It writes nothing to the parent's stdout or stderr.

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
        self.channel = Channel(parent_end, self._note.fileno())
        self.channel.note(note)
        handles = (child_end.fileno(), self._note.fileno())
        with child_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *map(str, handles), str(niceness)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                pass_fds=handles,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **environment},
                process_group=0,  # so that compilers it starts can be killed with it, and Ctrl-C does not reach it
            )
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

    def died(self) -> ChildDiedError:
        """Returns the error that says how the process ended. Call it once the channel has closed.

        It also kills everything that the process started.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self._log.seek(max(0, os.fstat(self._log.fileno()).st_size - _LOG_TAIL_BYTES))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.kill()
        assert self._process.returncode is not None
        return ChildDiedError(reason_of_death(self._process.returncode, lines[-1].strip() if lines else ""))

    def kill(self) -> None:
        """Kills the process and everything that it started, and waits until it has ended.

        Raises:
            NoResultError: the process has not ended within `DYING_S`.
        """
        if self._log.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses to signal a dead group
            os.killpg(self.pid, signal.SIGKILL)
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


def _main(connection: int, note: int, niceness: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, args=(connection,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # to write the core dump of a CUDA process takes minutes
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    os.nice(niceness)
    channel = Channel(Connection(connection), note)
    try:
        serve, arguments = channel.receive()
        serve(channel, *arguments)
    except BaseException:
        traceback.print_exc()  # `Child.died` reports the last line
        os._exit(1)
    os._exit(0)  # skips clean-up, which could hang on a broken device


def _die_with_parent(connection: int) -> None:
    hang_up = select.poll()
    hang_up.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
    hang_up.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))

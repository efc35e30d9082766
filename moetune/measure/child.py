"""`Child`: a Python process of ours that may hang or die without harm.

Not `multiprocessing`: its spawned processes run the user's script again, and its helpers stay behind.
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
"""A killed process whose GPU still runs a kernel is gone within seconds; past this it never will be."""
_NOTE_BYTES = 4096
_LAST_BYTES = 4096


class ChildDiedError(Exception):
    """The process is gone; the message says how it ended."""


class Channel:
    """One end of what joins parent and child: messages both ways, and a note that the parent can read at any time.

    Messages are any picklable objects. The note tells what the child is at without waking the parent, which would
    disturb what the child is timing.
    """

    def __init__(self, connection: Connection[Any, Any], note: int) -> None:
        self.connection = connection
        self._note = note

    def send(self, message: object) -> None:
        """Sends a copy. Plain pickles: torch's own for `Connection.send` would share memory between the processes.

        Raises:
            OSError: the other end is gone.
        """
        self.connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def receive(self) -> Any:
        """The next message; waits for it.

        Raises:
            EOFError, OSError: the other end is gone.
        """
        return pickle.loads(self.connection.recv_bytes())

    def note(self, value: object) -> None:
        """Replaces the note; takes microseconds."""
        os.pwrite(self._note, pickle.dumps(value), 0)

    def noted(self) -> Any:
        """The last note."""
        note = os.pread(self._note, _NOTE_BYTES, 0)
        while note != (again := os.pread(self._note, _NOTE_BYTES, 0)):
            note = again  # what is read while it is written may be parts of two notes; what is read twice is whole
        return pickle.loads(note)


class Child:
    """A process that runs `serve(channel, *arguments)` and then ends.

    It imports from the parent's `sys.path`, is deaf to Ctrl-C, dies with its parent whatever it is doing, is the first
    to be sacrificed when memory runs out, and writes neither to stdout nor to stderr.

    Args:
        serve: a function of a module; it and its arguments are pickled.
        note: the channel's note until the child writes one.
        environment: variables that differ from the parent's.
        niceness: how much the process yields to others; 0 to 19.
    """

    def __init__(
        self,
        serve: Callable[..., None],
        *arguments: object,
        note: object = None,
        environment: Mapping[str, str] = {},
        niceness: int = 0,
    ) -> None:
        # a file each, not pipes: nobody has to empty them, and they outlive the process
        self._log, self._note = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = Pipe()
        self.channel = Channel(ours, self._note.fileno())
        self.channel.note(note)
        handles = (theirs.fileno(), self._note.fileno())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *map(str, handles), str(niceness)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                pass_fds=handles,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **environment},
                process_group=0,  # so that the compilers it starts can be killed with it, and Ctrl-C does not reach it
            )
        try:
            self.channel.send((serve, arguments))
        except BrokenPipeError:  # its end is found out by whoever waits for an answer
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
        """Of the process, which leads a process group of its own."""
        return self._process.pid

    def died(self) -> ChildDiedError:
        """To be raised once the channel has ended: says how the process ended. Leaves nothing of it behind."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self._log.seek(max(0, os.fstat(self._log.fileno()).st_size - _LAST_BYTES))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.kill()
        assert self._process.returncode is not None
        return ChildDiedError(reason_of_death(self._process.returncode, lines[-1].strip() if lines else ""))

    def kill(self) -> None:
        """Ends the process and all that it started, at once, and waits until it is gone.

        Raises:
            NoResultError: it does not die.
        """
        if self._log.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS forbids to signal a dead group
            os.killpg(self.pid, signal.SIGKILL)
        try:
            self._process.wait(timeout=DYING_S)
        except subprocess.TimeoutExpired:
            raise NoResultError(
                f"Process {self.pid} was killed and has not ended within {DYING_S:g} s.",
                "Its GPU may need a reset: see nvidia-smi and dmesg.",
            ) from None
        finally:
            self.channel.connection.close()
            self._log.close()
            self._note.close()


def _main(connection: int, note: int, niceness: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, args=(connection,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of a process with a CUDA context takes minutes to write
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    os.nice(niceness)
    channel = Channel(Connection(connection), note)
    try:
        serve, arguments = channel.receive()
        serve(channel, *arguments)
    except BaseException:
        traceback.print_exc()  # its last line becomes the reason
        os._exit(1)
    os._exit(0)  # no clean-up, which could hang on a broken device


def _die_with_parent(connection: int) -> None:
    hang_up = select.poll()
    hang_up.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
    hang_up.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))

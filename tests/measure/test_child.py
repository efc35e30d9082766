"""The channel between a process and its child."""

import os
import pickle
import tempfile
from multiprocessing.connection import Pipe

from moetune.measure.child import Channel


def test_a_note_that_is_read_while_it_is_written_is_read_again(monkeypatch):
    ours, theirs = Pipe()
    with ours, theirs, tempfile.TemporaryFile() as file:
        channel = Channel(ours, file.fileno())
        channel.note("a note of one length")
        old = os.pread(file.fileno(), 4096, 0)
        channel.note({"another": "note"})
        torn = pickle.dumps({"another": "note"})[:12] + old[12:]
        real, torn_reads = os.pread, [torn]
        monkeypatch.setattr(os, "pread", lambda *where: torn_reads.pop() if torn_reads else real(*where))
        assert channel.noted() == {"another": "note"}
        assert not torn_reads

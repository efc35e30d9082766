"""What a process that tunes at an engine's start may do. Each function stands for `start_tune._tune`."""

import os
import signal
import time


def finishes(channel, *asked):
    channel.send(None)


def repeats(channel, *asked):
    channel.send("; ".join(map(str, asked[2:])))


def raises(channel, *asked):
    raise ValueError("not a MoetuneError")


def is_killed(channel, *asked):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(channel, *asked):
    time.sleep(600)

"""A module that takes some time to be imported, and says when."""

import time

import waiting

waiting.ready()
for _ in range(30):
    time.sleep(0.01)

"""Writes a profile in which two buckets have each other's kind of tactic, to see that `moetune check` finds it.

    python benchmarks/four_gpus/spoiled.py PROFILE.json SPOILED.json

Bucket 64 gets the tactic of the largest bucket, and bucket 512 that of the smallest one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def spoiled(profile: dict[str, Any]) -> dict[str, Any]:
    """Returns the document of a profile with the tactics of buckets 64 and 512 replaced."""
    choices = profile["choices"]
    wrong = {64: choices[-1]["tactic"], 512: choices[0]["tactic"]}
    made = [{**choice, "tactic": wrong.get(choice["rows"], choice["tactic"])} for choice in choices]
    return {**profile, "choices": made}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(spoiled(json.loads(source.read_text()))))

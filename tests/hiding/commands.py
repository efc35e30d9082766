"""Runs commands in one process, and writes their exit codes and their output as JSON.

Usage: commands.py COMMANDS.json, a list of lists of words.
"""

import json
import sys
from pathlib import Path

from click.testing import CliRunner

from moetune.cli.main import main

answers = []
for words in json.loads(Path(sys.argv[1]).read_text()):
    result = CliRunner().invoke(main, words)
    answers.append({"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr})
json.dump(answers, sys.stdout)

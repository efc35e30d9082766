import os
import re
import shlex
import subprocess
import sys

import pytest
from pages import ROOT, text
from processes import GIVE_UP_S

import moetune


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page that `make docs` writes. A warning is an error there."""
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("api")
    (line,) = (line for line in text("Makefile").splitlines() if "-m pdoc" in line)
    words = [str(folder) if word == "build/api" else word for word in shlex.split(line)[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=GIVE_UP_S)
    assert done.returncode == 0, done.stderr
    return (folder / "moetune.html").read_text(encoding="utf-8")


def test_every_public_name_has_its_section(page):
    assert set(moetune.__all__) == set(re.findall(r'<section id="(\w+)"', page))


def test_members_and_the_sections_of_docstrings_are_rendered(page):
    assert 'id="Profile.tactic"' in page
    assert page.count("Raises") > 5

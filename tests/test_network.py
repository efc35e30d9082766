"""Only pip contacts an index: no code names an address of one, or opens a URL."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("moetune", "tests", "benchmarks", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix not in (".json", ".pyc", ".gz")
]
INDEX = re.compile(r"\bpypi\.org|\bpythonhosted\.org|\b(?:simple|packages)/[\w.-]+\.whl|--index-url|--find-links")
CLIENT = re.compile(r"^\s*(?:import|from)\s+(?:urllib\.request|http\.client|requests|httpx|aiohttp|urllib3)\b", re.M)


@pytest.mark.parametrize("what", [INDEX, CLIENT], ids=["index address", "http client"])
def test_no_code_contacts_an_address(what):
    assert len(SOURCES) > 200
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in SOURCES if path != Path(__file__)}
    assert not [str(path.relative_to(ROOT)) for path, text in texts.items() if what.search(text)]


def test_the_patterns_find_what_they_look_for():
    assert INDEX.search("urlopen('https://pypi.org/simple/vllm/')")
    assert CLIENT.search("import os\nimport urllib.request\n")
    assert not CLIENT.search("from urllib.parse import urlparse\n")

import re

import pytest
from pages import PAGES, ROOT, anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_link_has_a_target(page):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_the_readme_links_every_page():
    linked = set(re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    pages = {str(path.relative_to(ROOT)) for path in PAGES} - {"README.md"}
    assert {page for page in pages if page not in linked and page.rpartition("/")[0] not in linked} == set()


def test_no_page_promises_an_index():
    for page in PAGES:
        assert "pip install moetune" not in page.read_text(encoding="utf-8"), page


def test_no_long_line_is_on_two_pages():
    """A fact that is written twice is soon wrong once."""
    seen, twice = {}, []
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for line in {line.strip() for line in prose.splitlines() if len(line.strip()) > 80}:
            if line in seen:
                twice.append((line, seen[line], page.name))
            seen[line] = page.name
    assert not twice


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_file_that_is_named_exists(page):
    named = re.findall(
        r"`((?:moetune|tests|benchmarks|docs|examples|profiles)/[\w./*-]*)`", page.read_text(encoding="utf-8")
    )
    placeholder = re.compile(r"[A-Z]{4,}[.\/]")
    assert not [path for path in named if not placeholder.search(path) and not list(ROOT.glob(path))]

"""The project's Markdown pages, and what can be read out of one."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    list(ROOT.glob("*.md"))
    + [path for folder in ("docs", "profiles", "benchmarks", "examples") for path in (ROOT / folder).glob("*.md")]
)


def text(page):
    """The text of a page, given by its path below the repository's root."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language=""):
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def anchors(path):
    """The anchors of a page's headings, spelled as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

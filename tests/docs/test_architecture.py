import re

from pages import ROOT, text
from test_floors import FLOORS

LISTED = re.findall(r"^\| `([\w/.]+)` \|", text("docs/architecture.md"), re.M)


def test_the_rooms_listed_are_the_packages_rooms():
    found = {path.name + "/" for path in (ROOT / "moetune").iterdir() if (path / "__init__.py").exists()}
    found |= {path.name for path in (ROOT / "moetune").glob("*.py")} - {"__init__.py"}
    assert set(LISTED) == found


def test_the_rooms_are_listed_in_the_order_that_imports_follow():
    order = [FLOORS.index(room.removesuffix("/").removesuffix(".py")) for room in LISTED]
    assert order == sorted(order)

import pytest
from planted_points import point

from moetune.dep_bench.journal import PointJournal
from moetune.errors import StoreError


def test_finished_points_are_found_again(tmp_path):
    path = tmp_path / "made" / "points.jsonl"
    journal = PointJournal(path)
    assert journal.find("a") is None
    journal.add("a", point())
    journal.add("b", point(tokens=256))
    again = PointJournal(path)
    assert (again.find("a"), again.find("b"), again.find("c")) == (point(), point(tokens=256), None)


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    path = tmp_path / "points.jsonl"
    PointJournal(path).add("a", point())
    PointJournal(path).add("b", point())
    path.write_bytes(path.read_bytes()[:-20])
    cut = PointJournal(path)
    assert (cut.find("a"), cut.find("b")) == (point(), None)
    cut.add("b", point(tokens=1))
    assert PointJournal(path).find("b") == point(tokens=1)


def test_without_a_file_points_are_kept_in_memory_only(tmp_path):
    journal = PointJournal(None)
    journal.add("a", point())
    assert journal.find("a") == point()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_used_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be read"):
        PointJournal(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        PointJournal(tmp_path / "file" / "below").add("a", point())

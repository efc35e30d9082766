import pytest
from triton_profiles import profile

from moetune.errors import UsageError
from moetune.export.write import write

FILES = {"regime/a.json": "{}\n", "regime/configs/triton_3_6_0/ü.json": "ü\n"}


def test_files_are_written_once(tmp_path):
    out = tmp_path / "new" / "out"
    assert set(write(FILES, out).values()) == {"written"}
    assert {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()} == FILES
    assert set(write(FILES, out).values()) == {"unchanged"}


def test_another_content_is_kept_unless_forced(tmp_path):
    path = tmp_path / "regime/a.json"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"exists with other content. Nothing was written.*--force"):
        write(FILES, tmp_path)
    assert path.read_text() == "mine"
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == ["a.json"]
    assert write(FILES, tmp_path, force=True)[path] == "written"
    assert path.read_text() == "{}\n"


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "regime").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot be written: Not a directory. Give another --out"):
        write(FILES, tmp_path)


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "regime/a.json"
    path.parent.mkdir()
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        write(FILES, tmp_path, force=True)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == ["a.json"]


def test_a_profile_is_exported_in_one_call(tmp_path):
    from moetune.export import export_profile

    made = export_profile(profile(), "vllm", tmp_path)
    assert made
    assert set(made.values()) == {"written"}
    assert all(path.is_relative_to(tmp_path) and path.is_file() for path in made)
    assert set(export_profile(profile(), "vllm", str(tmp_path)).values()) == {"unchanged"}


def test_a_second_export_of_the_same_profile_only_rewrites_where_it_came_from(tmp_path):
    from moetune.export import export

    first, second = (export(profile(), "vllm", command=command).files for command in ("by options", "by its path"))
    write(first, tmp_path)
    states = {path.name: state for path, state in write(second, tmp_path).items()}
    written = [name for name, state in states.items() if state == "written"]
    assert len(written) == 1
    assert written[0].endswith(".vllm.moetune.json")
    assert '"by its path"' in next(tmp_path.rglob("*.moetune.json")).read_text()
    (tmp_path / next(name for name in first if "/E=" in name and "moetune" not in name)).write_text("{}")
    with pytest.raises(UsageError, match="exists with other content"):
        write(second, tmp_path)

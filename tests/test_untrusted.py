"""What lies where a file is expected, and what stands in it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from moetune.untrusted import MOST_BYTES, MOST_NESTING, opened, parse_json, read_bytes, read_json


def test_a_link_is_followed_to_its_regular_file(tmp_path):
    (tmp_path / "file").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "second").symlink_to("link")
    assert read_json(tmp_path / "second") == {"a": 1}


def test_a_fifo_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="it is a FIFO, not a regular file"):
        read_bytes(tmp_path / "fifo")


def test_a_link_to_a_device_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="it is a device, not a regular file"):
        read_bytes(tmp_path / "link")


def test_a_socket_a_folder_and_a_loop_are_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(OSError, match="socket"):
            read_bytes(Path("socket"))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    with pytest.raises(OSError, match="loop"):
        read_bytes("loop")
    with pytest.raises(OSError, match="null character"):
        read_bytes("a\0b")


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10**11)  # a sparse file
    with pytest.raises(OSError, match="it has more than 8,388,608 bytes"):
        read_bytes(tmp_path / "large")


def test_a_file_without_a_size_is_bounded_too():
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    with pytest.raises(OSError, match="it has more than 5 bytes"):
        read_bytes("/proc/self/status", most=5)


def test_a_reader_may_take_a_file_in_parts(tmp_path):
    (tmp_path / "file").write_bytes(b"one\ntwo\n")
    with opened(tmp_path / "file", 100) as file:
        assert file.readline() == b"one\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "has more than 64 levels"),
        ("[" * (MOST_NESTING + 1) + "]" * (MOST_NESTING + 1), "has more than 64 levels"),
        ("9" * 401, "has more than 40 digits"),
        ("-" + "9" * 5000, "has more than 40 digits"),
        ("1e999", "is too large"),
        ("NaN", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        (r'{"a": "\ud800"}', "half of a character"),
        (r'{"\udfff": 1}', "half of a character"),
        ("[" + "1," * 1_000_001 + "1]", "has more than 1,000,000 values"),
        ('"' + "x" * MOST_BYTES + '"', "has more than 8,388,608 characters"),
        (b"\xff\xfe", "no UTF-8 text at byte 0"),
    ],
)
def test_a_document_that_breaks_a_rule_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_json(text)
    assert len(str(error.value)) < 400


def test_equal_keys_are_an_error_in_moetunes_own_files_only():
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2} == json.loads('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="the key 'a' stands twice in one object"):
        parse_json('{"a": 1, "a": 2}', own=True)


def test_what_configs_have_is_read():
    text = '{"length": 1000000000000000019884624838656, "eps": 1e-06, "nested": [[[{"a": null}]]], "ä": "😀"}'
    assert parse_json(text) == json.loads(text)
    assert parse_json(b"\xef\xbb\xbf{}") == {}
    assert parse_json("[" * MOST_NESTING + "]" * MOST_NESTING)

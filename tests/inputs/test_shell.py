"""A launch line's words are a shell's, by the shell's own rules."""

import os
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import GIVE_UP_S

from moetune.errors import UsageError
from moetune.inputs.shell import commands


def texts(text):
    return [[word.text for word in command.words] for command in commands(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a -x 8 > log.txt", [["a", "-x", "8"]]),
        ("a -x 8 >log 2>&1", [["a", "-x", "8"]]),
        ("a -x 8 &>> log", [["a", "-x", "8"]]),
        ("a < in 2>/dev/null b", [["a", "b"]]),
        ("a 2> err -x", [["a", "-x"]]),
        ("a -x2>err", [["a", "-x2"]]),
        ("a -x;", [["a", "-x"]]),
        ("a & b && c || d | tee e", [["a"], ["b"], ["c"], ["d"], ["tee", "e"]]),
        ("a # b c\nd", [["a"], ["d"]]),
        ("# don't\na b#c", [["a", "b#c"]]),
        ("a \\\n  b", [["a", "b"]]),
        ("a \\   # said\n  b", [["a", "b"]]),
        ("a \\\r\n b", [["a", "b"]]),
        ("a b\\\nc", [["a", "bc"]]),
        ("a 'b c' \"d 'e'\" f\\ g", [["a", "b c", "d 'e'", "f g"]]),
        ("a ''", [["a", ""]]),
        ("(a b); { c; }", [["a", "b"], ["c"]]),
        ("if true; then a b; fi", [["true"], ["a", "b"]]),
        ("cat <<EOF\nd 'e\nEOF\na b", [["cat"], ["a", "b"]]),
        ("$ a b", [["a", "b"]]),
    ],
)
def test_a_text_is_its_commands(text, expected):
    assert texts(text) == expected


def test_what_the_text_sets_is_expanded():
    text = (
        'TP=8\nexport EP=\'--ep 8\'\nARGS=(--a "b c")\nARGS+=(--d)\nx -tp $TP ${EP} "${ARGS[@]}" \'$TP\' \\$TP "n=$TP"'
    )
    assert texts(text) == [["x", "-tp", "8", "--ep", "8", "--a", "b c", "--d", "$TP", "$TP", "n=8"]]


@pytest.mark.parametrize("written", ["$EP", "${EP}", "$(nproc)", "`nproc`", "$1", "${ARGS[@]}", "$((1+2))"])
def test_what_it_does_not_set_is_kept_apart(written):
    (command,) = commands(f'a -x {written} "{written}"')
    assert [word.unexpanded for word in command.words] == [(), (), (written,), (written,)]
    (quoted,) = commands(f"a '{written}'")
    assert quoted.words[1].unexpanded == ()


def test_a_default_stands_in_for_a_variable_and_is_said():
    (command,) = commands("a ${TP:-8}")
    assert (command.words[1].text, command.words[1].assumed) == ("8", ("${TP:-8}",))
    (given,) = commands("TP=2\na ${TP:-8}")
    assert (given.words[1].text, given.words[1].assumed) == ("2", ())


def test_assignments_before_a_command_are_its_variables():
    first, second = commands("A=1 B='x y' c\nexport D=2; e")
    assert {name: word.text for name, word in first.variables.items()} == {"A": "1", "B": "x y"}
    assert {name: word.text for name, word in second.variables.items()} == {"D": "2"}


@pytest.mark.parametrize("text", ["a 'b", 'a "b', "a `b", "a ${b", "a $(b", "A=(b"])
def test_what_does_not_close_is_an_error(text):
    with pytest.raises(UsageError, match="is not closed"):
        commands(text)


@pytest.mark.skipif(shutil.which("bash") is None, reason="compares with bash")
@given(st.lists(st.text("ab $'\"\\-=#;|&<>~\n\t{}", max_size=12), min_size=1, max_size=5))
def test_quoted_words_are_read_as_bash_reads_them(words):
    """Any words, quoted as `shlex.quote` does, come back as they were, with and without a redirection."""
    import shlex

    line = " ".join(map(shlex.quote, ["run", *words]))
    (command,) = commands(f"{line} > log 2>&1 # said")
    assert [word.text for word in command.words[1:]] == words


@pytest.mark.skipif(shutil.which("bash") is None, reason="compares with bash")
@pytest.mark.parametrize(
    "line",
    [
        r"""a "b\"c" 'd\e' f\"g h""",
        r"""x --y '{"a": 1}' --z={\"b\":2}""",
        "a   b\tc  'd'\"e\"f",
        "T=4; U='1 2'; a $T x$U \"$U\" ${T}z ${V:-9}",
        "a 1>/dev/null 2 >/dev/null b",
        "A=(p 'q r'); a \"${A[@]}\" ${A[@]}",
    ],
)
def test_bash_itself_agrees(line, tmp_path):
    script = f'a() {{ printf \'%s\\0\' "$@" >> {tmp_path}/words; }}; x() {{ a "$@"; }}\n{line}'
    subprocess.run(["bash", "-c", script], timeout=GIVE_UP_S, check=True, env={"PATH": os.environ["PATH"]})
    came = (tmp_path / "words").read_text().split("\0")[:-1]
    assert [word.text for word in commands(line)[-1].words[1:]] == came

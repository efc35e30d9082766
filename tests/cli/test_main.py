import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import moetune.__main__
from moetune.cli.main import DEBUG_VARIABLE, CommandLine, main
from moetune.errors import MissError, NoResultError, UsageError

COMMANDS = ["doctor", "export", "models", "plan", "show", "store list", "tune"]


def run_of(words):
    return f"from moetune.cli.main import main; main({[*words.split(), '--help']}, prog_name='moetune')"


@pytest.mark.parametrize("words", ["", *COMMANDS])
def test_help_imports_click_and_few_modules_of_its_own(words):
    code = (
        "import sys, atexit; before = set(sys.modules);"
        "atexit.register(lambda: print(*(sys.modules.keys() - before), file=sys.stderr));"
        f"{run_of(words)}"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    imported = [name for name in ran.stderr.split() if name.partition(".")[0] not in sys.stdlib_module_names]
    assert {name.partition(".")[0] for name in imported} == {"click", "moetune"}
    assert 10 < sum(name.startswith("moetune") for name in imported) <= 22


@pytest.mark.parametrize("words", ["", *COMMANDS])
def test_help_imports_nothing_heavy(words):
    heavy = "{'torch', 'pydantic', 'rich.console', 'moetune.spec.layer'} & sys.modules.keys()"
    code = f"import sys, atexit; atexit.register(lambda: print({heavy}, file=sys.stderr)); {run_of(words)}"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stderr.strip() == "set()"
    assert f"Usage: moetune {words}".strip() in ran.stdout


@pytest.mark.parametrize("words", [["models"], ["store", "list"]])
def test_what_needs_no_torch_imports_none(words):
    code = (
        "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
        f"from moetune.cli.main import main; main({words})"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stderr.strip() == "False"


def test_every_command_that_the_help_names_can_be_imported():
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        assert command.name == name
    assert main.get_command(context, "no-such-command") is None


def test_the_entry_point_of_the_distribution_is_main():
    entry = tomllib.loads(Path(moetune.__file__).parents[1].joinpath("pyproject.toml").read_text())
    module, _, function = entry["project"]["scripts"]["moetune"].partition(":")
    assert getattr(importlib.import_module(module), function) is moetune.__main__.main


def _failing(error):
    @click.group(cls=CommandLine, lazy={}, invoke_without_command=True)
    def failing():
        raise error

    return CliRunner().invoke(failing, [])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("Given a.", "Allowed: b."), 2, "error: Given a. Allowed: b."),
        (NoResultError("Nothing ran."), 1, "error: Nothing ran."),
        (MissError("No profile."), 3, "error: No profile."),
        (click.UsageError("Odd words."), 2, "error: Odd words. See `failing --help`."),
        (click.FileError("x", "gone"), 1, "error: Could not open file 'x': gone"),
        (KeyboardInterrupt(), 130, "error: interrupted."),
        (UsageError("Two\n  lines."), 2, "error: Two lines."),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, line):
    result = _failing(error)
    assert result.exit_code == code
    assert result.stderr.strip() == line
    assert result.stdout == ""


def test_an_unexpected_exception_shows_its_traceback_only_when_asked(monkeypatch):
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
    result = _failing(ZeroDivisionError("boom"))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "unexpected ZeroDivisionError: boom" in result.stderr
    assert DEBUG_VARIABLE in result.stderr

    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    assert "Traceback" in _failing(ZeroDivisionError("boom")).stderr


def test_a_package_that_is_not_installed_is_no_bug_of_moetune():
    result = _failing(ModuleNotFoundError("No module named 'pydantic'", name="pydantic.fields"))
    assert result.exit_code == 1
    assert "The Python module pydantic is not installed." in result.stderr
    assert "pip install" in result.stderr
    assert "bug" in _failing(ModuleNotFoundError("No module named 'moetune.gone'", name="moetune.gone")).stderr


def test_without_a_command_the_help_is_shown_with_exit_2(moetune):
    result = moetune()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr
    assert result.stderr.endswith("\nerror: No command is given.\n")


def test_the_version_is_the_packages(moetune):
    import moetune as package

    assert moetune("--version").stdout == f"moetune {package.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tun"], "No such command 'tun'. Did you mean tune?"),
        (["store", "lst"], "No such command 'lst'. Did you mean list?"),
        (["zzz"], "Commands: models, doctor, plan"),
        (["plan", "--modle", "x"], "No such option '--modle'. Did you mean --model? See"),
        (["lookup", "--ep", "8"], "No such option '--ep': this command reads the deployment from --launch."),
        (["plan", "--model", "qwen3-30b-a3"], "Did you mean qwen3-30b-a3b? `moetune models`"),
        (["plan", "--model", "qwen3-30b-a3b", "--backend", "trition"], "Did you mean triton? Choose one of triton,"),
        (
            ["plan", "--launch", "vllm serve Qwen/Qwen3-30B-A3"],
            "Did you mean Qwen/Qwen3-30B-A3B? Otherwise give --model",
        ),
        (
            ["plan", "--launch", "vllm serve a/dense"],
            "--hidden, --intermediate (a dense model has no experts to tune).",
        ),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(moetune, words, said):
    result = moetune(*words)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize("words", COMMANDS)
def test_help_ends_with_an_example_that_fits_in_80_columns(moetune, words):
    lines = moetune(*words.split(), "--help").stdout.splitlines()
    at = lines.index("Example:")
    assert lines[at + 1].startswith(f"  moetune {words}")
    assert max(map(len, lines)) <= 80


def test_help_lists_options_in_groups(moetune):
    text = moetune("tune", "--help").stdout
    headings = ["Engine:", "Layer:", "Deployment:", "Workload:", "Kernels:", "Options:"]
    assert [line for line in text.splitlines() if line in headings] == headings
    assert text.index("Workload:") < text.index("--draws") < text.index("Kernels:") < text.index("--device")
    assert text.index("Options:") < text.index("--frozen")


@pytest.mark.parametrize("words", [["models"], ["models", "--json"], ["--help"]])
def test_a_reader_that_closes_the_pipe_is_no_failure(words):
    code = f"from moetune.cli.main import main; main({words})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_a_miss_is_two_lines():
    result = _failing(MissError("No profile\nfor this GPU.", "Run `moetune tune`."))
    assert result.stderr == "error: No profile for this GPU.\nRun `moetune tune`.\n"


def test_help_says_what_a_launch_line_and_a_dispatcher_decide(moetune):
    text = " ".join(moetune("tune", "--help").stdout.split())
    for option, otherwise in (("--ladder", "pow2"), ("--layout", "packed"), ("--dp", "no-dp")):
        assert f"[default: from --launch or the dispatcher, otherwise {otherwise}]" in text.partition(option)[2]
    assert "[default: from --launch, otherwise 1]" in text.partition("--ep")[2]
    looked_up = " ".join(moetune("lookup", "--help").stdout.split())
    assert "The row counts to look up" in looked_up
    assert "to tune" not in looked_up


def test_plan_says_the_same_of_itself_in_both_helps(moetune):
    own = " ".join(main.get_command(click.Context(main), "plan").help.split())
    line = main.lazy["plan"][1]
    assert own.startswith(line.removesuffix("."))
    assert line in " ".join(moetune("--help").stdout.split())


def test_the_help_names_the_page_of_the_exit_codes(moetune):
    assert "docs/json-schemas.md describes the documents and the exit codes." in " ".join(
        moetune("--help").stdout.split()
    )


@pytest.mark.parametrize("command", ["show", "export"])
def test_the_help_says_what_the_argument_is(moetune, command):
    text = " ".join(moetune(command, "--help").stdout.split())
    assert "[PROFILE] A profile's file, as `moetune store list` prints it." in text


def test_the_usage_of_lookup_says_what_it_needs(moetune):
    assert moetune("lookup", "--help").stdout.startswith("Usage: moetune lookup --launch LINE | --log FILE [OPTIONS]\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show"], "Example: moetune show --launch 'vllm serve …'."),
        (
            ["export"],
            "needs --to ENGINE, --out DIR, and a profile's path, --model or --launch. Example: moetune export",
        ),
        (["export", "--to", "vllm", "--model", "deepseek-r1"], "`moetune export` needs --out DIR. Example: "),
    ],
)
def test_what_is_missing_is_named_at_once_with_an_example(moetune, words, said):
    result = moetune(*words)
    assert (result.exit_code, said in result.stderr) == (2, True)


def test_an_unknown_ladder_is_explained_in_the_words_of_the_help(moetune):
    error = moetune("plan", "--model", "qwen3-30b-a3b", "--ladder", "foo").stderr
    assert error.endswith("A ladder is one of pow2, hybrid, vllm, adaptive or a list of row counts like 1,2,4.\n")

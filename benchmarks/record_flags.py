"""Records the flags of an engine's command line in `moetune/inputs/flags/*.json`.

    python benchmarks/record_flags.py vllm --version 0.33.0 --source UNPACKED_WHEEL
    python benchmarks/record_flags.py vllm --program dynamo.vllm --version 1.6.1 --source UNPACKED_DYNAMO_WHEEL
    python benchmarks/record_flags.py trtllm --version 1.3.0 --source UNPACKED_WHEEL_OR_REPOSITORY

For vLLM, SGLang and Dynamo, the engine's own parser is built and read. The engine must be installed, or be an unpacked
wheel (`--source`). Its small dependencies must be installed (huggingface_hub, transformers, msgspec, ...). Placeholders
replace the large ones, because only the names and the number of values are read. For TensorRT-LLM, the click decorators
are read from the source text, and nothing is imported.

The fields `removed`, `source`, `abbreviations`, `dotted` and `extends` of a file are written by hand and are kept.
`--check` writes nothing, and exits 1 if the file differs.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

FLAGS = Path(__file__).parent.parent / "moetune" / "inputs" / "flags"
ENGINES = ("vllm", "sglang", "trtllm")
READ_FROM = ("vllm", "sglang", "dynamo")
NOT_THERE = ("amdsmi", "libtpu", "tpu_inference", "torch_npu", "habana_frameworks")
"""Packages by which an engine detects its device. Their import must fail."""


# --- argparse: vLLM, SGLang, Dynamo ---------------------------------------------------------------------------------


class _StandIn(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _StandsIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a placeholder for each package that the engine's modules need and the environment lacks.

    It must be the last finder.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        parent = sys.modules.get(name.rpartition(".")[0])
        # Dynamo's compiled modules are in another wheel; vLLM and SGLang work without theirs
        if name.split(".")[0] in ("vllm", "sglang", *NOT_THERE):
            return None
        if not isinstance(parent, _StandIn) and _importer() not in READ_FROM:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _importer() -> str:
    """Returns the top package of the module that runs the import statement."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).split(".")[0] if frame else ""


def vllm_parser() -> argparse.ArgumentParser:
    platforms: Any = importlib.import_module("vllm.platforms")
    platforms._current_platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform()
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    made = importlib.import_module("vllm.entrypoints.common.cli_args").make_arg_parser(parser)
    assert isinstance(made, argparse.ArgumentParser)
    return made


def sglang_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    return parser


def dynamo_parser(engine: str, group: str) -> argparse.ArgumentParser:
    """Returns a parser with Dynamo's own flags only. A command can have the engine's flags too."""
    parser = argparse.ArgumentParser()
    groups = importlib.import_module("dynamo.common.configuration.groups.runtime_args")
    groups.DynamoRuntimeArgGroup().add_arguments(parser)
    getattr(importlib.import_module(f"dynamo.{engine}.backend_args"), group)().add_arguments(parser)
    importlib.import_module("dynamo.common.configuration.groups.router_args").register_worker_router_help(parser)
    return parser


def parser_flags(parser: argparse.ArgumentParser, *, json_objects: bool) -> dict[str, dict[str, Any]]:
    """Returns every option of a parser, including those that its help hides."""
    written: dict[int, list[str]] = {}
    actions: dict[int, argparse.Action] = {}
    for option, action in parser._option_string_actions.items():
        written.setdefault(id(action), []).append(option)
        actions[id(action)] = action
    flags: dict[str, dict[str, Any]] = {}
    for key, options in written.items():
        action = actions[key]
        negative = getattr(action, "negative_option_strings", None)
        if negative is None:
            is_pair = isinstance(action, argparse.BooleanOptionalAction)
            negative = [option for option in options if is_pair and option.startswith("--no-")]
        value = _value(action, json_objects)
        name, flag = described([option for option in options if option not in negative], value, list(negative))
        flags[name] = flag
    return flags


def _value(action: argparse.Action, json_objects: bool) -> str:
    if action.nargs == 0:
        return "none"
    if action.nargs == "?":
        return "optional"
    if action.nargs is not None:
        return "many"
    return "json" if json_objects and _reads_json(action.type) else "one"


def _reads_json(reader: object) -> bool:
    """Returns whether an argument takes a JSON object, by the names of the type functions in vLLM's `arg_utils.py`."""
    if reader is json.loads or getattr(reader, "__name__", "") in ("union_dict_and_str", "parse_dataclass"):
        return True
    if isinstance(reader, functools.partial):
        return _reads_json(reader.func)
    cells = getattr(reader, "__closure__", None) or ()
    return any(callable(cell.cell_contents) and _reads_json(cell.cell_contents) for cell in cells)


# --- click: TensorRT-LLM --------------------------------------------------------------------------------------------


def click_flags(files: Iterable[Path], commands: tuple[str, ...] | None = None) -> dict[str, dict[str, Any]]:
    """Returns the options of the click commands in these files, or only of those in `commands`."""
    flags: dict[str, dict[str, Any]] = {}
    for path in files:
        for call in _option_calls(ast.parse(path.read_text(encoding="utf-8")), commands):
            name, flag = _click_flag(call)
            flags.setdefault(name, flag)
    return flags


def _option_calls(tree: ast.AST, commands: tuple[str, ...] | None) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        calls = [decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)]
        named = {
            str(ast.literal_eval(argument))
            for call in calls
            if _called(call) in ("command", "group")
            for argument in (*call.args, *(word.value for word in call.keywords if word.arg == "name"))
            if isinstance(argument, ast.Constant)
        }
        if named and (commands is None or named & set(commands)):
            yield from (call for call in calls if _called(call) in ("option", "stability_option"))


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _click_flag(call: ast.Call) -> tuple[str, dict[str, Any]]:
    declared = [str(ast.literal_eval(argument)) for argument in call.args]
    words = {word.arg: word.value for word in call.keywords}
    options, negative = [], []
    for one in declared:
        if one.startswith("-"):
            on, slash, off = one.partition("/")
            options.append(on.strip())
            negative += [off.strip()] if slash else []
    is_switch = bool(negative) or (isinstance(flag := words.get("is_flag"), ast.Constant) and flag.value is True)
    return described(options, "none" if is_switch else "one", negative)


# --- both -----------------------------------------------------------------------------------------------------------


def described(options: list[str], value: str, negative: list[str]) -> tuple[str, dict[str, Any]]:
    """Returns a flag's canonical name and its entry in the file.

    The canonical name is the first long option, with '-' for '_'. `short` has the options with a single dash.
    `spelled` is the flag as a user must write it, if it is not `--` and the canonical name.
    """
    long = sorted((option for option in options if option.startswith("--")), key=len, reverse=True)
    first = next((option for option in options if option.startswith("--")), options[0])
    name = plain(first)
    flag: dict[str, Any] = {
        "aliases": sorted({plain(option) for option in long} - {name}),
        "short": sorted(plain(option) for option in options if not option.startswith("--") and option != first),
        "value": value,
    }
    if negative:
        flag["negative"] = sorted(map(plain, negative))
    if first != f"--{name}":
        flag["spelled"] = first
    return name, {key: kept for key, kept in flag.items() if kept != []}


def plain(option: str) -> str:
    return option.lstrip("-").replace("_", "-")


def record(engine: str, program: str | None, source: Path | None) -> dict[str, dict[str, Any]]:
    if engine == "trtllm" and program != "dynamo.trtllm":
        root = (source or Path()) / "tensorrt_llm"
        if program == "trtllm-bench":
            return click_flags([root / "commands" / "bench.py", *sorted((root / "bench").rglob("*.py"))])
        return click_flags([root / "commands" / "serve.py"], ("serve",) if program is None else (program,))
    if source is not None:
        sys.path.insert(0, str(source))
        sys.meta_path.append(_StandsIn())
    makers: dict[str, Callable[[], argparse.ArgumentParser]] = {
        "vllm": vllm_parser,
        "sglang": sglang_parser,
        "dynamo.vllm": lambda: dynamo_parser("vllm", "DynamoVllmArgGroup"),
        "dynamo.sglang": lambda: dynamo_parser("sglang", "DynamoSGLangArgGroup"),
        "dynamo.trtllm": lambda: dynamo_parser("trtllm", "DynamoTrtllmArgGroup"),
    }
    flags = parser_flags(makers[program or engine](), json_objects=engine == "vllm")
    if engine == "vllm" and program is None:
        # FlexibleArgumentParser.parse_args rewrites -O, -O3 and -O=3 before argparse sees them
        flags["optimization-level"].setdefault("short", []).append("O")
    if program == "dynamo.trtllm":
        # --trtllm.GROUP.KEY VALUE, read by dynamo/trtllm/dynamic_flags.py from what argparse leaves
        flags["trtllm"] = {"value": "json"}
    return flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--program", help="another program of the engine, such as dynamo.vllm or trtllm-bench")
    parser.add_argument("--version", required=True)
    parser.add_argument(
        "--source", type=Path, help="an unpacked wheel or repository; the default is the installed engine"
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()

    path = FLAGS / f"{args.engine}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"engine": args.engine}
    flags = dict(sorted(record(args.engine, args.program, args.source).items()))
    if args.program is None:
        changed = {**kept, "version": args.version, "flags": flags}
    else:
        programs = kept.get("programs", {})
        entry = {**programs.get(args.program, {}), "version": args.version, "flags": flags}
        changed = {**kept, "programs": {**programs, args.program: entry}}
    text = written(changed)
    if args.check:
        sys.exit(text != path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
    print(f"{path.name}: {len(flags)} flags of {args.program or args.engine} {args.version}")


def written(value: dict[str, Any], depth: int = 0) -> str:
    """Returns JSON text with one line per flag."""
    indent = "  " * (depth + 1)
    lines = []
    for key, one in value.items():
        nested = isinstance(one, dict) and any(isinstance(inner, dict) for inner in one.values())
        text = written(one, depth + 1).rstrip("\n") if nested else json.dumps(one, ensure_ascii=False)
        lines.append(f"{indent}{json.dumps(key, ensure_ascii=False)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n" + "  " * depth + "}\n"


if __name__ == "__main__":
    main()

"""moetune's look-up and its reading of logs against the engines' own `get_moe_configs`, run from their source."""

import ast
import functools
import json
import logging
import os
import re
from types import SimpleNamespace
from typing import Any

import pytest

from moetune.export.engine_log import parsed_log
from moetune.export.lookup import lookup
from moetune.export.places import Places
from moetune.inputs.launch_table import read

SOURCES = {
    "vllm": "vllm/model_executor/layers/fused_moe/fused_moe.py",
    "sglang": "sglang/srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py",
}
LINES = {
    "vllm": "vllm serve deepseek-ai/DeepSeek-R1 -tp 8",
    "sglang": "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --tp 8",
}
NAMES = {
    "vllm": "E=256,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
    "sglang": "E=257,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json",
}
RIGHT = {"vllm": "", "sglang": "configs/triton_3_6_0/"}
NO_TRITON = "configs/triton_3_5_1/"


class Logger(logging.Logger):
    """A logger with vLLM's methods that log once."""

    def info_once(self, message, *arguments, **_):
        self.info(message, *arguments)

    def warning_once(self, message, *arguments, **_):
        self.warning(message, *arguments)


@pytest.fixture
def engine_reads(engine_sources, monkeypatch, tmp_path):
    """Returns a function that runs an engine's `get_moe_configs`, and returns its rows and its log."""

    def run(engine, folder, experts, size):
        texts = []
        logger = Logger(engine)
        handler = logging.Handler()
        handler.emit = lambda record: texts.append(record.getMessage())
        logger.addHandler(handler)
        path = engine_sources(engine) / SOURCES[engine]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wanted = ("get_config_file_name", "get_moe_configs")
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
        deterministic = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))
        names: dict[str, Any] = {
            "os": os, "json": json, "functools": functools, "logger": logger, "re": re,
            "__file__": str(tmp_path / "engine" / "file.py"),
            "envs": SimpleNamespace(VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=str(folder)),
            "get_device_name_as_file_name": lambda: "NVIDIA_H200",
            "get_device_name": lambda: "NVIDIA H200",
            "get_exec": lambda: deterministic,
            "triton": SimpleNamespace(__version__="3.6.0"),
        }  # fmt: skip
        monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(folder))
        code = "from __future__ import annotations\n" + ast.unparse(tree)
        exec(compile(code, str(path), "exec"), names)
        return names["get_moe_configs"](experts, size, "fp8_w8a8", 128, 128), "\n".join(texts)

    return run


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("spoiled", ["right", "E", "device", "blank", "triton"])
def test_the_engine_reads_what_the_look_up_says(engine, spoiled, engine_reads, tmp_path):
    name = NAMES[engine]
    other = {
        "right": name,
        "E": re.sub(r"E=\d+", "E=255", name),
        "device": name.replace("NVIDIA_H200", "NVIDIA_B200"),
        "blank": name.replace("128,128", "128, 128") if engine == "vllm" else name.replace("128, 128", "128,128"),
        "triton": name,
    }[spoiled]
    path = tmp_path / "own" / ((NO_TRITON if spoiled == "triton" else RIGHT[engine]) + other)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"8": {"BLOCK_SIZE_M": 16}}))
    if engine == "sglang":
        (tmp_path / "own" / "configs").mkdir(exist_ok=True)
    line = read(LINES[engine])
    found = lookup(line, "NVIDIA H200", Places(tmp_path / "own", None, "3.6.0", "--folder"), (8,))
    (table,) = found.tables
    rows, text = engine_reads(engine, tmp_path / "own", line.num_experts[0], line.intermediate_size)
    assert table.name == name
    assert (table.file is not None) == (rows is not None)
    assert found.hit == (spoiled == "right")
    logged = parsed_log(text).of(name)
    event = "read" if spoiled == "right" else "other_triton" if rows is not None else "default"
    assert logged.event == event
    assert logged.path == (table.file or table.looked_in[0])

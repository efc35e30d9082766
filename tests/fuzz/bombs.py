"""Inputs that are made to cost time or memory, and what one costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fuzz.run import peak_bytes
from fuzz.targets import LINE, TARGETS, _profiles
from moetune.errors import MoetuneError

PROFILE = json.loads(_profiles()[0])
STRICT = {"strict": dict.fromkeys(map(str, range(300_000)), "")}
CONFIG = {"model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 2, "hidden_size": 64}
CONFIG |= {"moe_intermediate_size": 32, "num_hidden_layers": 1000}


def profile(**changed: object) -> bytes:
    return json.dumps({**PROFILE, **changed}).encode()


def choice(**changed: object) -> bytes:
    return profile(choices=[{**PROFILE["choices"][0], **changed}])


def quantized(*names: str) -> bytes:
    left_out = {"quant_method": "compressed-tensors", "ignore": list(names)}
    return json.dumps({**CONFIG, "quantization_config": left_out}).encode()


def aliases(levels: int, merge: bool = False) -> bytes:
    """`a0: &a0 {…}` and so on, where each level has the one before it ten times."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} {{<<: [{inner}]}}" if merge else f"a{level}: &a{level} [{inner}]")
    return "\n".join(lines).encode()


def doubling(first: str, more: str) -> bytes:
    return "\n".join([first, *[more] * 60, f"{LINE} $a"]).encode()


NAMED = "Using default MoE config. Performance might be sub-optimal! Config file not found at "
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "deep lists": ("profile", lambda: b"[" * 1_000_000),
    "deep objects": ("config", lambda: b'{"text_config":' * 300_000),
    "deep, but parsed": ("config", lambda: b'{"text_config":' * 900 + b"1" + b"}" * 900),
    "many lists": ("profile", lambda: b"[" + b"[]," * 2_700_000 + b"[]]"),
    "many objects": ("config", lambda: b'{"a":[' + b"{}," * 900_000 + b"{}]}"),
    "many choices": ("profile", lambda: profile(choices=[1] * 900_000)),
    "many unknown fields": ("profile", lambda: profile(**{f"f{number}": 0 for number in range(300_000)})),
    "many rejected": ("profile", lambda: choice(rejected=[{}] * 400_000)),
    "many loads": ("profile", lambda: choice(load=[1] * 900_000)),
    "many versions": ("profile", lambda: profile(environment={"device": "x", **STRICT})),
    "a long text": ("profile", lambda: profile(backend="x" * 8_000_000)),
    "wide characters": ("profile", lambda: profile(backend="😀" * 1_900_000).decode().encode()),
    "a long number": ("config", lambda: b'{"num_experts": ' + b"9" * 8_000_000 + b"}"),
    "many buckets": ("profile", lambda: profile(regime={"ladder": ",".join(map(str, range(1, 900_000)))})),
    "a large adaptive ladder": ("profile", lambda: profile(regime={"ladder": "adaptive"})),
    "many differing sizes": ("config", lambda: json.dumps({**CONFIG, "num_experts": list(range(900_000))}).encode()),
    "a slow expression": ("config", lambda: quantized("re:" + r"(\w+)+$")),
    "a slow choice": ("config", lambda: quantized("re:" + r"(?:a|a|e|x|.|model)*Z")),
    "many options": ("config", lambda: quantized("re:" + "m?" * 40 + "m" * 40)),
    "a polynomial": ("config", lambda: quantized(*("re:" + ".*" * 5 + f"experts{n}" for n in range(100)))),
    "many expressions": ("config", lambda: quantized(*(f"re:.*experts{n}.*" for n in range(2_000)))),
    "many shell patterns": ("config", lambda: quantized(*(f"*e*x*p*experts{n}" for n in range(2_000)))),
    "many names": ("config", lambda: quantized(*(f"model.layers.{n}.mlp.experts" for n in range(49_000)))),
    "too many names": ("config", lambda: quantized(*(f"model.layers.{n}.mlp.experts" for n in range(100_000)))),
    "a deep expression": ("config", lambda: quantized("re:" + "(" * 900 + ")" * 900)),
    "a variable that doubles": ("launch", lambda: doubling("a=x", "a=$a$a")),
    "a default that doubles": ("launch", lambda: doubling("a=${T:-}", "a=$a$a")),
    "an array that doubles": ("launch", lambda: doubling("a=(x)", "a=(${a[@]} ${a[@]})")),
    "a shell that runs itself": ("launch", lambda: b"a='sh -c \"$a\"'; sh -c \"$a\""),
    "many shells": ("launch", lambda: b"sh " * 10_900),
    "many variables": ("launch", lambda: b"a=1;b\n" * 5_000),
    "many flags": ("launch", lambda: (LINE + "".join(f" --f{n} 1" for n in range(3_000))).encode()),
    "a long flag": ("launch", lambda: f"{LINE} --{'x' * 30_000} 1".encode()),
    "a long model": ("launch", lambda: f"vllm serve {'deepseek-ai/' * 2_500}".encode()),
    "many open brackets": ("launch", lambda: b"${" * 16_000),
    "a long line": ("launch", lambda: b"a " * 5_000_000),
    "aliases": ("settings", lambda: aliases(30)),
    "merged aliases": ("settings", lambda: aliases(30, merge=True)),
    "an alias of itself": ("settings", lambda: b"a: &a [*a, *a]"),
    "deep YAML": ("settings", lambda: b"[" * 60_000),
    "deep YAML in blocks": ("settings", lambda: b"- " * 30_000),
    "a sexagesimal number": ("settings", lambda: b"a: 1" + b":59" * 20_000),
    "a hexadecimal number": ("settings", lambda: b"a: 0x" + b"f" * 60_000),
    "a large YAML file": ("settings", lambda: b"a: [" + b"1," * 30_000 + b"]"),
    "a log of beginnings": ("log", lambda: (NAMED + "E=1,N=1,").encode() * 8_000),
    "a log of one name": ("log", lambda: (NAMED + "E=1,N=1," * 100_000).encode()),
    "many rows": ("tuned_file", lambda: json.dumps({str(n): {} for n in range(200_000)}).encode()),
    "long keys": ("tuned_file", lambda: json.dumps({"1" * 5_000 + str(n): {} for n in range(1_000)}).encode()),
    "many lines": ("journal", lambda: b"{}\n" * 20_000),
    "a ladder of many buckets": ("ladder", lambda: ",".join(map(str, range(1, 1_000_000))).encode()),
    "many options of a question": ("options", lambda: b"--ep 8 " * 4_600),
}  # fmt: skip


class Cost(NamedTuple):
    """What the reading of an input costs: processor time, how much the most memory grows, and what an error says."""

    seconds: float
    grown_bytes: int
    refused: str


def cost_of(name: str, folder: Path) -> Cost:
    """Reads one of `BOMBS`. `folder` is one of its own."""
    reader, made = BOMBS[name]
    content = made()
    before, began = peak_bytes(), time.thread_time()
    refused = ""
    try:
        TARGETS[reader].read(content, folder)
    except MoetuneError as error:
        refused = str(error)
    return Cost(time.thread_time() - began, peak_bytes() - before, refused)

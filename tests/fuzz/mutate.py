"""Mutations of text and of JSON documents, made from a seeded generator, so that an input can be made again."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Sequence
from typing import Any

TOKENS = (
    "", "0", "-1", "1", "65536", "65537", "1000000000", "2147483648", "9223372036854775808", "1e999", "NaN",
    "Infinity", "-Infinity", "null", "true", "9" * 41, "9" * 401, "9" * 5000, "0x" + "f" * 5000, "1:" * 400, "{", "}",
    "[", "]", "[" * 200, "{'a':" * 200, '"', "'", "\\", "\\\n", "$", "${", "$(", "${A:-", "${A[@]}", "`", "<<", "<(",
    ">", "|", "&", ";", "\n", "\r", "\0", "\t", "\x1b[31m", "\x9b", "\u202e", "\ud800", "\\ud800", "\\u0000", "é", "😀",
    "\ufeff", "..", "/", "../../../x", "/dev/zero", "x[/]", "[bold]", "%s", "{0}", "*", "**", "(a+)+$", "re:(a|a)*$",
    "&a [*a]", "<<: *a", "!!int ''", "!!python/object:os.system", "2020-01-01", "a" * 300, "x/" * 3000, "--", "-", "=",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 128, 65536, 65537, 10**9, 2**31, 2**53, 2**63, 10**30, 10**45, 10**400, 0.0,
    -0.5, 1.5, 1e-300, 1e16, 1e300, float("nan"), float("inf"), float("-inf"), "", "0", "none", "..", "../../x", "/x",
    "x[/]", "[bold]a[/bold]", "\x1b[2J", "a\nb", "a\rb", "\x9b1m", "\u202ea", "\ud800", "\0", "a" * 300, "a" * 5000,
    "9" * 5000, [], {}, [[]], [None], [1, 1], ["a"], {"": ""}, {"a": {}}, {"\ud800": 1}, "2026-01-01T00:00:00Z",
    "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "pow2", "adaptive/3", "1,2,4/65536", "9" * 30, "re:(a+)+b",
)  # fmt: skip


def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Returns one of `seeds`, changed in one to four places. A JSON document is mostly changed as a document."""
    seed = rng.choice(seeds)
    if rng.random() < 0.6:
        try:
            document = json.loads(seed)
        except ValueError:
            pass
        else:
            return _mutated_document(rng, document)
    content = seed
    for _ in range(rng.randint(1, 4)):
        content = _mutated_bytes(rng, content, seeds)
    return content[:200_000]


def _mutated_document(rng: random.Random, document: Any) -> bytes:
    root = [copy.deepcopy(document)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        match rng.randrange(8):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice([*map(str, holder), *TOKENS])] = holder.pop(key)
            case 2:
                holder[key] = [holder[key]] * rng.choice((1, 2, 70))
            case 3:
                other, at = rng.choice(places)
                holder[key] = copy.deepcopy(other[at])
            case 4 if isinstance(holder[key], int | float) and abs(holder[key]) < 1e18:
                holder[key] = rng.choice((holder[key] + 1, -holder[key], holder[key] * 2, holder[key] * 1000))
            case 5 if isinstance(holder[key], str):
                holder[key] = _mutated_text(rng, holder[key])
            case 6 if isinstance(holder[key], list) and holder[key]:
                rng.choice((list.reverse, list.pop, lambda found: found.append(found[0])))(holder[key])
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    document = root[0] if root else None
    return json.dumps(document, ensure_ascii=True, indent=rng.choice((None, 1))).encode()


def _places(root: Any) -> Any:
    """Yields every container below `root` with each of its keys."""
    level = [root]
    while level:
        below = []
        for holder in level:
            for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
                yield holder, key
                if isinstance(holder[key], dict | list):
                    below.append(holder[key])
        level = below


def _mutated_text(rng: random.Random, text: str) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(TOKENS) + text[at + rng.choice((0, 0, 1, 4)) :]


def _mutated_bytes(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    at = rng.randint(0, len(content))
    end = min(len(content), at + rng.choice((1, 2, 8, 64)))
    match rng.randrange(9):
        case 0:
            return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        case 1:
            return content[:at] + content[end:]
        case 2:
            return content[:end] + content[at:end] * rng.choice((1, 2, 50)) + content[end:]
        case 3:
            other = rng.choice(seeds)
            return content[:at] + other[rng.randint(0, len(other)) :]
        case 4:
            return content[:at]
        case 5:
            words = re.split(rb"(\s+)", content)
            first, second = rng.randrange(len(words)), rng.randrange(len(words))
            words[first], words[second] = words[second], words[first]
            return b"".join(words)
        case 6:
            numbers = list(re.finditer(rb"\d+", content))
            if numbers:
                found = rng.choice(numbers)
                token = rng.choice(TOKENS[:18]).encode("utf-8", "surrogatepass")
                return content[: found.start()] + token + content[found.end() :]
            return content + b"1"
        case _:
            return content[:at] + rng.choice(TOKENS).encode("utf-8", "surrogatepass") + content[at:]

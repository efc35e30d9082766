"""Profiles to show, and what a console prints of them."""

import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile

PROFILES = sorted((Path(__file__).parents[2] / "profiles").glob("*/*/*/*.json"))
LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)
REGIME = Regime(ep_size=4, attention_dp=True, ladder="8,64,4096", draws=2)
WON = {"tactic": {"algorithm": "grouped_mm"}, "gain": 1.5, "gain_low": 1.43, "gain_high": 1.58}
SLOW = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 4}
FAST = {
    "BLOCK_SIZE_M": 128,
    "BLOCK_SIZE_N": 32,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 16,
    "num_warps": 8,
    "num_stages": 3,
}


def made_choice(rows, default_time_us, default=None, **won):
    default = default or {"algorithm": "eager"}
    kept = {"tactic": default, "gain": 1.0, "gain_low": 1.0, "gain_high": 1.0}
    given = {**kept, **won}
    return Choice(
        rows=rows,
        **given,
        time_us=default_time_us / given["gain"],
        default_tactic=default,
        default_time_us=default_time_us,
        noise=0.004 * rows / 8,
        tried=6,
        candidates=6,
        load=(1,),
        max_load=1,
        measured_at="2026-01-31T12:00:00Z",
    )


def made_profile(*choices, regime=REGIME, name="small", backend="torch", **strict):
    environment = Environment(device="Example GPU", strict={"torch": "2.13.0", **strict})
    layer = MoELayer(**{**dict(LAYER), "name": name})
    return Profile(layer=layer, regime=regime, backend=backend, environment=environment, choices=choices)


def printed(*renderables, width=160):
    text = io.StringIO()
    out = Console(file=text, width=width)
    for renderable in renderables:
        out.print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def rows_of(text):
    """Each line that is not empty, its words one space apart."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def cut(renderables, width=80):
    """The lines that lost characters, or are wider than the terminal and hold no path."""
    out = Console(file=io.StringIO(), width=width, highlight=False)
    found = []
    for renderable in renderables:
        whole = isinstance(renderable, Text) and bool(renderable.no_wrap)
        with out.capture() as captured:
            out.print(renderable, soft_wrap=whole)
        lines = captured.get().splitlines()
        found += [line for line in lines if not whole and (len(line.rstrip()) > width or re.search(r"\w…", line))]
    return found

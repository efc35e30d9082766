"""One engine in this process: starts stock vLLM with dummy weights, and appends what it measures to a file.

`drive.py` starts it. In data parallelism each rank is such a process, and a folder of marks keeps them in step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from cases import CASES, MAX_BATCHED_TOKENS, MAX_MODEL_LEN, PREFILL, Case
from common import Journal
from steps import Recorder, Step, steady_ms, summary

PROMPT_TOKENS = 32
"""The prompts of the decode measurements. They are short, so attention's part of a step is small."""
PREFILL_PROMPT = 1024
PREFILL_REPEATS = 5
PROFILE_SKIP, PROFILE_STEPS = 6, 8
PACKAGES = ("vllm", "torch", "triton", "flashinfer-python", "moetune", "transformers", "nvidia-nccl-cu13")


class Engine(Protocol):
    """What is measured."""

    def generate(self, sequences: int, prompt_tokens: int, output_tokens: int) -> tuple[float, list[Step]]:
        """Returns when the sequences were submitted (monotonic clock, s), and the engine core's steps."""

    def profile(self, sequences: int, tokens: int, skip: int, count: int) -> None:
        """Profiles the next steps of this many sequences and tokens."""

    def profiled(self) -> dict[str, Any] | None:
        """Returns what was profiled."""

    def tactics(self) -> dict[str, Any] | None:
        """Returns the number and the digest of the choices of FlashInfer's tuner."""


class VllmEngine:
    """Stock vLLM with its engine core in a process of its own, as it starts by itself."""

    def __init__(
        self, model: Path, case: Case, moe_backend: str, running: Sequence[int], memory: float, seed: int
    ) -> None:
        from vllm import LLM

        self._draw, self._vocabulary = random.Random(seed), case.config["vocab_size"] - 300
        options: dict[str, Any] = {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "moe_backend": moe_backend,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "max_num_seqs": max(64, *running),
            "enable_prefix_caching": False,
            "gpu_memory_utilization": memory,
            "seed": 0,
            "enable_expert_parallel": case.ranks > 1,
            "worker_extension_cls": "worker_profile.ProfilesSteps",
            # a graph for each measured size, and for the first steps, while sequences still arrive
            "compilation_config": {"cudagraph_capture_sizes": sorted({1, 2, 4, 8, 16, 64, *running})},
        }
        print("engine options", json.dumps(options), flush=True)
        self._llm = LLM(**options)
        core: Any = self._llm.llm_engine.engine_core
        self._recorder = core.get_output = Recorder(core.get_output)

    def generate(self, sequences: int, prompt_tokens: int, output_tokens: int) -> tuple[float, list[Step]]:
        from vllm import SamplingParams

        tokens = self._draw.choices(range(self._vocabulary), k=prompt_tokens)
        prompts: Any = [{"prompt_token_ids": tokens} for _ in range(sequences)]
        parameters = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        self._recorder.take()
        submitted = time.monotonic()
        self._llm.generate(prompts, parameters, use_tqdm=False)
        return submitted, self._recorder.take()

    def profile(self, sequences: int, tokens: int, skip: int, count: int) -> None:
        self._llm.collective_rpc("moetune_profile", args=(sequences, tokens, skip, count))

    def profiled(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._llm.collective_rpc("moetune_profiled")[0]
        return found

    def tactics(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._llm.collective_rpc("moetune_tactics")[0]
        return found


class Marks:
    """Files by which the ranks of one engine wait for each other."""

    def __init__(self, folder: Path | None, ranks: int, rank: int, timeout_s: float = 240.0) -> None:
        self._folder, self._ranks, self._rank, self._timeout_s = folder, ranks, rank, timeout_s
        self._count = 0

    def wait(self) -> None:
        """Returns when each rank has called this as often.

        Raises:
            TimeoutError: a rank does not come.
        """
        if self._folder is None or self._ranks == 1:
            return
        self._count += 1
        (self._folder / f"{self._count}.{self._rank}").touch()
        end = time.monotonic() + self._timeout_s
        while not all((self._folder / f"{self._count}.{rank}").exists() for rank in range(self._ranks)):
            if time.monotonic() > end:
                raise TimeoutError(f"Rank {self._rank} waited {self._timeout_s:.0f} s for the others at {self._count}.")
            time.sleep(0.001)


def measure(
    engine: Engine, results: Journal, marks: Marks, running: Sequence[int], passes: int, steps: int, profile: bool
) -> None:
    """Measures decode steps and prefills, in passes, and then profiles both.

    An error in one measurement is a line of its own, and the others go on.
    """
    for number in range(passes):
        for sequences in running:
            marks.wait()
            if number == 0:
                engine.generate(sequences, PROMPT_TOKENS, 4)  # kernels are loaded and compiled here
                marks.wait()
            _add(results, partial(decode, engine, sequences, steps), what="decode", at=sequences, number=number)
        for tokens in PREFILL:
            _add(results, partial(prefill, engine, tokens, marks), what="prefill", at=tokens, number=number)
    for sequences in running if profile else ():
        marks.wait()
        _add(results, partial(_profiled_decode, engine, sequences, steps), what="profile decode", at=sequences)
    for tokens in PREFILL if profile else ():
        marks.wait()
        _add(results, partial(_profiled_prefill, engine, tokens), what="profile prefill", at=tokens)
    marks.wait()


def decode(engine: Engine, sequences: int, steps: int) -> dict[str, Any]:
    """Returns the time in ms of a decode step of this many sequences."""
    _, found = engine.generate(sequences, PROMPT_TOKENS, steps)
    return summary(steady_ms(found, sequences))


def prefill(engine: Engine, tokens: int, marks: Marks) -> dict[str, Any]:
    """Returns the time in ms of a step that processes this many prompt tokens.

    A full step (`MAX_BATCHED_TOKENS`) is one of many in a row, of prompts of 1024 tokens. A smaller one is one prompt,
    from its submission to the engine core's output.
    """
    if tokens < MAX_BATCHED_TOKENS:
        times = []
        for _ in range(PREFILL_REPEATS + 1):
            marks.wait()
            submitted, steps = engine.generate(1, tokens, 1)
            times.append((steps[-1].at_s - submitted) * 1e3)
        return summary(times[1:])
    at_once = MAX_BATCHED_TOKENS // PREFILL_PROMPT
    marks.wait()
    _, steps = engine.generate(at_once * (PREFILL_REPEATS + 3), PREFILL_PROMPT, 1)
    return summary(steady_ms(steps, at_once, trim=0))


def _profiled_decode(engine: Engine, sequences: int, steps: int) -> dict[str, Any]:
    engine.profile(sequences, sequences, PROFILE_SKIP, PROFILE_STEPS)
    engine.generate(sequences, PROMPT_TOKENS, steps)
    return _profiled(engine)


def _profiled_prefill(engine: Engine, tokens: int) -> dict[str, Any]:
    """Returns the profile of steps as `prefill` times them. The step after the last one ends the profile."""
    at_once = max(1, tokens // PREFILL_PROMPT) if tokens >= MAX_BATCHED_TOKENS else 1
    engine.profile(at_once, tokens, 1, PREFILL_REPEATS - 1)
    if at_once > 1:
        engine.generate(at_once * (PREFILL_REPEATS + 3), PREFILL_PROMPT, 1)
    else:
        for _ in range(PREFILL_REPEATS + 1):
            engine.generate(1, tokens, 1)
    return _profiled(engine)


def _profiled(engine: Engine) -> dict[str, Any]:
    found = engine.profiled()
    if found is None:
        raise RuntimeError("the profiler saw too few full steps")
    if not found["moe_calls"]:
        raise RuntimeError(f"no kernel is known as a grouped GEMM; the longest are {found['longest']}")
    return found


def _add(results: Journal, measured: Callable[[], dict[str, Any]], **fields: Any) -> None:
    try:
        found = measured()
    except Exception as error:  # the other measurements go on
        found = {"error": f"{type(error).__name__}: {error}"}
    results.add(**fields, **found)


def versions() -> dict[str, str]:
    """Returns the versions of what was measured, as far as it is installed."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    spec = importlib.util.find_spec("moetune")
    commit = Path(spec.origin).with_name("COMMIT") if spec and spec.origin else None  # a packed site may have it
    return installed | ({"commit": commit.read_text().strip()[:12]} if commit and commit.exists() else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--moe-backend", required=True)
    parser.add_argument("--running", required=True)
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--memory", type=float, required=True)
    parser.add_argument("--marks", type=Path)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    began, case = time.monotonic(), CASES[options.case]
    running = [int(number) for number in options.running.split(",")]
    rank = int(os.environ.get("VLLM_DP_RANK", "0"))
    results = Journal(options.result)
    engine = VllmEngine(options.model, case, options.moe_backend, running, options.memory, rank)
    results.add(what="start", seconds=round(time.monotonic() - began, 1), versions=versions())
    if (tactics := engine.tactics()) is not None:
        results.add(what="tactics", **tactics)
    marks = Marks(options.marks, case.ranks, rank)
    measure(engine, results, marks, running, options.passes, options.steps, options.profile)
    results.add(what="end", seconds=round(time.monotonic() - began, 1))
    time.sleep(1)  # the other ranks' last messages
    sys.stdout.flush()
    os._exit(0)  # the driver ends the engine's other processes, which takes vLLM itself seconds


if __name__ == "__main__":
    main()

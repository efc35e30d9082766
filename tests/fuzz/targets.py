"""The readers: of profiles, journals, configs, launch lines, settings files, tuned files, logs and options."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import numpy
import torch
from recording_files import calibrator, layers, response, safetensors

from fuzz.run import Target
from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.backends.grouped_triton.shipped import EngineConfigs, read_rows
from moetune.cli import output
from moetune.errors import MoetuneError
from moetune.export import export, targets
from moetune.export.engine_log import read_log
from moetune.export.lookup import lookup
from moetune.export.places import Places
from moetune.export.write import write
from moetune.inputs import launch, launch_table, options
from moetune.inputs.batch_file import read_jobs
from moetune.inputs.hf import read_config
from moetune.recordings.reading import read_recording
from moetune.report.lines import recording_line
from moetune.report.lists import store_table
from moetune.report.lookup import log_report, lookup_report
from moetune.report.page import html, numbers
from moetune.report.page.summary import summary_report
from moetune.report.profile import profile_report
from moetune.spec.ladder import Ladder
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, parse_distribution
from moetune.store.journal import Journal
from moetune.store.profile import Profile
from moetune.store.reading import load_profile
from moetune.store.store import Store
from moetune.workload.routing import realize

ROOT = Path(__file__).parents[2]
_TAGS = {
    "section", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "h2", "h3", "p", "figure", "figcaption",
    "details", "summary",
}  # fmt: skip
DATA = ROOT / "tests" / "data"
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LINE = "vllm serve Qwen/Qwen3-30B-A3B -tp 4"
DEVICE = "NVIDIA H200"


def shown(*renderables: object) -> str:
    """Returns what the command line prints, and checks that a terminal obeys none of it."""
    stream = io.StringIO()
    with mock.patch("sys.stdout", stream):
        output.show(*renderables)
    text = stream.getvalue()
    assert not (found := _CONTROLS.search(text)), f"{found[0]!r} is printed"
    text.encode()
    return text


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_profile(content: bytes, folder: Path) -> None:
    """Reads a profile; what is accepted is shown, exported, saved, listed, looked up, and equal when it is read."""
    profile = load_profile(_file(folder, "profile.json", content))
    use_profile(profile, folder)


def report_page(profile: Profile, path: str) -> None:
    """Writes the page and the CSV of `moetune report`; no element is in the page that a text of the profile names.

    Its load is not computed: that imports torch.
    """
    with mock.patch.object(numbers, "work_by_bucket", return_value={}), mock.patch.object(html, "plotly_js", str):
        both = numbers.shown([(path, profile), (path, profile)])
        text = html.page(both, "moetune report", "2026-01-31")
    shown(*summary_report(both))
    assert not _CONTROLS.search(text.replace("\t", ""))
    tags = set(re.findall(r"<(?!/)([^\s>]*)", text.partition("<main>")[2].rpartition("</main>")[0]))
    assert tags <= _TAGS, f"{tags - _TAGS} is in the page"
    assert len(list(csv.reader(io.StringIO(numbers.csv_text(both))))) == 1 + 2 * len(both[0].rows)


def use_profile(profile: Profile, folder: Path) -> None:
    """Does with a profile what commands do with one."""
    shown(*profile_report(profile, folder / "profile.json"))
    report_page(profile, str(folder / "profile.json"))
    repr(profile)
    for target in targets():
        with contextlib.suppress(MoetuneError):
            out = folder / "out"
            write(export(profile, target).files, out, force=True)
    assert set(folder.iterdir()) <= {folder / name for name in ("profile.json", "out", "store")}, "outside --out"
    shutil.rmtree(folder / "out", ignore_errors=True)
    if profile.choices:
        for rows in (-1, 0, 1, 7, 8192, 10**9):
            profile.tactic(rows)
    store = Store(folder / "store", folder / "none")
    assert store.save(profile) == profile
    assert store.load(profile.layer, profile.regime, profile.backend, profile.environment) == profile
    store.match(profile.layer, profile.regime, profile.backend, profile.environment, near=True)
    other = profile.environment.model_copy(update={"strict": {**profile.environment.strict, "torch": "0"}})
    with contextlib.suppress(MoetuneError):
        store.match(profile.layer, profile.regime, profile.backend, other, near=True)
    found = list(store.profiles())
    assert [entry for _, entry in found] == [profile]
    shown(store_table(found, store.root))
    assert set(folder.iterdir()) <= {folder / name for name in ("profile.json", "store")}, "outside the store"
    shutil.rmtree(store.root)


def read_journal(content: bytes, folder: Path) -> None:
    """Reads a journal, and uses what can be read."""
    journal = Journal(_file(folder, "journal.jsonl", content), contextlib.nullcontext)
    read = journal.read()
    for measurement in read.measurements[:4]:
        read.of(measurement.rows, measurement.tactic, measurement.strategy)
        measurement.model_dump_json()
    assert all(len(text) < 4000 for text in read.unread)


def read_model(content: bytes, folder: Path) -> None:
    """Reads a config.json, and computes from its layer what keys and tables need."""
    reading = read_config(_file(folder, "config.json", content))
    layer = reading.layer
    shown(*reading.notes, layer.slug, repr(layer))
    regime = Regime(ep_size=layer.num_experts, attention_dp=True)
    regime.shard(layer, layer.num_experts - 1)


def read_beside(content: bytes, folder: Path) -> None:
    """Reads the `hf_quant_config.json` beside a config.json."""
    _file(folder, "config.json", (DATA / "hf" / "qwen3-30b-a3b.json").read_bytes())
    read_config(_file(folder, "hf_quant_config.json", content).parent)


def read_line(content: bytes, folder: Path) -> None:
    """Reads a launch line for a plan and for a look-up."""
    text = content.decode("utf-8", "surrogateescape")
    with contextlib.suppress(MoetuneError):
        launch_table.read(text, {})
    read = launch.read(text, {})
    chosen = dict(read.options)
    chosen.pop("backend", None)
    asked = options.resolve(**chosen)
    shown(*read.warnings, *read.flags, repr(asked.layer), repr(asked.regime))


def read_settings(content: bytes, folder: Path) -> None:
    """Reads a settings file of vLLM, and the same as one of SGLang and of TensorRT-LLM."""
    _file(folder, "settings.yaml", content)
    for line in (
        "sglang serve --model-path Qwen/Qwen3-30B-A3B --config settings.yaml",
        "trtllm-serve Qwen/Qwen3-30B-A3B --extra_llm_api_options settings.yaml",
    ):
        with contextlib.suppress(MoetuneError), contextlib.chdir(folder):
            launch.read(line, {})
    with contextlib.chdir(folder):
        launch.read("vllm serve Qwen/Qwen3-30B-A3B --config settings.yaml", {})


def read_batch(content: bytes, folder: Path) -> None:
    """Reads a file of jobs, as YAML and as lines."""
    with contextlib.suppress(MoetuneError):
        read_jobs(_file(folder, "jobs.yaml", content))
    read_jobs(_file(folder, "jobs", content))


def read_tuned_file(content: bytes, folder: Path) -> None:
    """Reads a tuned file of vLLM and SGLang, as a default to compare with and in a look-up."""
    line = launch_table.read(LINE, {})
    file = ConfigFile(line.num_experts[0], line.intermediate_size, DEVICE, None, None)
    path = _file(folder, f"tuned/{file.vllm_name}", content)
    configs = EngineConfigs.of("vllm", folder / "tuned")
    read_rows(path, has_triton_version=True)
    configs.row(file, 64, "3.6.0")
    found = lookup(line, DEVICE, Places(folder / "tuned", None, "3.6.0", "--folder"), (1, 64, 4096))
    shown(*lookup_report(found))
    json.dumps(json.loads(found.model_dump_json()), allow_nan=False)


def read_provenance(content: bytes, folder: Path) -> None:
    """Reads the file that says what a tuned file was exported for."""
    line = launch_table.read(LINE, {})
    file = ConfigFile(line.num_experts[0], line.intermediate_size, DEVICE, None, None)
    row = dict.fromkeys(("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps"), 16)
    _file(folder, f"tuned/{file.vllm_name}", json.dumps({"64": row}).encode())
    _file(folder, f"tuned/{file.vllm_name.removesuffix('.json')}.vllm.moetune.json", content)
    shown(*lookup_report(lookup(line, DEVICE, Places(folder / "tuned", None, "3.6.0", "--folder"), (64,))))


def read_engine_log(content: bytes, folder: Path) -> None:
    """Reads an engine's log."""
    log = read_log(_file(folder, "engine.log", content))
    shown(*log_report(log))
    log.model_dump_json()


def read_options(content: bytes, folder: Path) -> None:
    """Reads the options of a question."""
    asked = options.parse(content.decode("utf-8", "surrogateescape"))
    shown(repr(asked.layer), repr(asked.regime))
    assert asked.regime.digest


def read_ladder(content: bytes, folder: Path) -> None:
    """Reads a ladder's spelling and a distribution's, and uses the ladder."""
    text = content.decode("utf-8", "surrogateescape")
    with contextlib.suppress(MoetuneError):
        parse_distribution(text)
    ladder, _, maximum = text.partition(" ")
    parsed = Ladder.parse(ladder)
    assert Ladder.parse(str(parsed)) == parsed
    most = (
        {"tune_max_num_tokens": int(maximum)} if maximum.isascii() and maximum.isdecimal() and len(maximum) < 20 else {}
    )
    regime = Regime(ladder=parsed, **most)
    for bucket in regime.buckets[:8]:
        regime.served(bucket)
    regime.ladder.lookup(10**6, regime.tune_max_num_tokens)


def _recordings(suffix: str) -> Callable[[bytes, Path], None]:
    """Returns what reads a recording with this suffix, and uses it as a plan does."""

    def read(content: bytes, folder: Path) -> None:
        found = read_recording(_file(folder, f"traffic{suffix}", content))
        shown(recording_line(found.summary))
        layer = MoELayer(num_experts=len(found.loads), top_k=found.ids.shape[1], hidden_size=8, intermediate_size=8)
        realize(layer, Regime(distribution=f"replay:{found.digest}"), 4)

    return read


def _texts(*texts: str) -> list[bytes]:
    return [text.encode() for text in texts]


def _small(content: bytes, choices: int = 3) -> bytes:
    """Returns a profile's text with few choices, so that a mutation is likely to meet each kind of field."""
    document = json.loads(content)
    document["choices"] = document["choices"][:choices]
    for choice in document["choices"]:
        choice["rejected"] = choice["rejected"][:2]
    return json.dumps(document).encode()


def _profiles() -> list[bytes]:
    found = [_small(path.read_bytes()) for path in sorted((ROOT / "profiles").glob("*/*/*/*.json"))[::6]]
    document = json.loads(found[0])
    strict = {**document["environment"]["strict"], "flashinfer": "0.7.2.post1"}
    document["environment"]["strict"] = strict
    for backend, tactic in (
        ("flashinfer-cutlass", {"gemm1": 3, "gemm2": 60}),
        ("flashinfer-trtllm", {"tile_n": 8, "config": 3}),
        ("torch", {"algorithm": "eager"}),
    ):
        for choice in document["choices"]:
            choice |= {"tactic": tactic, "default_tactic": tactic, "equally_fast": [], "rejected": []}
            for compared in choice.get("by_rows", ()):
                compared["default_tactic"] = tactic
        if backend == "flashinfer-trtllm":
            document["layer"] |= {"precision": "fp8_block"}
        found.append(json.dumps({**document, "backend": backend}).encode())
    return found


def _saved(save: Callable[[io.BytesIO], None]) -> bytes:
    with io.BytesIO() as buffer:
        save(buffer)
        return buffer.getvalue()


_IDS = layers(2, each=6)
_ARRAYS = {"topk_ids": _IDS.numpy(), "topk_weights": numpy.ones(_IDS.shape, numpy.float32), "layers": numpy.arange(2)}
_RECORDS = {
    "records": [{"forward_pass_id": 0, "rank": 0, "input_ids": [1, 2], "topk_ids_of_layer": _IDS}],
    "last_physical_to_logical_map": torch.arange(16).expand(2, 16).contiguous(),
}
_RECORDINGS: dict[str, list[bytes]] = {
    ".npy": [_saved(lambda file: numpy.save(file, _IDS.numpy()))],
    ".npz": [
        _saved(lambda file: numpy.savez(file, **_ARRAYS)),
        _saved(lambda file: numpy.savez_compressed(file, **_ARRAYS)),
    ],
    ".safetensors": [safetensors(topk_ids=_IDS), safetensors(topk_ids=_IDS, topk_weights=torch.ones(_IDS.shape))],
    ".pt": [_saved(lambda file: torch.save(_IDS, file)), _saved(lambda file: torch.save(_RECORDS, file))],
    ".json": [calibrator(_IDS).encode(), response(_IDS).encode()],
    ".jsonl": [f"{response(_IDS)}\n{response(_IDS)}\n".encode()],
}
_MEASURED = {"rows": 8, "rounds": 3, "strategy": "auto", "measured_at": "2026-01-01T00:00:00+00:00"}
_JOURNAL = [
    json.dumps({"schema_version": 1, "tactic": {"BLOCK_SIZE_M": 16, "kind": "a"}, "time_us": 12.5, **_MEASURED}),
    json.dumps({"schema_version": 1, "tactic": {"gemm1": 3}, "reason": "does not compile", **_MEASURED}),
    json.dumps({"schema_version": 1, "rows": 8, "strategy": "auto", "warm_starts": [{"gemm1": 1}], "finalists": []}),
]
_ROWS = {"triton_version": "3.6.0"} | {
    str(rows): {
        "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3
    }
    for rows in (1, 64, 4096)
}  # fmt: skip
_NAME = "E=128,N=192,device_name=NVIDIA_H200.json"
_LOG = (
    f"INFO [fused_moe.py:1] Using configuration from /tuned folder/{_NAME} for MoE layer.\n",
    f"Using default MoE config. Performance might be sub-optimal! Config file not found at ['/tuned/{_NAME}']\n",
    f"Config file not found at /a/{_NAME}. Fallback to triton version 3.5.1 and use MoE kernel config from "
    f"/b/{_NAME}.\n",
    "INFO Using TRITON Unquantized MoE backend out of potential backends: ['TRITON'].\n",
    "moetune: Triton experts E=128, N=192: profile of qwen3\n",
    "Deterministic inference is enabled, using default MoE kernel config.\n",
)
_CONFIGS = [path.read_bytes() for name in ("hf", "configs") for path in sorted((DATA / name).glob("*.json"))]
_QUANTIZED = [
    json.dumps({"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.1*"]}}),
    json.dumps({"quantization": {"quantized_layers": {"model.layers.0.mlp.experts": {"quant_algo": "FP8"}}}}),
]
_LINES = [entry["line"] for entry in json.loads((DATA / "launch" / "lines.json").read_text(encoding="utf-8"))]
_SETTINGS = [path.read_bytes() for path in sorted((DATA / "launch" / "settings").iterdir())]
_OPTIONS = _texts(
    "--model qwen3-235b-a22b --ep 8 --dispatch vllm:deepep_high_throughput --draws 4 --seed 3",
    "--experts 128 --top-k 8 --hidden 2048 --intermediate 768 --precision fp8_block --ep 4 --dp --layout pool",
    "--model deepseek-v3 --ep 32 --tp 1 --redundant-experts 32 --rank fullest --ladder 1,2,4/8 --distribution balanced",
    "--launch 'vllm serve Qwen/Qwen3-30B-A3B -dp 8 -ep' --tune-max-num-tokens 1024",
)
_BATCHES = (
    "jobs:\n  - model: [a, b]\n    options: [--ep 8, '--ladder 1,4']\n  - launch: vllm serve a -dp 8\n",
    "# lines\nvllm serve a \\\n  -dp 8\n--model b --ep 4\n",
)
_PROVENANCE = {
    "layer": {"name": "a", "num_experts": 128, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768},
    "regime": {"ep_size": 1, "tp_size": 4, "digest": "0"},
}

TARGETS = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("profile", _profiles(), read_profile),
            Target("journal", _texts("\n".join([*_JOURNAL, ""]), *(f"{line}\n" for line in _JOURNAL)), read_journal),
            Target("config", _CONFIGS, read_model),
            Target("quant_config", _texts(*_QUANTIZED), read_beside),
            Target("launch", _texts(*_LINES), read_line),
            Target("settings", _SETTINGS, read_settings),
            Target("batch", _texts(*_BATCHES), read_batch),
            Target("tuned_file", _texts(json.dumps(_ROWS)), read_tuned_file),
            Target("provenance", _texts(json.dumps(_PROVENANCE)), read_provenance),
            Target("log", _texts("".join(_LOG), *_LOG), read_engine_log),
            Target("options", _OPTIONS, read_options),
            *(Target(f"recording{suffix}", seeds, _recordings(suffix)) for suffix, seeds in _RECORDINGS.items()),
            Target("ladder", _texts("pow2 8192", "hybrid/8 100", "1,2,4", "vllm", "adaptive/2 9000"), read_ladder),
        )
    }
)

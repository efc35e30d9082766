"""vLLM's and SGLang's look-up of a Triton configuration, answered from the store by the plugins."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import logging
import shutil
import sys

import pytest
import torch
from choices import make_choice
from engine_trees import CALLERS, LOOKUP, MOE, NAME, functions, plant

from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.registry import backend as made
from moetune.cli.options import request_of
from moetune.engine import plugins, session, start_tune, triton_engines, triton_hook
from moetune.engine.warmup_end import LAST_STEPS
from moetune.export.engine_log import parsed_log
from moetune.inputs import flashinfer_versions, launch
from moetune.inputs.options import parse
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.tuning.question import Question

ENGINES = ("vllm", "sglang")
SIZES = "--experts 16 --top-k 2 --hidden 512 --intermediate 256"
REGIME = "--ep 4 --dp --dispatch allgather --tune-max-num-tokens 64"
NAMES = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
W1, W2 = (4, 512, 512), (4, 512, 256)
VERSION = importlib.metadata.version


def tactic(*values):
    return Tactic(dict(zip(NAMES, values, strict=True)))


def spelled(precision="bf16", ladder="vllm"):
    return f"{SIZES} --precision {precision} {REGIME} --ladder {ladder}"


def backend_for(engine, **options):
    return TritonBackend(remote="zero", **options) if engine == "sglang" else TritonBackend(**options)


def save(text, backend, choose=lambda at, rows: tactic(16, 32 * (1 + at % 8), 128, 1, 4, 3), default=None):
    """Stores a profile as `moetune tune` does, with a tactic of its own for each bucket."""
    options = parse(text)
    question = Question.of(options.layer, options.regime, backend, rank=options.rank)
    choices = tuple(
        make_choice(rows, tactic=choose(at, rows), default_tactic=default or tactic(64, 32, 64, 1, 4, 2), rejected=())
        for at, rows in enumerate(question.regime.buckets)
    )
    profile = Profile(
        layer=question.layer,
        regime=question.regime,
        backend=backend.name,
        environment=question.environment,
        choices=choices,
    )
    question.store.save(profile)
    return profile


@pytest.fixture
def version(monkeypatch):
    """Sets the version of vLLM that is installed."""

    def install(text):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: text if name == "vllm" else VERSION(name))

    install("0.33.0")
    return install


@pytest.fixture
def process(monkeypatch, version, tmp_path, caplog):
    """This process as one in which no plugin was loaded and no engine imported; FlashInfer is left alone."""
    monkeypatch.setattr(plugins, "_registered", False)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, plugins._Watch)]  # of other tests
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(flashinfer_versions, "obstacle", lambda: "not in this test")
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    caplog.set_level(logging.INFO)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in ENGINES]:
            del sys.modules[name]

    forget()
    yield
    forget()
    session.set_for_process(None)


@pytest.fixture
def engine_of(process, tmp_path, monkeypatch):
    """Returns a function that starts an engine with the plugin, and returns the two modules of `CALLERS`."""

    def start(engine, text, *, planted=True, imported_first=False):
        if planted:
            plant(tmp_path, engine)
        names = [f"{MOE[engine]}.{name}" for name in CALLERS[engine]]
        if imported_first:
            for name in names:
                importlib.import_module(name)
        if text is not None:
            monkeypatch.setenv(plugins.VARIABLE, text)
        getattr(plugins, engine)()
        return [importlib.import_module(name) for name in names]

    return start


def lines(caplog):
    return [record.message for record in caplog.records if "Triton experts" in record.message]


@pytest.mark.parametrize("imported_first", [False, True])
@pytest.mark.parametrize("ladder", ["vllm", "pow2", "pow2/4", "hybrid", "adaptive", "1,5,40"])
@pytest.mark.parametrize("engine", ENGINES)
def test_all_rows_run_what_the_profile_says(engine, ladder, imported_first, engine_of, caplog):
    text = spelled(ladder=ladder)
    profile = save(text, backend_for(engine))
    grouped, other = engine_of(engine, text, imported_first=imported_first)
    for rows in range(1, 70):
        wanted = dict(profile.tactic(rows * profile.regime.ladder.divisor))
        assert grouped.ask(W1, W2, 2, None, rows) == wanted
        assert other.ask(W1, W2, 2, None, rows)["num_warps" if engine == "vllm" else "BLOCK_SIZE_N"] in (4, 64)
        assert other.ask(W1, W2, 2, None, rows) != wanted, "another kernel keeps the engine's own"
    (asked,) = session.current().asked
    assert (asked.hits, asked.misses) == (69, 0)
    assert lines(caplog) == [
        f"moetune: Triton experts E=4, N=256: profile of {profile.layer.name} under {profile.regime.slug}, "
        f"{len(profile.choices)} buckets"
    ]
    assert parsed_log("\n".join(lines(caplog))).plugin == ("E=4, N=256",), "`moetune lookup --log` reads it"


def test_with_expert_major_rows_neither_kernel_is_answered(engine_of, caplog):
    """The file of the batched kernel is not for the grouped one, and vLLM's batched kernel keeps its own look-up."""
    text = f"{SIZES} --precision bf16 --ep 4 --layout batched --ladder 64"
    save(text, made("batched-triton"), lambda at, rows: Tactic(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=64))
    grouped, batched = engine_of("vllm", text)
    for rows in (1, 64):
        assert grouped.ask(W1, W2, 2, None, rows) == batched.ask(W1, W2, 2, None, rows)
    (line,) = lines(caplog)
    assert "reads rows with their ids, not the expert-major rows of the layout batched" in line


@pytest.mark.parametrize("engine", ENGINES)
def test_unset_nothing_changes(engine, engine_of, caplog):
    save(spelled(), backend_for(engine))
    grouped, other = engine_of(engine, None)
    lookup = sys.modules[f"{MOE[engine]}.{LOOKUP[engine]}"]
    assert vars(grouped)[NAME] is vars(other)[NAME] is vars(lookup)[NAME]
    assert session.current() is None
    assert not lines(caplog)


@pytest.mark.parametrize(
    ("w1", "w2", "top_k", "dtype", "block"),
    [
        ((5, 512, 512), (5, 512, 256), 2, None, None),
        ((4, 256, 512), (4, 512, 128), 2, None, None),
        ((4, 512, 256), (4, 256, 256), 2, None, None),
        ((4, 512, 256), (4, 512, 256), 2, None, None),
        (W1, W2, 3, None, None),
        (W1, W2, 2, "fp8_w8a8", None),
        (W1, W2, 2, "fp8_w8a8", [128, 128]),
        (W1, W2, 2, None, [128, 128]),
    ],
    ids=["E", "N", "K", "packed K", "k", "dtype", "fp8 blocks", "blocks"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_other_shapes_pass_through(engine, w1, w2, top_k, dtype, block, engine_of, caplog):
    save(spelled(), backend_for(engine))
    grouped, other = engine_of(engine, spelled())
    assert grouped.ask(w1, w2, top_k, dtype, 8, block_shape=block) == other.ask(
        w1, w2, top_k, dtype, 8, block_shape=block
    )
    grouped.ask(w1, w2, top_k, dtype, 9, block_shape=block)
    (asked,) = session.current().asked
    assert (asked.hits, asked.misses) == (0, 2)
    (line,) = lines(caplog)
    assert line.startswith(f"moetune: Triton experts E={w2[0]}, N={w2[2]}: not ")
    assert line.endswith(", the engine's own configuration runs")


@pytest.mark.parametrize("engine", ENGINES)
def test_fp8_blocks_are_answered_with_the_block_that_runs(engine, engine_of):
    text = spelled("fp8_block")
    save(text, backend_for(engine), lambda at, rows: tactic(16, 128, 256, 1, 4, 3))
    grouped, _ = engine_of(engine, text)
    found = grouped.ask(W1, W2, 2, "fp8_w8a8", 8, block_shape=[128, 128])
    assert found == dict(tactic(16, 128, 128, 1, 4, 3))
    assert grouped.ask(W1, W2, 2, "fp8_w8a8", 8, block_shape=[64, 128]) != found


@pytest.mark.parametrize("engine", ENGINES)
def test_where_the_choice_is_the_default_the_engines_own_runs(engine, engine_of):
    default = tactic(16, 64, 128, 1, 4, 4 if engine == "vllm" else 3)
    save(spelled(), backend_for(engine), lambda at, rows: default, default)
    grouped, other = engine_of(engine, spelled())
    assert grouped.ask(W1, W2, 2, None, 24) == other.ask(W1, W2, 2, None, 24)
    assert grouped.ask(W1, W2, 2, None, 64) == dict(default), "the engine's own is not the default that was measured"
    (asked,) = session.current().asked
    assert (asked.hits, asked.misses, asked.same) == (1, 1, 1)


LAST_MODULES = {"vllm": "vllm.v1.worker.gpu_worker", "sglang": "sglang.srt.managers.scheduler"}
LAST_CLASSES = {"vllm": "Worker", "sglang": "Scheduler"}


@pytest.mark.parametrize("imported_first", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_at_the_end_of_the_warm_up_each_shape_has_its_line(
    engine, imported_first, engine_of, tmp_path, monkeypatch, caplog
):
    default = tactic(16, 64, 128, 1, 4, 4 if engine == "vllm" else 3)
    save(spelled(), backend_for(engine), lambda at, rows: default, default)
    plant(tmp_path, engine)
    path = tmp_path.joinpath(*LAST_MODULES[engine].split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    method = "compile_or_warm_up_model" if engine == "vllm" else "run_event_loop"
    path.write_text(f"class {LAST_CLASSES[engine]}:\n    def {method}(self, then):\n        return then()\n")
    if imported_first:
        importlib.import_module(LAST_MODULES[engine])
    grouped, _ = engine_of(engine, spelled(), planted=False)
    last = getattr(importlib.import_module(LAST_MODULES[engine]), LAST_CLASSES[engine])()

    def run():
        for rows in (24, 24, 64):
            grouped.ask(W1, W2, 2, None, rows)
        grouped.ask((5, 512, 512), (5, 512, 256), 2, None, 8)
        return "what the engine returns"

    if engine == "sglang":  # its warm-up is over when it begins to serve
        run()
    caplog.clear()
    assert getattr(last, method)(run) == getattr(last, method)(run) == "what the engine returns"
    own = "2 of them because its own configuration is the profile's choice"
    assert [line for line in lines(caplog) if "calls hit" in line] == [
        f"moetune: Triton experts E=4, N=256: 1 calls hit, 2 left to the engine, {own}",
        "moetune: Triton experts E=5, N=256: 0 calls hit, 1 left to the engine",
    ]
    assert [line for line in caplog.text.splitlines() if "s until the end of the warm-up" in line], "moetune's time"
    spent = session.current().spent_s
    grouped.ask(W1, W2, 2, None, 24)
    assert session.current().spent_s == spent > 0, "a repeated look-up costs nothing that is counted"


@pytest.mark.network
def test_the_engines_have_the_last_steps(vllm_version_sources, engine_sources):
    found = []
    roots = {"vllm": [vllm_version_sources(version) for version in ("0.26.0", "0.33.0")]}
    roots["sglang"] = [engine_sources("sglang")]
    for step in LAST_STEPS:
        for root in roots[step.module.partition(".")[0]]:
            tree = ast.parse(root.joinpath(*step.module.split(".")).with_suffix(".py").read_text())
            (owner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == step.owner)
            found += [step.method for node in owner.body if getattr(node, "name", "") == step.method]
    assert found == ["compile_or_warm_up_model"] * 2 + ["run_event_loop"]


@pytest.mark.network
@pytest.mark.parametrize("release", ["0.26.0", "0.33.0"])
def test_vllms_first_look_up_is_before_the_kv_cache(release, vllm_version_sources):
    """`MOETUNE_TUNE_AT_START` tunes in it: the run that finds out how much memory is left for the cache."""
    tree = ast.parse((vllm_version_sources(release) / "vllm/v1/worker/gpu_worker.py").read_text())
    (worker,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Worker")
    methods = {node.name: ast.unparse(node) for node in worker.body if isinstance(node, ast.FunctionDef)}
    assert "self.model_runner.profile_run(" in methods["determine_available_memory"]
    assert "memory_profiling(" in methods["determine_available_memory"]
    assert "kernel_warmup(self)" in methods.get("_compile_or_warm_up_model", methods["compile_or_warm_up_model"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_miss_names_the_command(engine, engine_of, caplog):
    save(spelled(ladder="pow2"), backend_for(engine))
    grouped, other = engine_of(engine, spelled())
    assert grouped.ask(W1, W2, 2, None, 8) == other.ask(W1, W2, 2, None, 8)
    remote = " --remote zero" if engine == "sglang" else ""
    assert lines(caplog) == [
        "moetune: Triton experts E=4, N=256: no profile, the engine's own configuration runs; "
        f"`moetune tune {spelled()} --backend triton{remote}` makes one"
    ]


@pytest.mark.parametrize(
    ("installed", "measured", "found"),
    [
        ("0.33.0", {}, True),
        ("0.33.0", {"kernel_version": "0.20"}, False),
        ("0.20.2", {"kernel_version": "0.20"}, True),
        ("0.20.2", {}, False),
        ("0.28.0", {"remote": "zero"}, True),
        ("0.33.0", {"remote": "zero"}, True),
    ],
)
def test_the_profile_has_the_kernel_of_the_installed_vllm(installed, measured, found, version, engine_of):
    version(installed)
    text = spelled("fp8_block")
    save(text, TritonBackend(**measured))
    grouped, _ = engine_of("vllm", text)
    grouped.ask(W1, W2, 2, "fp8_w8a8", 8, [128, 128])
    (asked,) = session.current().asked
    assert (asked.hits == 1) is found


def test_a_version_that_was_not_read_is_named(version, engine_of, caplog):
    version("0.99.1")
    profile = save(spelled(), TritonBackend())
    grouped, _ = engine_of("vllm", spelled())
    assert grouped.ask(W1, W2, 2, None, 8) == dict(profile.tactic(8))
    assert lines(caplog)[0].endswith(" buckets. The kernel of vllm 0.99.1 was not read, only that of 0.19 … 0.33")


def test_a_vllm_without_metadata_counts_as_the_newest_that_was_read(engine_of, monkeypatch, caplog):
    def version(name):
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return VERSION(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    profile = save(spelled(), TritonBackend())
    grouped, _ = engine_of("vllm", spelled())
    assert grouped.ask(W1, W2, 2, None, 8) == dict(profile.tactic(8))
    assert lines(caplog)[0].endswith(" buckets")


def test_of_two_profiles_the_one_with_the_kernels_non_local_slots_answers(version, engine_of, caplog):
    version("0.28.0")
    save(spelled(), TritonBackend(), lambda at, rows: tactic(32, 32, 64, 1, 4, 3))
    grouped, _ = engine_of("vllm", spelled())
    assert grouped.ask(W1, W2, 2, None, 8)["BLOCK_SIZE_M"] == 32
    assert lines(caplog)[0].endswith(", measured with --remote drop")
    save(spelled(), TritonBackend(remote="zero"), lambda at, rows: tactic(128, 32, 64, 1, 4, 3))
    session.current().asked.clear()
    importlib.reload(grouped)
    triton_hook.install(grouped, triton_engines.VLLM, session.current())
    assert grouped.ask(W1, W2, 2, None, 8)["BLOCK_SIZE_M"] == 128


@pytest.mark.parametrize("engine", ENGINES)
def test_a_profile_of_the_ladder_vllm_answers_with_adaptive_until_one_of_that_ladder_is_stored(
    engine, engine_of, caplog
):
    profile = save(spelled(), backend_for(engine))
    grouped, _ = engine_of(engine, spelled(ladder="adaptive"))
    for rows in range(1, 70):
        assert grouped.ask(W1, W2, 2, None, rows) == dict(profile.tactic(rows))
    assert lines(caplog)[0].endswith(f", {len(profile.choices)} buckets, measured on the ladder vllm")
    adaptive = save(spelled(ladder="adaptive"), backend_for(engine), lambda at, rows: tactic(128, 32, 64, 1, 4, 3))
    session.current().asked.clear()
    importlib.reload(grouped)
    triton_hook.install(
        grouped, triton_engines.SGLANG if engine == "sglang" else triton_engines.VLLM, session.current()
    )
    assert grouped.ask(W1, W2, 2, None, 8)["BLOCK_SIZE_M"] == 128
    assert lines(caplog)[-1].endswith(f", {len(adaptive.choices)} buckets")


def test_a_profile_of_the_engines_own_kernel_answers(engine_of, tmp_path, monkeypatch):
    plant(tmp_path, "vllm")
    source = "import triton\nimport triton.language as tl\n@triton.jit\ndef fused_moe_kernel(a_ptr):\n    pass\n"
    (tmp_path / "vllm/model_executor/layers/fused_moe/fused_moe.py").open("a").write(source)
    (tmp_path / "vllm/__init__.py").touch()
    profile = save(spelled(), TritonBackend("vllm"))
    grouped, _ = engine_of("vllm", spelled(), planted=False)
    assert grouped.ask(W1, W2, 2, None, 8) == dict(profile.tactic(8))


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ("vllm", "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel --moe-backend triton"),
        ("vllm", "vllm serve deepseek-ai/DeepSeek-R1 -tp 8 --enable-expert-parallel --moe-backend triton"),
        (
            "sglang",
            "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --tp 8 --dp 8 --enable-dp-attention "
            "--ep 8 --moe-runner-backend triton",
        ),
    ],
)
def test_the_profile_that_tune_stores_for_the_same_launch_line_answers(engine, line, engine_of):
    request = request_of(**launch.read(line).options)
    layer, regime = request.layer, request.regime
    assert request.backend.name == "triton"
    profile = save(f'--launch "{line}"', request.backend)
    grouped, _ = engine_of(engine, f'--launch "{line}"')
    experts, width, depth = regime.shard(layer).num_local, regime.intermediate_size(layer), layer.hidden_size
    fp8 = layer.precision == "fp8_block"
    for rows in (*profile.regime.buckets, 5, 70, 5000):
        found = grouped.ask(
            (experts, 2 * width, depth),
            (experts, depth, width),
            layer.top_k,
            "fp8_w8a8" if fp8 else None,
            rows,
            block_shape=[128, 128] if fp8 else None,
        )
        assert found == dict(profile.tactic(rows))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_override_wins(engine, engine_of):
    profile = save(spelled(), backend_for(engine))
    grouped, _ = engine_of(engine, spelled())
    assert grouped.ask(W1, W2, 2, None, 8) == dict(profile.tactic(8))
    with sys.modules[MOE[engine]].override_config({"BLOCK_SIZE_M": 1}):
        assert grouped.ask(W1, W2, 2, None, 8) == {"BLOCK_SIZE_M": 1}
    assert grouped.ask(W1, W2, 2, None, 8) == dict(profile.tactic(8))


@pytest.mark.parametrize("engine", ENGINES)
def test_reproducible_runs_keep_the_engines_own(engine, engine_of, caplog):
    save(spelled(), backend_for(engine))
    grouped, other = engine_of(engine, spelled())
    lookup = sys.modules[f"{MOE[engine]}.{LOOKUP[engine]}"]
    if engine == "vllm":
        lookup.envs.VLLM_BATCH_INVARIANT = True
    else:
        lookup.deterministic.enable_deterministic_inference = True
    assert grouped.ask(W1, W2, 2, None, 8) == other.ask(W1, W2, 2, None, 8)
    assert ("VLLM_BATCH_INVARIANT is set" if engine == "vllm" else "deterministic inference is on") in lines(caplog)[0]


def test_both_gemms_of_sglang_run_the_configuration(engine_of):
    profile = save(spelled(), backend_for("sglang"), lambda at, rows: tactic(16 << at % 3, 32, 64, 1, 4, 3))
    grouped, other = engine_of("sglang", spelled())
    config, (down, largest) = grouped.ask(W1, W2, 2, None, 8, return_down_config=True)
    assert config == down == dict(profile.tactic(8))
    assert largest == 64
    down.clear()
    assert grouped.ask(W1, W2, 2, None, 8, return_down_config=True)[1][0] == config
    for named in ({"is_marlin": True}, {"per_channel_quant": True}):
        assert grouped.ask(W1, W2, 2, None, 8, **named) == other.ask(W1, W2, 2, None, 8, **named)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_is_logged_once_and_the_engine_goes_on(engine, engine_of, caplog, monkeypatch):
    profile = save(spelled(), backend_for(engine), lambda at, rows: Tactic(tile=rows))
    grouped, other = engine_of(engine, spelled())
    for rows in (8, 8, 9):
        assert grouped.ask(W1, W2, 2, None, rows) == other.ask(W1, W2, 2, None, rows)
    (line,) = lines(caplog)
    assert "are left to the engine" in line
    assert "BLOCK_SIZE_M" in line
    assert [record.levelno for record in caplog.records if line in record.message] == [logging.WARNING]
    assert profile.choices


def test_a_shape_that_cannot_be_looked_up_is_left_to_the_engine_and_logged_once(engine_of, caplog):
    save(spelled(), TritonBackend())
    grouped, other = engine_of("vllm", spelled())
    for rows in (8, 9):
        assert grouped.ask([*W1], [*W2], 2, None, rows) == other.ask([*W1], [*W2], 2, None, rows)
    assert lines(caplog) == ["moetune: Triton experts are left to the engine: TypeError: unhashable type: 'list'"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_look_up_with_another_signature_is_left_alone(engine, process, tmp_path, monkeypatch, caplog):
    plant(tmp_path, engine, lookup=f"\ndef {NAME}(layer, rows):\n    return rows\n")
    monkeypatch.setenv(plugins.VARIABLE, spelled())
    getattr(plugins, engine)()
    assert importlib.import_module(f"{MOE[engine]}.{CALLERS[engine][0]}").ask(1, 7) == 7
    assert f"{engine} of this version has another {NAME}" in lines(caplog)[0]


def test_a_layer_that_the_backend_does_not_compute_is_left_alone(engine_of, caplog):
    text = f"{SIZES} --precision fp16 {REGIME}"
    grouped, other = engine_of("vllm", text)
    assert grouped.ask(W1, W2, 2, None, 8) == other.ask(W1, W2, 2, None, 8)
    assert "moetune's backend triton computes bf16 and fp8_block experts, not fp16" in lines(caplog)[0]


def test_the_store_is_read_once_for_a_shape_and_its_profile_once_for_a_row_count(engine_of, monkeypatch):
    save(spelled(), TritonBackend())
    grouped, _ = engine_of("vllm", spelled())
    reads, looked_up = [], []
    match, choice = Question.match, Profile.choice
    monkeypatch.setattr(Question, "match", lambda self: reads.append(1) or match(self))
    monkeypatch.setattr(Profile, "choice", lambda self, rows: looked_up.append(rows) or choice(self, rows))
    for _ in range(3):
        for rows in range(1, 65):
            grouped.ask(W1, W2, 2, None, rows)
    assert reads == [1]
    assert looked_up == list(range(1, 65))


def some_of(profile, text, backend, buckets):
    """Stores the choices of some buckets of a profile."""
    options = parse(text)
    question = Question.of(options.layer, options.regime, backend, rank=options.rank)
    chosen = tuple(choice for choice in profile.choices if choice.rows in buckets)
    question.store.save(profile.model_copy(update={"choices": chosen}))


@pytest.fixture
def tunes(monkeypatch):
    """Replaces the process that tunes. Returns what it is asked, and sets what it does."""
    asked = []

    def set_tune(act, obstacle=None):
        monkeypatch.setenv(start_tune.VARIABLE, "120")
        monkeypatch.setattr(start_tune, "obstacle", lambda: obstacle)
        monkeypatch.setattr(start_tune, "tune_within", lambda *given: asked.append(given) or act())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        return asked

    return set_tune


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_stored_is_tuned_before_the_first_answer(engine, engine_of, tunes, caplog):
    saved = []
    asked = tunes(lambda: saved.append(save(spelled(), backend_for(engine))))
    grouped, _ = engine_of(engine, spelled())
    for rows in (8, 8, 60):
        found = grouped.ask(W1, W2, 2, None, rows)
        assert found == dict(saved[0].tactic(rows))
    ((limit_s, layer, regime, backend, store, device, rank),) = asked
    opened = session.current()
    assert (limit_s, layer, regime, store) == (120.0, opened.layer, opened.regime, str(opened.store.root))
    assert (backend.name, device, rank) == ("triton", "cuda:3", parse(spelled()).rank)
    begun, ended = lines(caplog)
    assert begun == "moetune: Triton experts E=4, N=256: tuning what the store lacks, at most 120 s"
    assert ended.endswith(f", {len(saved[0].choices)} buckets (tuned in 0 s)")
    assert parsed_log(ended).plugin == ("E=4, N=256",)


def test_a_stored_profile_is_not_tuned_again(engine_of, tunes):
    profile = save(spelled(), TritonBackend())
    asked = tunes(lambda: None)
    grouped, _ = engine_of("vllm", spelled())
    assert grouped.ask(W1, W2, 2, None, 8) == dict(profile.tactic(8))
    assert not asked


@pytest.mark.parametrize("obstacle", [None, "a CUDA graph is being captured"])
def test_if_nothing_could_be_tuned_the_engines_own_runs_and_the_reason_is_one_short_line(
    obstacle, engine_of, tunes, caplog
):
    asked = tunes(lambda: "out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", obstacle)
    grouped, other = engine_of("vllm", spelled())
    for rows in (8, 9):
        assert grouped.ask(W1, W2, 2, None, rows) == other.ask(W1, W2, 2, None, rows)
    assert len(asked) == (obstacle is None), "once"
    reason = obstacle or "out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert lines(caplog)[-1].startswith(
        f"moetune: Triton experts E=4, N=256: no profile (not all tuned: {reason}), the"
    )


def test_a_bucket_that_was_not_tuned_in_time_is_left_to_the_engine(engine_of, tunes, caplog):
    profile = save(spelled(), TritonBackend())
    shutil.rmtree(Store().root)
    tuned = (1, 2, 4, 8)
    tunes(lambda: some_of(profile, spelled(), TritonBackend(), tuned) or "the time ended before 6 buckets")
    grouped, other = engine_of("vllm", spelled())
    for rows in range(1, 70):
        bucket = profile.choice(rows).rows
        own = dict(profile.tactic(rows)) if bucket in tuned else other.ask(W1, W2, 2, None, rows)
        assert grouped.ask(W1, W2, 2, None, rows) == own
    assert lines(caplog)[-1].endswith(", 4 buckets (not all tuned: the time ended before 6 buckets)")


def test_a_wrong_number_of_seconds_is_logged_and_the_store_answers(engine_of, tunes, monkeypatch, caplog):
    profile = save(spelled(), TritonBackend())
    asked = tunes(lambda: None)
    monkeypatch.setenv(start_tune.VARIABLE, "1")
    grouped, _ = engine_of("vllm", spelled())
    assert grouped.ask(W1, W2, 2, None, 8) == dict(profile.tactic(8))
    assert "moetune: nothing is tuned at the start: MOETUNE_TUNE_AT_START=1 is not a number" in caplog.text
    assert not asked


LOOKUPS = ("get_config_file_name", "get_moe_configs", "get_default_config", NAME)


def modules_of(tree):
    """Returns the modules from which the look-up's name is imported at the top of a module."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [node.module for node in imports if NAME in [alias.name for alias in node.names]]


def every_bucket_is_answered(engine, engine_of, precision, ask):
    text = spelled(precision)
    profile = save(text, backend_for(engine))
    grouped, other = engine_of(engine, text, planted=False)
    fp8 = {"dtype": "fp8_w8a8", "block_shape": [128, 128]} if precision == "fp8_block" else {"dtype": None}
    for rows in profile.regime.buckets:
        assert ask(grouped, W1, W2, 2, M=rows, **fp8) == dict(profile.tactic(rows))
        own = other.ask(W1, W2, 2, M=rows, **fp8)
        assert own != dict(profile.tactic(rows))
        wide = ((8, 512, 512), (8, 512, 256))
        assert ask(grouped, *wide, 2, M=rows, **fp8) == other.ask(*wide, 2, M=rows, **fp8)
    of_layer, of_others = session.current().asked
    assert (of_layer.hits, of_layer.misses) == (len(profile.choices), 0)
    assert of_others.hits == 0


@pytest.mark.network
@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
@pytest.mark.parametrize("release", ["0.26.0", "0.33.0"])
def test_vllms_real_look_up_is_answered(release, precision, vllm_version_sources, engine_of, version, tmp_path):
    version(release)
    sources = vllm_version_sources(release) / "vllm/model_executor/layers/fused_moe"
    plant(tmp_path, "vllm", lookup=functions(sources / "fused_moe.py", *LOOKUPS))
    tree = ast.parse((sources / "experts/triton_moe.py").read_text())
    assert modules_of(tree) == [f"{MOE['vllm']}.{LOOKUP['vllm']}"], "it binds the name that is replaced"
    (experts,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TritonExperts")
    (apply,) = (node for node in experts.body if isinstance(node, ast.FunctionDef) and node.name == "apply")
    (call,) = (
        node
        for node in ast.walk(apply)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == NAME
    )
    assert ([*map(ast.unparse, call.args)], [word.arg for word in call.keywords]) == (
        ["w1.size()", "w2.size()", "top_k_num", "self.quant_config.config_name(hidden_states.dtype)", "num_tokens"],
        ["block_shape"],
    )
    every_bucket_is_answered("vllm", engine_of, precision, lambda module, *given, **named: module.ask(*given, **named))


RUNS = """
from types import SimpleNamespace
padding_size, _use_aiter = 128, False
_moe_support_tma = lambda: True
moe_align_block_size = lambda *given: (None, None, None)
get_config_dtype_str = lambda use_fp8_w8a8, **named: "fp8_w8a8" if use_fp8_w8a8 else None
"""


def sglang_runs(module, w1, w2, top_k, dtype, M, block_shape=None):
    """What SGLang's real caller makes of the look-up's answer; both GEMMs run it."""
    shaped = {name: module.SimpleNamespace(shape=shape) for name, shape in [("w1", w1), ("w2", w2)]}
    config, down, down_tma, up_tma, *_ = module._prepare_fused_moe_run(
        module.SimpleNamespace(shape=(M, w1[2]), dtype="bf16"),
        **shaped,
        topk_ids=module.SimpleNamespace(shape=(M, top_k)),
        use_fp8_w8a8=dtype is not None,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
        block_shape=block_shape,
    )
    assert (down or config) == config
    assert not down_tma
    assert not up_tma
    return config


@pytest.mark.network
@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_sglangs_real_look_up_and_its_caller_are_answered(precision, engine_sources, engine_of, tmp_path):
    sources = engine_sources("sglang") / "sglang/srt/layers/moe/moe_runner/triton_utils"
    lookup = functions(sources / "fused_moe_triton_config.py", *LOOKUPS)
    caller = functions(sources / "fused_moe.py", "_prepare_fused_moe_run")
    plant(tmp_path, "sglang", lookup=lookup, caller=RUNS + caller)
    tree = ast.parse((sources / "fused_moe.py").read_text())
    assert modules_of(tree) == [LOOKUP["sglang"]], "it binds the name that is replaced"
    every_bucket_is_answered("sglang", engine_of, precision, sglang_runs)

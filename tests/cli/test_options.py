import json
from typing import Any, get_args

import pytest

from moetune.backends import registry
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.cli.options import request_of
from moetune.cli.plan import plan
from moetune.errors import UsageError
from moetune.inputs.option_table import OPTIONS
from moetune.spec import enums as words
from moetune.spec.enums import DISTRIBUTION_VARIABLE
from moetune.spec.regime import Regime

QWEN = ("--model", "qwen3-30b-a3b")
CHOICES = {option.name: option.choices for option in OPTIONS}


def _regime(moetune, *words):
    result = moetune("plan", "--json", *words)
    assert result.exit_code == 0, result.stderr
    return Regime(**json.loads(result.stdout)["regime"])


def _refused(result, *said, code=2):
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for part in said:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "qwen3-30b"], ["Unknown model 'qwen3-30b'", "qwen3-30b-a3b", "moetune models"]),
        (["--model", "no/such/config.json"], ["no/such/config.json"]),
        ([*QWEN, "--distribution", "skewed"], ["balanced, random, ddist:X, zipf:S, powerlaw:A", "'skewed'"]),
        ([*QWEN, "--distribution", "ddist:0.5"], ["a number from 1 on, such as ddist:2"]),
        (
            [*QWEN, "--distribution", "zipf:3", "--strict-skew"],
            ["asks for 1.4", "effective experts of 128, and 8 are achieved", "Reachable are 8 to 128", "zipf:1.3"],
        ),
        ([*QWEN, "--distribution", "zipf:1", "--redundant-experts", "8"], ["--dispatch ENGINE:NAME"]),
        ([*QWEN, "--ep", "7"], ["ep_size = 7 does not divide the 128 experts", "1, 2, 4, 8, 16, 32, 64, 128"]),
        ([*QWEN, "--ep", "0"], ["ep_size must be at least 1, given 0"]),
        ([*QWEN, "--ep", "-4"], ["ep_size must be at least 1, given -4"]),
        ([*QWEN, "--ep", "256"], ["ep_size = 256 exceeds the 128 experts"]),
        ([*QWEN, "--ep", "eight"], ["--ep", "'eight'", "moetune plan --help"]),
        ([*QWEN, "--tp", "0"], ["tp_size must be at least 1"]),
        ([*QWEN, "--tp", "7"], ["tp_size = 7 does not divide the intermediate size 768"]),
        ([*QWEN, "--rank", "8", "--ep", "8"], ["rank must be 0 … 7, given 8"]),
        ([*QWEN, "--redundant-experts", "-1"], ["redundant_experts must be at least 0"]),
        ([*QWEN, "--draws", "0"], ["draws must be at least 1"]),
        ([*QWEN, "--seed", "-1"], ["seed"]),
        ([*QWEN, "--tune-max-num-tokens", "0"], ["tune_max_num_tokens must be at least 1"]),
        ([*QWEN, "--backend", "nope"], ["Unknown backend 'nope'", "torch"]),
        ([*QWEN, "--backend", "torch", "--kernel", "vllm"], ["Backend torch has no option kernel", "triton"]),
        ([*QWEN, "--backend", "torch", "--remote", "drop"], ["Backend torch has no option remote", "triton"]),
        ([*QWEN, "--kernel", "cutlass"], ["--kernel", "'builtin', 'vllm', 'sglang'"]),
        ([*QWEN, "--remote", "keep"], ["--remote", "'drop', 'zero'"]),
        (["--kernel", "vllm"], ["--kernel given without --model"]),
        ([*QWEN, "--ladder", "4,2"], ["ascending", "4,2"]),
        ([*QWEN, "--ladder", "2,2"], ["ascending"]),
        ([*QWEN, "--ladder", "0,2"], ["positive"]),
        ([*QWEN, "--ladder", "stairs"], ["Unknown ladder 'stairs'", "pow2, hybrid, vllm"]),
        ([*QWEN, "--ladder", "1,64", "--tune-max-num-tokens", "32"], ["64", "above tune_max_num_tokens = 32"]),
        ([*QWEN, "--distribution", "balancd"], ["'balancd'", "balanced, random"]),
        ([*QWEN, "--no-dp", "--dispatch", "alltoall"], ["only dispatch is none, given alltoall"]),
        ([*QWEN, "--no-dp", "--dispatch", "sglang:deepep"], ["cannot be tuned", "DeepGEMM"]),
        ([*QWEN, "--dispatch", "vllm:nixl_ep", "--ladder", "vllm"], ["one bucket, the capacity", "--ladder 256"]),
        ([*QWEN, "--no-dp", "--dispatch", "sglang:flashinfer", "--layout", "pool"], ["A layout goes with", "none"]),
        ([*QWEN, "--dp", "--dispatch", "trtllm:none"], ["attention_dp needs dispatch alltoall or allgather"]),
        ([*QWEN, "--dp", "--dispatch", "none"], ["attention_dp needs dispatch alltoall or allgather"]),
        ([*QWEN, "--dispatch", "allgather", "--layout", "packed"], ["A layout goes with dispatch alltoall only"]),
        ([*QWEN, "--no-dp", "--layout", "pool"], ["A layout goes with dispatch alltoall only"]),
        ([*QWEN, "--layout", "scattered"], ["'packed', 'deduplicated', 'slot', 'pool'"]),
        ([*QWEN, "--dispatch", "carrier-pigeon"], ["none, alltoall, allgather or ENGINE:NAME"]),
        ([*QWEN, "--dispatch", "vllm:pigeon"], ["vLLM has no dispatcher 'pigeon'", "deepep_high_throughput"]),
        ([*QWEN, "--dispatch", "pigeon:none"], ["vllm, sglang, trtllm"]),
        ([*QWEN, "--dispatch", "vllm:deepep_v2"], ["cannot be tuned", "DeepGEMM"]),
        ([*QWEN, "--precision", "fp3"], ["'fp3'", "nvfp4"]),
        ([], ["--model is missing"]),
        (["--ep", "4", "--no-dp"], ["--ep, --dp given without --model"]),
        ([*QWEN, "--no-such-option"], ["--no-such-option"]),
    ],
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_2(moetune, words, said):
    _refused(moetune("plan", *words), *said)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_experts", 0), ("hidden_size", -64), ("moe_intermediate_size", 0), ("num_experts_per_tok", 17)],
)
def test_a_config_with_impossible_sizes_is_refused(moetune, tiny, field, value):
    _refused(moetune("plan", "--model", tiny(**{field: value})), str(value))


@pytest.mark.parametrize("command", ["plan", "tune", "show"])
def test_every_command_that_takes_a_question_checks_it(moetune, command):
    _refused(moetune(command, *QWEN, "--ep", "7"), "does not divide")
    _refused(moetune(command, *QWEN, "--backend", "torch", "--kernel", "vllm"), "Backend torch has no option kernel")


@pytest.fixture
def abilities(monkeypatch):
    """Makes these all the backends there are, able to run here or not, whatever this machine is."""

    def able(**available):
        monkeypatch.setattr(registry, "_CLASSES", {name: registry._CLASSES[name] for name in available})
        monkeypatch.setattr(registry, "diagnosis", lambda name: registry.Diagnosis(name, available[name]))

    return able


@pytest.mark.parametrize(
    ("precision", "triton", "chosen"),
    [("bf16", True, "triton"), ("bf16", False, "torch"), ("fp8_block", False, "triton"), ("nvfp4", True, "triton")],
    ids=["the first that is able", "the next", "one that computes it elsewhere", "none"],
)
def test_auto_takes_the_first_backend_that_runs_here_and_computes_the_layer(abilities, precision, triton, chosen):
    abilities(triton=triton, torch=True)
    assert request_of("deepseek-r1", precision=precision).backend.name == chosen
    assert request_of("deepseek-r1", precision=precision, backend="torch").backend.name == "torch"


def test_kernel_and_remote_choose_the_triton_backend_and_its_source(abilities):
    abilities(triton=False, torch=True)
    asked: Any = request_of("qwen3-30b-a3b", kernel="sglang").backend
    assert (asked.name, asked.kernel, asked.remote) == ("triton", "sglang", "zero")
    asked = request_of("qwen3-30b-a3b", kernel="vllm", remote="zero", backend="triton").backend
    assert (asked.name, asked.kernel, asked.remote) == ("triton", "vllm", "zero")


@pytest.mark.parametrize("kernel", CHOICES["kernel"])
@pytest.mark.parametrize("remote", CHOICES["remote"])
def test_every_kernel_and_treatment_on_offer_is_one_of_the_backends(kernel, remote):
    assert TritonBackend(kernel, remote).kernel == kernel


def test_a_folder_of_tuned_files_chooses_the_triton_backend_and_no_kernel_of_it(tmp_path, moetune):
    asked: Any = request_of("qwen3-30b-a3b", engine_configs=str(tmp_path)).backend
    assert (asked.name, asked.kernel, asked.remote) == ("triton", "builtin", "drop")
    asked = request_of("qwen3-30b-a3b", engine_configs=str(tmp_path), ep=8, dispatch="sglang:none").backend
    assert asked.remote == "zero"
    asked = request_of(
        "qwen3-30b-a3b", engine_configs=str(tmp_path), kernel="vllm", ep=8, dispatch="sglang:none"
    ).backend
    assert (asked.kernel, asked.remote) == ("vllm", "drop")
    refused = moetune("tune", "--model", "qwen3-30b-a3b", "--engine-configs", str(tmp_path / "absent"))
    _refused(refused, "--engine-configs must be a folder", "Give the folder of vLLM's tuned files")


@pytest.mark.parametrize(
    ("dispatch", "pairs", "fields"),
    [
        ("sglang:none", (), {"caller": "sglang"}),
        ("sglang:none", ("mxfp4_activations=fp8",), {"caller": "sglang", "mxfp4_activations": "fp8"}),
        ("sglang:none", ("caller=vllm",), {}),
        ("vllm:allgather_reducescatter", (), {}),
    ],
)
def test_the_engine_of_a_dispatcher_is_the_one_whose_call_of_flashinfers_op_is_computed(dispatch, pairs, fields):
    asked: Any = request_of(
        "gpt-oss-120b", backend="flashinfer-cutlass", backend_option=pairs, ep=8, dispatch=dispatch
    ).backend
    found = asked.environment()
    assert {name: value for name, value in found.items() if name != "flashinfer"} == fields


def _backend_option(*pairs, **given):
    return request_of("deepseek-r1", backend_option=pairs, **given).backend


def test_an_option_of_one_backend_reaches_it_in_its_type():
    made = _backend_option(
        "fp8_block_layout=plain", "quantized=true", "packed=false", backend="flashinfer-trtllm-routed"
    )
    assert (made.fp8_block_layout, made.quantized, made.packed) == ("plain", True, False)
    made = _backend_option("mxfp4-activations=mxfp8", backend="flashinfer-trtllm")
    assert (made.name, made.mxfp4_activations, made.quantized) == ("flashinfer-trtllm", "mxfp8", None)
    made = _backend_option("scratch_limit_bytes=1024", precision="bf16")
    assert (made.name, made._scratch_limit_bytes) == ("torch", 1024)


def test_an_option_that_only_one_backend_has_chooses_it():
    assert _backend_option("packed=true").name == "flashinfer-trtllm-routed"
    assert _backend_option("kernel=sglang").remote == "zero"


@pytest.mark.parametrize(
    ("pairs", "given", "said"),
    [
        (["fp8_block_layout"], {"backend": "torch"}, "KEY=VALUE, given 'fp8_block_layout'"),
        (["=plain"], {"backend": "torch"}, "KEY=VALUE"),
        (["fp8_block_layout=plain"], {}, "flashinfer-trtllm or flashinfer-trtllm-routed"),
        (["fp8_block_layout=plain"], {"backend": "torch"}, "Backend torch has no option fp8_block_layout"),
        (["fp8_block_layout=odd"], {"backend": "flashinfer-trtllm"}, "must be blocked or plain, given 'odd'"),
        (["mxfp4_activations=fp8_block"], {"backend": "flashinfer-trtllm"}, "must be bf16 or mxfp8, given"),
        (["quantized=maybe"], {"backend": "flashinfer-trtllm"}, "must be true or false, given 'maybe'"),
        (["scratch_limit_bytes=1k"], {"backend": "torch"}, "must be an integer, given '1k'"),
        (["colour=red"], {}, "No backend has the option colour"),
        (["colour=red"], {"backend": "torch"}, "Its options: scratch_limit_bytes"),
        (["colour=red"], {"backend": "flashinfer-cutlass"}, "Its options: mxfp4_activations, caller"),
        (["caller=trtllm"], {"backend": "flashinfer-cutlass"}, "must be vllm or sglang, given 'trtllm'"),
        (["packed=true", "packed=false"], {}, "given twice"),
        (["kernel=vllm"], {"kernel": "sglang"}, "given twice"),
    ],
)
def test_a_wrong_option_of_a_backend_is_refused_with_what_is_allowed(pairs, given, said):
    with pytest.raises(UsageError, match=said):
        _backend_option(*pairs, **given)


def test_a_launch_line_gives_the_backend_whose_option_is_set(moetune):
    line = "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep --moe-backend flashinfer_trtllm"
    words = ("plan", "--launch", line, "--ladder", "8", "--json")
    named = json.loads(moetune(*words, "--backend-option", "quantized=true").stdout)
    assert named["backend"] == "flashinfer-trtllm"


@pytest.mark.parametrize("command", [("plan",), ("tune", "--backend", "torch"), ("show", "--backend", "torch")])
def test_a_device_that_is_not_here_is_refused(moetune, command):
    _refused(moetune(*command, *QWEN, "--ladder", "8", "--backend", "torch", "--device", "cuda:99"), "'cuda:99'")


def test_plan_asks_the_chosen_source_whether_it_can_run(moetune, monkeypatch):
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: (f"{self.kernel} is not installed", "install it"))
    words = (*QWEN, "--ladder", "8", "--kernel", "vllm", "--json")
    document = json.loads(moetune("plan", *words).stdout)
    assert (document["backend"], document["tactics_unknown"]) == (
        "triton",
        "triton cannot run here: vllm is not installed",
    )


def test_without_options_the_regime_is_the_librarys_default(moetune):
    assert _regime(moetune, *QWEN) == Regime()


def test_every_option_reaches_its_field(moetune):
    words = ["--ep", "4", "--tp", "2", "--dp", "--layout", "deduplicated", "--redundant-experts", "4"]
    words += ["--distribution", "balanced", "--seed", "7", "--draws", "3"]
    words += ["--ladder", "1,8", "--tune-max-num-tokens", "64"]
    assert _regime(moetune, *QWEN, *words) == Regime(
        ep_size=4,
        tp_size=2,
        attention_dp=True,
        layout="deduplicated",
        distribution="balanced",
        seed=7,
        draws=3,
        ladder="1,8",
        tune_max_num_tokens=64,
        redundant_experts=4,
    )


def test_precision_replaces_the_weights_own(moetune):
    result = moetune("plan", "--json", "--model", "deepseek-r1", "--precision", "bf16", "--ladder", "1")
    assert json.loads(result.stdout)["layer"]["precision"] == "bf16"


def test_dp_alone_is_a_packed_alltoall_and_names_the_dispatchers_with_it(moetune):
    result = moetune("plan", "--json", *QWEN, "--ep", "8", "--dp", "--ladder", "8")
    regime = json.loads(result.stdout)["regime"]
    assert (regime["dispatch"], regime["layout"]) == ("alltoall", "packed")
    assert "--dispatch alltoall --layout packed" in result.stderr
    assert "trtllm:attention_dp" in result.stderr
    assert moetune("plan", "--json", *QWEN, "--dispatch", "alltoall", "--ladder", "8").stderr == ""


def test_an_engines_word_stands_for_dispatch_layout_and_ladder(moetune):
    regime = _regime(moetune, *QWEN, "--ep", "8", "--dispatch", "vllm:deepep_high_throughput")
    assert regime == Regime(ep_size=8, attention_dp=True, dispatch="alltoall", layout="deduplicated", ladder="adaptive")


def test_an_option_beside_an_engines_word_wins(moetune):
    words = ("--dispatch", "vllm:deepep_high_throughput", "--layout", "pool", "--ladder", "8,16")
    regime = _regime(moetune, *QWEN, "--ep", "8", *words)
    assert (regime.layout, str(regime.ladder)) == ("pool", "8,16")


@pytest.mark.parametrize(
    ("word", "ladder"),
    [
        ("vllm:allgather_reducescatter", "adaptive"),
        ("sglang:flashinfer", "hybrid"),
        ("trtllm:attention_dp", "pow2"),
        ("trtllm:none", "pow2"),
    ],
)
def test_without_attention_dp_an_engines_word_dispatches_nothing_and_keeps_its_ladder(moetune, word, ladder):
    regime = _regime(moetune, *QWEN, "--ep", "8", "--no-dp", "--dispatch", word)
    assert regime == Regime(ep_size=8, attention_dp=False, dispatch="none", ladder=ladder)


def test_an_engines_word_knows_the_size_of_the_deployment(moetune):
    assert _regime(moetune, *QWEN, "--ep", "8", "--dispatch", "trtllm:attention_dp").ladder.divisor == 8
    assert _regime(moetune, *QWEN, "--ep", "6", "--dispatch", "vllm:allgather_reducescatter").uneven_shards


@pytest.mark.parametrize(
    ("value", "distribution"), [("balanced", "balanced"), ("random", "random"), ("BALANCED", "balanced")]
)
def test_the_variable_gives_the_default_distribution(moetune, monkeypatch, value, distribution):
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, value)
    regime = _regime(moetune, *QWEN, "--ladder", "8")
    assert regime.distribution == distribution
    assert regime == Regime(ladder="8", distribution=distribution)


def test_an_option_beats_the_variable(moetune, monkeypatch):
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "balanced")
    assert _regime(moetune, *QWEN, "--ladder", "8", "--distribution", "random").distribution == "random"


def test_another_value_of_the_variable_is_refused_with_the_values(moetune, monkeypatch):
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "foo")
    _refused(moetune("plan", *QWEN), DISTRIBUTION_VARIABLE, "'foo'", "balanced, random")


def test_an_engines_launch_line_stands_for_the_options(moetune):
    line = "vllm serve Qwen/Qwen3-30B-A3B -dp 8 --enable-expert-parallel --all2all-backend deepep_high_throughput"
    expected = Regime(ep_size=8, attention_dp=True, dispatch="alltoall", layout="deduplicated", ladder="adaptive")
    assert _regime(moetune, "--launch", line) == expected
    assert _regime(moetune, "--launch", line, "--ep", "4", "--ladder", "8,16").ep_size == 4


def test_a_launch_line_that_cannot_be_read_is_refused(moetune):
    _refused(moetune("plan", "--launch", "make coffee"), "finds no server in 'make coffee'", "vllm serve")
    _refused(moetune("plan", "--launch", "vllm serve nobody/nothing"), "'nobody/nothing'", "Give --model")


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("ep", "ep_size"),
        ("tp", "tp_size"),
        ("redundant_experts", "redundant_experts"),
        ("seed", "seed"),
        ("tune_max_num_tokens", "tune_max_num_tokens"),
    ],
)
def test_the_help_shows_the_regimes_own_defaults(option, field):
    """It names them without building a model, which takes longer than the help may."""
    (described,) = (parameter.help for parameter in plan.params if parameter.name == option)
    of_line = "" if option == "seed" else "from --launch, otherwise "
    assert f"[default: {of_line}{Regime.model_fields[field].default}]" in described


def test_the_words_are_those_of_their_types():
    assert get_args(words.Dispatch) == words.DISPATCHES
    assert get_args(words.Layout) == words.LAYOUTS
    assert get_args(words.Strategy) == words.STRATEGIES


SIZES = ("--experts", "64", "--top-k", "6", "--hidden", "2048", "--intermediate", "1024")


def test_a_layer_may_be_given_by_its_sizes(moetune):
    document = json.loads(moetune("plan", "--json", *SIZES, "--ep", "8").stdout)
    sizes = [document["layer"][name] for name in ("num_experts", "top_k", "hidden_size", "intermediate_size")]
    assert sizes == [64, 6, 2048, 1024]
    assert (document["layer"]["name"], document["layer"]["precision"]) == ("custom", "bf16")
    assert document["num_local_experts"] == 8


def test_sizes_beside_a_model_replace_its_own(moetune):
    layer = json.loads(moetune("plan", "--json", *QWEN, "--intermediate", "384").stdout)["layer"]
    assert (layer["num_experts"], layer["intermediate_size"]) == (128, 384)


def test_a_missing_size_is_named(moetune):
    result = moetune("plan", "--experts", "64", "--top-k", "6", "--hidden", "2048")
    _refused(result, "--experts, --top-k, --hidden given without --model", "--intermediate")


REPLICAS = ("--model", "deepseek-r1", "--ep", "8", "--redundant-experts", "32", "--dispatch", "allgather")


@pytest.mark.parametrize(
    ("words", "rank", "slots"),
    [((), 1, 576), (("--rank", "mean"), 1, 576), (("--rank", "fullest"), 1, 576), (("--rank", "0"), 0, 320)],
)
def test_the_rank_that_is_tuned_has_the_load_nearest_the_mean_or_is_the_one_given(moetune, words, rank, slots):
    document = json.loads(moetune("plan", "--json", *REPLICAS, *words, "--ladder", "512").stdout)
    (bucket,) = document["buckets"]
    assert (document["rank"], document["regime"].get("rank", 0)) == (rank, rank)
    assert bucket["local_slots"] == pytest.approx(slots, abs=0.5)


def test_uneven_shards_are_tuned_for_the_fullest_rank(moetune):
    words = ("--model", "gpt-oss-20b", "--ep", "5", "--dispatch", "vllm:allgather_reducescatter")
    assert json.loads(moetune("plan", "--json", *words).stdout)["num_local_experts"] == 7


@pytest.mark.parametrize("command", ["plan", "tune", "show"])
@pytest.mark.parametrize(("word", "said"), [("most", "mean, fullest or a number"), ("8", "rank must be 0 … 7")])
def test_no_such_rank_is_refused_in_every_command(moetune, command, word, said):
    _refused(moetune(command, *QWEN, "--ep", "8", "--rank", word), said)


def test_a_rank_is_in_the_key_of_what_is_tuned():
    assert request_of("deepseek-r1", ep=8, redundant_experts=32, dispatch="allgather").regime.rank == 1
    assert request_of("deepseek-r1", ep=8, redundant_experts=32, dispatch="allgather", rank="0").regime.rank == 0
    assert request_of("deepseek-r1", ep=8, dispatch="allgather", rank="5").regime.rank == 0, "all ranks are alike"


def test_a_bare_dp_is_said_to_be_no_load_of_vllm_or_sglang_before_anything_runs(moetune):
    result = moetune("plan", *QWEN, "--ep", "8", "--dp")
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: --dp alone")]
    assert "trtllm:attention_dp" in note
    assert "No dispatcher of vLLM or SGLang produces such rows" in note
    assert "--dp alone" not in moetune("plan", *QWEN, "--ep", "8", "--dispatch", "vllm:allgather_reducescatter").stderr


def test_kernels_that_the_engine_prefers_are_said_before_anything_runs(moetune):
    words = ("--model", "deepseek-r1", "--ep", "8", "--dispatch", "vllm:allgather_reducescatter")
    result = moetune("plan", *words, "--backend", "triton")
    assert "note: for fp8_block experts at EP 8 on Hopper, vLLM prefers" in result.stderr
    assert "--moe-backend triton" in result.stderr


def test_a_line_that_starts_these_kernels_itself_needs_no_note(moetune):
    line = "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep"
    assert "vLLM prefers" not in moetune("plan", "--launch", f"{line} --moe-backend triton").stderr
    assert "vLLM prefers" in moetune("plan", "--launch", line, "--backend", "triton").stderr


def test_warnings_of_a_launch_line_are_said(moetune):
    result = moetune("plan", "--launch", "vllm serve Qwen/Qwen3-30B-A3B -dp 8 -ep --gremlins 3")
    assert result.exit_code == 0
    assert "warning: vllm serve has no flag --gremlins (vLLM 0.33.0). It is ignored." in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "docker run vllm/vllm-openai-rocm:latest Qwen/Qwen3-30B-A3B",
        "docker run --device=/dev/kfd vllm/vllm-openai Qwen/Qwen3-30B-A3B",
        "docker run vllm/vllm-openai-cpu:latest-x86_64 --model Qwen/Qwen3-30B-A3B",
        "export TPU_BACKEND_TYPE=jax; vllm serve Qwen/Qwen3-30B-A3B",
    ],
)
def test_a_device_without_cuda_is_said(moetune, line):
    assert "means a device without CUDA" in moetune("plan", "--launch", line).stderr


def test_a_typo_in_a_deciding_flag_is_an_error_with_the_nearest_one(moetune):
    result = moetune("plan", "--launch", "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-paralel > log")
    _refused(result, "no flag --enable-expert-paralel", "The nearest is --enable-expert-parallel")


def test_slots_of_other_ranks_are_zeros_where_sglang_reads_the_table():
    def remote(**asked):
        return request_of("qwen3-30b-a3b", ep=8, backend="triton", **asked).backend.environment()["remote"]

    assert remote(dispatch="sglang:none") == "zero"
    assert remote(dispatch="sglang:none", remote="drop") == "drop"
    assert remote(dispatch="vllm:allgather_reducescatter") == "drop"


@pytest.mark.parametrize("sizes", [(), ("--top-k", "4")])
def test_what_a_config_says_beside_its_layer_is_said(moetune, tiny, sizes):
    result = moetune("plan", "--json", "--model", tiny(torch_dtype="float8_e4m3fn"), *sizes)
    assert result.exit_code == 0
    assert result.stderr.count("warning: ") == 1
    assert "vLLM loads it as bf16 (--precision bf16)" in result.stderr


def test_layers_that_differ_from_most_are_said(moetune, tiny):
    quantization = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.3.mlp.experts"],
    }
    path = tiny(num_hidden_layers=4, quantization_config=quantization)
    result = moetune("plan", "--json", "--launch", f"vllm serve {path.parent}")
    assert json.loads(result.stdout)["layer"]["precision"] == "fp8_block"
    assert "the experts of 1 of 4 layers are bf16" in result.stderr


@pytest.mark.parametrize("command", ["plan", "tune"])
@pytest.mark.parametrize("model", ["deepseek-r1", "DeepSeek-R1", "Qwen/Qwen3-235B-A22B"])
@pytest.mark.parametrize("more", [(), ("--ep", "8", "--dispatch", "none")])
def test_the_name_of_a_model_as_an_argument_leads_to_the_option(moetune, command, model, more):
    refused = moetune(command, *more, model)
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"error: {model} is the name of a model. Give --model {model} and the deployment, as in "
        f"`moetune {command} --help`.\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "pigeon"), "Got unexpected extra argument (pigeon)"),
        (("tune", *QWEN, "deepseek-r1", "8"), "Got unexpected extra arguments (deepseek-r1 8)"),
        (("show", "a.json", "b.json"), "Got unexpected extra argument (b.json)"),
    ],
)
def test_any_other_argument_too_many_is_named(moetune, words, said):
    refused = moetune(*words)
    assert (refused.exit_code, refused.stderr) == (2, f"error: {said} See `moetune {words[0]} --help`.\n")


@pytest.mark.parametrize("command", ["show", "export"])
def test_the_name_of_a_model_as_a_profile_leads_to_the_option(moetune, tmp_path, command):
    words = ("--to", "vllm", "--out", tmp_path) if command == "export" else ()
    refused = moetune(command, "deepseek-r1", *words)
    assert refused.exit_code == 2
    assert "it is the name of a model. Give --model deepseek-r1" in refused.stderr


def test_a_skew_that_is_missed_is_a_warning_unless_it_is_strict(moetune):
    words = ("plan", *QWEN, "--ladder", "64", "--json")
    missed = moetune(*words, "--distribution", "zipf:3")
    assert missed.exit_code == 0
    assert missed.stderr.startswith("warning: zipf:3 asks for 1.4")
    assert json.loads(missed.stdout)["skew"]["effective_experts"] == pytest.approx(8.0)
    reached = moetune(*words, "--distribution", "ddist:2", "--strict-skew")
    assert (reached.exit_code, reached.stderr) == (0, "")
    assert json.loads(reached.stdout)["skew"]["asked_effective_experts"] == 64.0


def test_the_variable_may_be_a_skew(moetune, monkeypatch):
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "DDIST_1.5")
    assert _regime(moetune, *QWEN, "--ladder", "64").distribution == "ddist:1.5"

"""Which tuned file of an engine a layer has on a GPU, which of its rows is the default, and which cannot run."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import H200 as MACHINE

from moetune.backends.grouped_triton import shipped, space
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.defaults import default_config, sglang_default_config
from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.backends.grouped_triton.shipped import EngineConfigs, runnable
from moetune.backends.grouped_triton.space import Limits, Shapes, tactic_of
from moetune.errors import UsageError
from moetune.inputs.presets import layer as preset
from moetune.spec.regime import Regime

H200 = Limits((9, 0), 232448, 255, 65536)
LAYER, REGIME = preset("qwen3-30b-a3b"), Regime()
VLLM_NAME = "E=128,N=768,device_name=NVIDIA_H200.json"
FP8_LAYER, FP8_REGIME = preset("deepseek-r1"), Regime(tp_size=8)
FP8_SHAPES = Shapes.of(FP8_LAYER, FP8_REGIME, 64)
BF16_SHAPES = Shapes.of(LAYER, REGIME, 64)
ROW = dict(zip(space.VALUES, (16, 64, 128, 16, 4, 3), strict=True))
WIDE = {**ROW, "BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128}


@pytest.fixture(autouse=True)
def on_an_h200(monkeypatch):
    monkeypatch.setattr(shipped, "device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(space.Limits, "of", classmethod(lambda cls, device: H200))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Returns a function that writes an installed package of an engine with some files, and its version."""

    def installed(engine, files, version="1.2.3", folder=0):
        root = tmp_path / "site"
        configs = root / engine / shipped.FOLDERS[engine][folder]
        configs.mkdir(parents=True, exist_ok=True)
        (root / engine / "__init__.py").write_text("raise AssertionError('the engine was imported')")
        if version:
            (root / f"{engine}-{version}.dist-info").mkdir()
            (root / f"{engine}-{version}.dist-info" / "METADATA").write_text(f"Name: {engine}\nVersion: {version}\n")
        written(configs, files)
        monkeypatch.syspath_prepend(root)
        return configs

    return installed


def written(folder, files):
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return folder


def test_the_installed_engine_s_row_is_the_default_and_a_candidate(install):
    install("vllm", {VLLM_NAME: {"triton_version": "3.5.0", "1": ROW, "64": WIDE}})
    backend = TritonBackend()
    found = backend.explained_default(LAYER, REGIME, 100)
    assert found.tactic == backend.default(LAYER, REGIME, 100) == tactic_of(*WIDE.values())
    assert (found.source, found.warning) == (f"shipped file {VLLM_NAME} of vllm 1.2.3", "")
    assert found.hint == (
        f"It is row 64 of shipped file {VLLM_NAME} of vllm 1.2.3. To compare with vLLM's heuristic instead, give an "
        "empty folder as --engine-configs."
    )
    assert backend.candidates(LAYER, REGIME, 100, "cuda").tactics[0] == found.tactic
    assert backend.default(LAYER, REGIME, 2) == tactic_of(*ROW.values())
    assert "vllm" not in sys.modules


@pytest.mark.parametrize("values", [(16, 16, 32, 4, 2, 1), (8, 64, 128, 2, 1, 7), (32, 64, 64, 8, 16, 6)])
def test_a_row_that_is_none_of_the_1920_is_the_first_candidate(tmp_path, values):
    name = ConfigFile.of(FP8_LAYER, FP8_REGIME, "NVIDIA H200", 256).vllm_name
    backend = TritonBackend(engine_configs=written(tmp_path, {name: {"1": dict(zip(ROW, values, strict=True))}}))
    found = backend.candidates(FP8_LAYER, FP8_REGIME, 64, "cuda")
    assert found.tactics[0] == tactic_of(*values) == backend.default(FP8_LAYER, FP8_REGIME, 64)
    assert len(found.tactics) + len(found.excluded) == 1921
    predicted = space.predicted_us(found.tactics[:2], FP8_SHAPES, [[2] * 256], MACHINE, H200.capability)
    assert all(0 < time_us < 1e5 for time_us in predicted.values())


@pytest.mark.parametrize(
    ("rows", "key"),
    [(1, 1), (2, 1), (3, 3), (5, 4), (6, 8), (7, 8), (10_000, 8)],
)
def test_the_nearest_key_of_the_file_s_order_is_looked_up(tmp_path, rows, key):
    """2 is as near to 1 as to 3 (the first key stands first); 6 is as near to 8 as to 4, and 8 stands before 4."""
    configs = EngineConfigs.of("vllm", written(tmp_path, {VLLM_NAME: dict.fromkeys(("1", "8", "4", "3"), ROW)}))
    found = configs.row(ConfigFile.of(LAYER, REGIME, "NVIDIA H200", 128), rows, "3.6.0")
    assert found is not None
    assert found.key == key


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=18, unique=True), st.integers(1, 9000))
def test_the_key_is_the_one_of_the_engines_expression(tmp_path_factory, keys, rows):
    folder = written(tmp_path_factory.mktemp("configs"), {VLLM_NAME: {str(key): ROW for key in keys}})
    found = EngineConfigs.of("vllm", folder).row(ConfigFile.of(LAYER, REGIME, "NVIDIA H200", 128), rows, "3.6.0")
    assert found is not None
    assert found.key == min(keys, key=lambda x: abs(x - rows))


def test_the_file_is_that_of_the_measured_rank_s_experts(tmp_path):
    uneven = Regime(ep_size=3, uneven_shards=True, rank=2)
    names = {experts: VLLM_NAME.replace("E=128", f"E={experts}") for experts in (42, 43)}
    written(tmp_path, {names[42]: {"1": ROW}, names[43]: {"1": WIDE}})
    assert TritonBackend(engine_configs=tmp_path).default(LAYER, uneven, 64) == tactic_of(*ROW.values())


@pytest.mark.parametrize(
    ("kernel", "heuristic"), [("builtin", default_config), ("vllm", default_config), ("sglang", sglang_default_config)]
)
def test_without_a_file_the_default_is_the_heuristic(install, tmp_path, kernel, heuristic):
    engine = "sglang" if kernel == "sglang" else "vllm"
    expected = heuristic(64, 128, False)
    absent = TritonBackend(kernel).explained_default(LAYER, REGIME, 64)
    assert (absent.tactic, absent.source) == (expected, f"heuristic ({engine} is not installed)")
    install(engine, {"E=8,N=768,device_name=NVIDIA_H200.json": {"1": ROW}}, version="")
    other = TritonBackend(kernel).explained_default(LAYER, REGIME, 64)
    assert (other.tactic, other.source) == (expected, f"heuristic ({engine} of unknown version ships no {VLLM_NAME})")
    given = TritonBackend(kernel, engine_configs=tmp_path).explained_default(LAYER, REGIME, 64)
    assert (given.tactic, given.source) == (expected, f"heuristic (no {VLLM_NAME} in {tmp_path})")


def test_without_a_gpu_the_default_is_the_heuristic(install, monkeypatch):
    install("vllm", {VLLM_NAME: {"1": ROW}})
    monkeypatch.setattr(shipped, "device_name", lambda: None)
    found = TritonBackend().explained_default(LAYER, REGIME, 64)
    assert (found.tactic, found.source) == (default_config(64, 128, False), "heuristic")


def test_a_given_folder_wins_over_the_installed_engine(install, tmp_path):
    install("vllm", {VLLM_NAME: {"1": ROW}})
    own = written(tmp_path / "own", {f"configs/{VLLM_NAME}": {"1": WIDE}})
    for folder in (own, own / "configs"):
        found = TritonBackend(engine_configs=str(folder)).explained_default(LAYER, REGIME, 64)
        assert (found.tactic, found.source) == (tactic_of(*WIDE.values()), f"file {VLLM_NAME} in {folder}")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert TritonBackend(engine_configs=empty).default(LAYER, REGIME, 64) == default_config(64, 128, False)


def test_a_given_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--engine-configs must be a folder, given '.*absent'"):
        TritonBackend(engine_configs=tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "it is no JSON object"),
        ('{"1": 7}', "its row 1 is no JSON object"),
        ('{"rows": {}}', "invalid literal for int"),
        ("\udcff", ""),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, text, said):
    (tmp_path / VLLM_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError) as refused:
        TritonBackend(engine_configs=tmp_path).default(LAYER, REGIME, 64)
    assert str(tmp_path / VLLM_NAME) in refused.value.message
    assert said in refused.value.message
    assert "--engine-configs" in refused.value.hint


def test_a_key_of_triton_s_version_is_vllm_s_alone(tmp_path):
    rows = {"triton_version": "3.6.0", "1": ROW}
    written(tmp_path, {VLLM_NAME: rows, f"triton_3_6_0/{VLLM_NAME}": rows})
    assert TritonBackend(engine_configs=tmp_path).default(LAYER, REGIME, 64) == tactic_of(*ROW.values())
    with pytest.raises(UsageError, match="triton_version"):
        TritonBackend("sglang", engine_configs=tmp_path).default(LAYER, REGIME, 64)


def test_a_file_without_rows_is_ignored_as_the_engines_do(tmp_path):
    written(tmp_path, {VLLM_NAME: {"triton_version": "3.6.0"}})
    assert TritonBackend(engine_configs=tmp_path).default(LAYER, REGIME, 64) == default_config(64, 128, False)


@pytest.mark.parametrize(
    ("running", "folders", "read"),
    [
        ("3.6.0", ("3_5_1", "3_6_0", "3_7_1"), "3_6_0"),
        ("3.6.0+git1", ("3_6_0", "3_6_0+git1", "3_7_1"), "3_6_0+git1"),
        ("3.6.0", ("3_5_1", "3_10_0", "3_9_0"), "3_10_0"),
    ],
)
def test_sglang_reads_the_folder_of_its_triton_else_the_newest(tmp_path, running, folders, read):
    written(tmp_path, {f"triton_{folder}/{VLLM_NAME}": {"1": ROW} for folder in folders})
    found = EngineConfigs.of("sglang", tmp_path).row(ConfigFile.of(LAYER, REGIME, "NVIDIA H200", 128), 64, running)
    assert found is not None
    assert found.name == f"triton_{read}/{VLLM_NAME}"


def test_sglang_s_older_place_is_found_too(install):
    install("sglang", {f"triton_3_1_0/{VLLM_NAME}": {"1": ROW}}, folder=1)
    found = TritonBackend("sglang").explained_default(LAYER, REGIME, 64)
    assert found.source == f"shipped file triton_3_1_0/{VLLM_NAME} of sglang 1.2.3"
    assert found.tactic == tactic_of(*ROW.values())


@pytest.mark.parametrize(
    ("down", "warned"),
    [
        ({**ROW, "BLOCK_SIZE_M": 128, "USE_TMA": False}, False),  # runs as the first one's: SGLang shares BLOCK_SIZE_M
        ({**ROW, "num_stages": 4}, True),
        ({**ROW, "USE_TMA": True}, True),
    ],
)
def test_a_second_gemm_with_a_row_of_its_own_is_warned_of(tmp_path, down, warned):
    down_name = VLLM_NAME.replace(".json", "_down.json")
    written(tmp_path, {f"triton_3_6_0/{VLLM_NAME}": {"1": ROW}, f"triton_3_7_1/{down_name}": {"1": down}})
    found = TritonBackend("sglang", engine_configs=tmp_path).explained_default(LAYER, REGIME, 64)
    named = f"file triton_3_6_0/{VLLM_NAME} in {tmp_path}"
    assert found.tactic == tactic_of(*ROW.values())
    assert found.source == (f"{named}, for both GEMMs" if warned else named)
    assert (f"SGLang runs the second GEMM by triton_3_7_1/{down_name}" in found.warning) is warned
    assert found.hint.startswith(f"It is row 1 of {named}. To compare with SGLang's heuristic")


def test_a_row_that_cannot_run_is_named_and_the_heuristic_is_the_default(tmp_path):
    written(tmp_path, {f"triton_3_6_0/{VLLM_NAME}": {"1": ROW, "128": {**WIDE, "USE_TMA": True}}})
    backend = TritonBackend("sglang", engine_configs=tmp_path)
    found = backend.explained_default(LAYER, REGIME, 300)
    named = f"file triton_3_6_0/{VLLM_NAME} in {tmp_path}"
    assert found.tactic == sglang_default_config(300, 128, False)
    assert found.source == f"heuristic (a row of {named} cannot run)"
    assert found.warning.startswith(f"moetune's kernel cannot run row 128 of {named}: USE_TMA is true.")
    assert found.hint == ""
    assert backend.explained_default(LAYER, REGIME, 1).warning == ""


@pytest.mark.parametrize(
    ("engine", "changed", "expected"),
    [
        ("vllm", {}, None),
        ("vllm", {"SPLIT_K": 4}, None),  # vLLM sets it to 1 itself
        ("sglang", {"SPLIT_K": 1}, "SPLIT_K is 1"),  # no argument of SGLang's kernel
        ("vllm", {"num_ctas": 1}, None),
        ("vllm", {"num_ctas": 2}, "num_ctas is 2"),
        ("sglang", {"USE_TMA": False}, None),
        ("vllm", {"USE_TMA": False}, "USE_TMA is false"),  # no argument of vLLM's kernel
        ("vllm", {"waves_per_eu": 0, "kpack": 2}, "waves_per_eu is 0, kpack is 2"),
        ("vllm", {"SWAP_AB": True}, "SWAP_AB is true"),  # the launch passes it already
        ("vllm", {"BLOCK_SIZE_M": 48}, "BLOCK_SIZE_M is 48"),
        ("vllm", {"BLOCK_SIZE_M": 512}, "BLOCK_SIZE_M is 512, the largest is 256"),
        ("vllm", {"num_stages": 0}, "num_stages is 0"),
        ("vllm", {"num_warps": True}, "num_warps is true"),
        ("vllm", {"GROUP_SIZE_M": "8"}, 'GROUP_SIZE_M is "8"'),
        ("vllm", {"BLOCK_SIZE_M": 256, "BLOCK_SIZE_N": 256, "num_stages": 5}, "it needs 655360 bytes of shared memory"),
    ],
)
def test_what_a_row_s_keys_mean(engine, changed, expected):
    found = runnable({**ROW, **changed}, engine, BF16_SHAPES, H200)
    if expected is None:
        assert found == tactic_of(*ROW.values())
    else:
        assert isinstance(found, str)
        assert found.startswith(expected)


def test_a_row_without_warps_and_stages_has_triton_s_own():
    blocks = {name: ROW[name] for name in list(ROW)[:4]}
    assert runnable(blocks, "sglang", BF16_SHAPES, None) == tactic_of(*blocks.values(), 4, 3)
    assert runnable({"num_warps": 8}, "vllm", BF16_SHAPES, None) == ", ".join(list(ROW)[:4]) + " is missing"


def test_block_size_k_past_the_scale_block_is_clamped_by_vllm_and_wrong_in_sglang():
    deep = {**ROW, "BLOCK_SIZE_K": 256}
    assert runnable(deep, "vllm", FP8_SHAPES, H200) == tactic_of(*ROW.values())
    assert runnable(deep, "sglang", FP8_SHAPES, H200) == "BLOCK_SIZE_K is 256, which exceeds the scale block of 128"
    assert runnable(deep, "sglang", BF16_SHAPES, H200) == tactic_of(*deep.values())


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_file_of_the_real_engine_for_an_nvidia_gpu_is_read(engine, engine_sources):
    """Every row of a file that this backend can ask for is a tactic, but for SGLang's rows with TMA or too deep."""
    folder = engine_sources(engine) / engine / shipped.FOLDERS[engine][0]
    paths = [path for path in sorted(folder.rglob("E=*NVIDIA*.json")) if "_down" not in path.name]
    kinds = {"": BF16_SHAPES, "dtype=fp8_w8a8,block_shape=[128,128]": FP8_SHAPES}
    reasons = []
    read = 0
    for path in paths:
        device, _, kind = path.name.replace(" ", "").removesuffix(".json").partition("device_name=")[2].partition(",")
        if kind in kinds:
            rows = shipped.read_rows(path, has_triton_version=engine == "vllm")
            assert rows
            limits = H200 if device in ("NVIDIA_H200", "NVIDIA_H100_80GB_HBM3") else None
            found = [runnable(row, engine, kinds[kind], limits) for row in rows.values()]
            reasons += [reason for reason in found if isinstance(reason, str)]
            read += len(found)
    assert read > 500
    allowed = {
        "vllm": set(),
        "sglang": {"USE_TMA is true", "BLOCK_SIZE_K is 256, which exceeds the scale block of 128"},
    }
    assert set(reasons) == allowed[engine]

import io
from pathlib import Path

from rich.console import Console
from shown import LAYER, PROFILES, cut, made_choice, made_profile, printed, rows_of

from moetune.backends.registry import Diagnosis
from moetune.inputs import presets
from moetune.report.lists import backends_table, models_table, store_table
from moetune.store.profile import Profile


def test_models_backends_and_the_store_have_a_row_for_each(tmp_path):
    models = [(LAYER, "https://example.org/a")]
    assert rows_of(printed(models_table(models)))[3] == "small 16 4 64 32 bf16 softmax https://example.org/a"
    assert rows_of(printed(models_table(models, addresses=False)))[3] == "small 16 4 64 32 bf16 softmax"
    backends = backends_table([Diagnosis("a", True), Diagnosis("b", False, "no GPU", "Rent one")])
    assert rows_of(printed(backends))[3:] == ["a yes", "b no no GPU", "Rent one"]
    stored = [(tmp_path / "x" / "p.json", made_profile(made_choice(8, 60.0)))]
    row = "small ep4-tp1-dp-alltoall-packed-random 8,64,4096 torch Example GPU 1/3 2026-01-31"
    assert rows_of(printed(store_table(stored, tmp_path)))[2] == f"{row} x/p.json"
    folded = ["small ep4-tp1-dp-alltoall- torch Example GPU 1/3 2026-01-31", "packed-random,", "8,64,4096"]
    assert rows_of(printed(store_table(stored, tmp_path, files=False)))[2:] == folded


def test_an_address_without_a_column_is_a_link(tmp_path):
    text = io.StringIO()
    out = Console(file=text, force_terminal=True, width=100)
    out.print(models_table([(LAYER, "https://example.org/a")], addresses=False))
    out.print(store_table([(tmp_path / "p.json", made_profile(made_choice(8, 60.0)))], tmp_path, files=False))
    assert "https://example.org/a" in text.getvalue()
    assert (tmp_path / "p.json").as_uri() in text.getvalue()


def test_there_are_packaged_profiles_to_look_at():
    assert len(PROFILES) >= 30


def test_a_regime_is_broken_at_its_hyphens(tmp_path):
    stored = [(tmp_path / "p.json", made_profile(made_choice(8, 60.0), backend="flashinfer-trtllm-routed"))]
    lines = printed(store_table(stored, tmp_path, files=False), width=80).splitlines()
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["small", "ep4-tp1-dp-alltoall-", "flashinfer-trtllm-"],
        ["packed-random,", "routed", "GPU"],
    ]


def test_lists_are_not_cut_at_80_columns():
    stored = [(path, Profile.model_validate_json(path.read_text())) for path in PROFILES]
    models = [(presets.layer(name), presets.source(name).url) for name in presets.names()]
    reason = Diagnosis("flashinfer-trtllm-routed", False, "needs " + "compute capability 10.0 or 10.3 " * 4, "Rent one")
    tables = [store_table(stored, Path("/"), files=False), models_table(models, addresses=False)]
    assert cut([*tables, backends_table([reason])]) == []


def test_the_store_lists_the_ladder_and_triton(tmp_path):
    profile = made_profile(made_choice(8, 60.0), backend="triton", triton="3.6.0")
    piped = rows_of(printed(store_table([(tmp_path / "p.json", profile)], tmp_path)))
    assert piped[0].split() == [
        "layer",
        "regime",
        "ladder",
        "backend",
        "triton",
        "device",
        "buckets",
        "measured",
        "file",
    ]
    assert " 8,64,4096 triton 3.6.0 Example GPU " in piped[2]
    shown = rows_of(printed(store_table([(tmp_path / "p.json", profile)], tmp_path, files=False)))
    assert " triton 3.6.0 " in shown[2]
    assert shown[-1] == "8,64,4096"


def test_narrow_lists_leave_out_whole_columns_and_say_which():
    stored = [(path, Profile.model_validate_json(path.read_text())) for path in PROFILES]
    models = [(presets.layer(name), presets.source(name).url) for name in presets.names()]
    for width in (60, 70, 80):
        store = printed(store_table(stored, Path("/"), files=False), width=width)
        known = printed(models_table(models, addresses=False), width=width)
        assert "…" not in store + known
        assert max(map(len, [*store.splitlines(), *known.splitlines()])) <= width
        assert "NVIDIA" in store
    shown = " ".join(printed(store_table(stored, Path("/"), files=False), width=62).split())
    assert shown.endswith("left out at this width: measured, buckets; a pipe and --json have all")
    assert "left out at this width: routing, intermediate;" in printed(models_table(models, addresses=False), width=60)

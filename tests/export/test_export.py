import hashlib
import json
import subprocess
import sys

import pytest
from processes import GIVE_UP_S
from triton_profiles import profile, tactic

import moetune
from moetune.errors import NoResultError, UsageError
from moetune.export import export, exporter, targets
from moetune.spec.layer import MoELayer

SLUG = "ep8-tp1-dp-allgather-random"


def test_everything_lies_in_the_folder_of_the_regime():
    files = export(profile(), "vllm").files
    name = "E=32,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128]"
    assert set(files) == {f"{SLUG}/{name}.json", f"{SLUG}/README.vllm.md", f"{SLUG}/{name}.vllm.moetune.json"}


def test_the_provenance_says_where_the_files_come_from():
    stored = profile(ep_size=8, layout="packed")
    exported = export(stored, "sglang", source="/store/p.json", command="moetune export /store/p.json --to sglang")
    (sidecar,) = (json.loads(text) for path, text in exported.files.items() if path.endswith(".moetune.json"))
    assert sidecar["moetune"] == moetune.__version__
    assert sidecar["command"] == "moetune export /store/p.json --to sglang"
    assert sidecar["profile"]["path"] == "/store/p.json"
    assert sidecar["profile"]["sha256"] == hashlib.sha256(stored.model_dump_json(indent=1).encode()).hexdigest()
    assert sidecar["regime"]["digest"] == stored.regime.digest
    assert sidecar["environment"] == stored.environment.model_dump(mode="json")
    assert [f"ep8-tp1-dp-alltoall-packed-random/{file}" in exported.files for file in sidecar["files"]] == [True]
    assert tuple(sidecar["warnings"]) == exported.warnings != ()
    assert tuple(sidecar["notes"]) == exported.notes != ()


def test_another_choice_gives_another_digest():
    def digest(stored):
        files = export(stored, "vllm").files
        return next(json.loads(text) for path, text in files.items() if "moetune.json" in path)["profile"]["sha256"]

    one, other = ({1: tactic(16, 32, 64, 1, 4, stages)} for stages in (2, 3))
    assert digest(profile(tactics=one)) == digest(profile(tactics=one)) != digest(profile(tactics=other))


@pytest.mark.parametrize(
    ("target", "line"),
    [("vllm", "VLLM_TUNED_CONFIG_FOLDER=/path/to/"), ("sglang", "SGLANG_MOE_CONFIG_DIR=/path/to/")],
)
def test_the_readme_names_the_variable_and_is_the_same_for_every_layer(target, line):
    readmes = [
        export(profile(layer), target).files[f"{SLUG}/README.{target}.md"] for layer in ("deepseek-r1", "qwen3-30b-a3b")
    ]
    assert f"{line}{SLUG}" in readmes[0]
    assert readmes[0] == readmes[1]


def test_several_engines_share_a_folder():
    vllm, sglang = (export(profile("qwen3-30b-a3b"), target).files for target in ("vllm", "sglang"))
    assert not vllm.keys() & sglang.keys()


def test_an_empty_profile_and_an_unknown_engine_are_refused():
    with pytest.raises(NoResultError, match="no choice to export"):
        export(profile().model_copy(update={"choices": ()}), "vllm")
    with pytest.raises(UsageError, match=r"Cannot export to 'ollama'.* vllm, sglang"):
        exporter("ollama")


def test_no_torch_is_needed():
    code = "import sys; from moetune.export import exporter; exporter('vllm'); exporter('sglang')"
    assert {"vllm", "sglang"} <= set(targets())
    checked = f"{code}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", checked], timeout=GIVE_UP_S).returncode == 0


def test_a_custom_layer_is_exported_by_its_shape():
    layer = MoELayer(num_experts=24, top_k=2, hidden_size=256, intermediate_size=512)
    stored = profile(layer, {8: tactic(16, 32, 64, 1, 4, 2)}, ep_size=8, tp_size=2)
    assert "ep8-tp2-nodp-none-random/E=3,N=256,device_name=NVIDIA_H200.json" in export(stored, "vllm").files

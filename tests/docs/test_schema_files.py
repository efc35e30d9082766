import json

import pytest
from click.testing import CliRunner
from pages import ROOT
from schema_files import ExportDocument, schemas

from moetune.cli.main import main
from moetune.spec.regime import Regime
from moetune.store.profile import Profile

FOLDER = ROOT / "docs" / "schemas"
PACKAGED = sorted((ROOT / "profiles").rglob("*.json"))


def test_the_files_are_what_the_models_say():
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert written == schemas(), "run: make pages"


def printed(*words):
    """The JSON document that a command prints."""
    return json.loads(CliRunner().invoke(main, [*map(str, words), "--json"]).stdout)


def fields(name, model=None):
    schema = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    found = schema["$defs"][model] if model else schema
    return set(found["properties"]), set(found.get("required", ()))


@pytest.mark.parametrize("path", PACKAGED[::7], ids=lambda path: path.parent.name)
def test_a_packaged_profile_has_the_schemas_fields(path):
    profile = json.loads(path.read_text(encoding="utf-8"))
    for document, (known, required) in (
        (profile, fields("profile")),
        (profile["layer"], fields("profile", "MoELayer")),
        (profile["regime"], fields("profile", "Regime")),
        *((choice, fields("profile", "Choice")) for choice in profile["choices"]),
    ):
        assert required <= set(document) <= known


def test_a_plan_has_the_schemas_fields():
    plan = printed("plan", "--model", "qwen3-30b-a3b", "--ep", "4", "--ladder", "8")
    known, required = fields("plan")
    assert required <= set(plan) <= known
    known, required = fields("plan", "BucketPlan")
    assert required <= set(plan["buckets"][0]) <= known


def test_an_exports_document_fits_its_model(tmp_path):
    profile = next(path for path in PACKAGED if "ep8-tp1-dp-allgather" in str(path))
    document = ExportDocument.model_validate(printed("export", profile, "--to", "vllm", "--out", tmp_path))
    assert document.files[0].state == "written"


def test_a_look_up_has_the_schemas_fields(tmp_path):
    line = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel"
    found = printed("lookup", "--launch", line, "--folder", tmp_path, "--device-name", "NVIDIA H200")
    known, required = fields("lookup")
    assert required <= set(found) <= known
    known, required = fields("lookup", "Table")
    assert required <= set(found["tables"][0]) <= known


def test_an_infinite_time_and_a_regimes_fields_are_described():
    choice = json.loads((FOLDER / "profile.json").read_text(encoding="utf-8"))["$defs"]["Choice"]
    assert {"const": "Infinity"} in choice["properties"]["stress_us"]["additionalProperties"]["anyOf"]
    assert fields("profile", "Regime")[0] == set(Regime.model_fields)
    assert fields("profile")[0] == set(Profile.model_fields)

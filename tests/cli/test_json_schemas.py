from dataclasses import fields
from pathlib import Path

import pytest

from moetune.backends.registry import Diagnosis
from moetune.dep_bench.result import ArmTime, DepBench, PartTime, Point
from moetune.export.engine_log import EngineLog, LoggedFile
from moetune.export.lookup import ChosenKernels, LookedUpRow, Lookup, Table
from moetune.export.near_misses import NearMiss, Part
from moetune.report.page.numbers import Row
from moetune.spec.enums import DISPATCHES, DISTRIBUTIONS, LAYOUTS, Precision
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, ComparedRows, Profile
from moetune.tuning.batch import Batch, BatchJob, BatchQuestion
from moetune.tuning.changes import ChangedBucket, Changes, ComparedProfile, RecordedRows, TimedRows
from moetune.tuning.comparison import BackendResult, ComparedBucket, Comparison
from moetune.tuning.outlook import Kernels, NearestProfile
from moetune.tuning.plan import BucketPlan, Payload, Plan

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "json-schemas.md").read_text(encoding="utf-8")


MODELS = (
    MoELayer, RoutingMethod, Regime, Plan, BucketPlan, Payload, Profile, Choice, Comparison, BackendResult,
    ComparedBucket, ComparedRows, Kernels, NearestProfile, Lookup, ChosenKernels, Table, LookedUpRow, NearMiss, Part,
    EngineLog, LoggedFile, Changes, ChangedBucket, ComparedProfile, RecordedRows, TimedRows,
    Batch, BatchJob, BatchQuestion, DepBench, Point, ArmTime, PartTime,
)  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_documented(model):
    assert not [name for name in model.model_fields if f"`{name}`" not in DOCUMENTED and f'"{name}"' not in DOCUMENTED]


def test_every_column_of_a_report_is_documented():
    assert not [field.name for field in fields(Row) if f"`{field.name}`" not in DOCUMENTED]


def test_every_value_of_an_enumeration_is_documented():
    values = (*Precision, *DISPATCHES, *LAYOUTS, *DISTRIBUTIONS, *Diagnosis._fields)
    assert not [value for value in values if f"`{value}`" not in DOCUMENTED]

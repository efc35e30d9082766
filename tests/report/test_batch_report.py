import pytest
from shown import LAYER, REGIME, cut, printed, rows_of

from moetune.report.batch import answer_line, batch_report
from moetune.tuning.batch import Batch, BatchJob, BatchQuestion

TUNED = {"state": "tuned", "tuned_buckets": 3, "gain": 1.25, "seconds": 95.0}
STORED = {"state": "stored", "stored_buckets": 3, "gain": 1.05}
FAILED = {"state": "failed", "failed": "out of memory", "stored_buckets": 1}


def question(number, **changed):
    return BatchQuestion(number=number, layer=LAYER, regime=REGIME, backend="triton", **changed)


def batch(*questions, jobs=None, **changed):
    jobs = jobs or [BatchJob(number=one.number, words=("a",), questions=(one.number,)) for one in questions]
    given = {
        "file": "jobs.yaml", "devices": ("cuda:0",), "dry_run": False, "estimated_s": 0.0, "estimated_wall_s": 0.0,
        "seconds": 100.0,
    }  # fmt: skip
    return Batch(**{**given, **changed}, jobs=jobs, questions=questions)


def lines(one):
    return rows_of(printed(*batch_report(one)))


def test_each_job_has_a_row_for_each_of_its_questions():
    jobs = [
        BatchJob(number=1, words=("a",), questions=(1, 2)),
        BatchJob(number=2, words=("b",), questions=(1, 3)),
        BatchJob(number=3, words=("--model", "c d"), failed="Unknown model 'c d'."),
    ]
    found = lines(batch(question(1, **TUNED), question(2, **STORED), question(3, **FAILED), jobs=jobs))
    slug = REGIME.slug
    assert f"1 1 small {slug} triton 3 tuned 1.25× 2 min" in found
    assert f"1 2 small {slug} triton 3 stored 1.050× –" in found
    assert f"2 1 small {slug} triton as above" in found
    assert f"2 3 small {slug} triton 1 stored, failed – –" in found
    assert "job 3 failed: Unknown model 'c d'. (--model 'c d')" in found
    assert "question 3 failed: out of memory" in found
    assert found[-1] == "1 of 3 jobs done in 2 min: 3 questions, 1 tuned, 1 stored, 1 failed"


@pytest.mark.parametrize(
    ("questions", "changed", "line"),
    [
        (
            [{"missing_buckets": 10, "estimated_s": 100.0}] * 4,
            {"estimated_s": 400.0},
            "4 questions of 4 jobs: 40 buckets to tune, about 7 min on one device, 2 min on 8, by recorded figures",
        ),
        (
            [{"missing_buckets": 10, "estimated_s": 100.0}] * 4,
            {"estimated_s": 400.0, "devices": ("cuda:0", "cuda:1")},
            "4 questions of 4 jobs: 40 buckets to tune, about 7 min on one device, 3 min on 2, by recorded figures",
        ),
        (
            [{"missing_buckets": 10, "estimated_s": 100.0}, {"missing_buckets": 2}],
            {"estimated_s": 100.0},
            "2 questions of 2 jobs: 12 buckets to tune, about 2 min on one device, 2 min on 8, by recorded figures; "
            "1 question without a recorded figure",
        ),
        (
            [{"missing_buckets": 2}],
            {},
            "1 question of 1 job: 2 buckets to tune; 1 question without a recorded figure",
        ),
        ([{"stored_buckets": 2, "estimated_s": 0.0}], {}, "1 question of 1 job: all buckets are stored"),
    ],
)
def test_a_plan_ends_with_its_cost(questions, changed, line):
    planned = batch(*(question(n, **one) for n, one in enumerate(questions, 1)), dry_run=True, **changed)
    assert lines(planned)[-1] == line


def test_a_plan_has_what_is_stored_and_what_is_missing():
    planned = batch(question(1, stored_buckets=2, missing_buckets=1, gain=1.5, estimated_s=40.0), dry_run=True)
    assert f"1 1 small {REGIME.slug} triton 2 stored, 1 to tune 1.50× ~40 s" in lines(planned)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (TUNED, "3 buckets tuned, 1.25×, 2 min"),
        (STORED, "3 buckets stored, 1.050×"),
        (FAILED, "failed: out of memory"),
    ],
)
def test_an_answer_is_one_line(given, line):
    assert answer_line(question(1, **given)) == line


def test_it_fits_in_80_columns():
    assert not cut(batch_report(batch(question(1, **TUNED), question(2, **FAILED)), narrow=True))

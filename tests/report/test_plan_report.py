import re

from shown import LAYER, REGIME, printed, rows_of

from moetune.report.plan import plan_report, plan_table
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.tuning.plan import plan


def test_a_plan_shows_each_bucket_and_each_way_to_travel():
    planned = plan(LAYER, REGIME, device="cpu")
    text = printed(*plan_report(planned, wire=True))
    assert "rank 0 of 4: experts 0 … 3, 49.2 kB of weights" in text
    assert "in closed form" in text
    assert any(row.startswith("4,096 16,384 4,096 4.0 ") for row in rows_of(text))
    assert any(
        row.startswith("fp4 packed_topk 52 3.08× hidden_states 32 + hidden_states_scale 4") for row in rows_of(text)
    )


def test_tokens_a_rank_have_a_column_where_they_are_not_the_rows():
    regime = Regime(ep_size=4, attention_dp=True, dispatch="allgather", ladder="4096")
    text = printed(*plan_report(plan(LAYER, regime, device="cpu")))
    assert any(row.startswith("4,096 1,024 4,096 1,024 4.0 ") for row in rows_of(text))


def test_a_plan_counts_the_tactics_left_out_by_their_reasons():
    planned = plan(LAYER, Regime(ladder="8,64"), device="cpu")
    left_out = {f"num_warps={warps}": f"needs {warps} bytes, 64 allowed" for warps in (128, 256, 512)}
    buckets = (planned.buckets[0].model_copy(update={"excluded_tactics": left_out}), planned.buckets[1])
    text = printed(*plan_report(planned.model_copy(update={"buckets": buckets})))
    assert "tactics left out, per bucket:\n  0–3  needs … bytes, … allowed" in text


def test_a_plan_in_80_columns_cuts_no_number():
    for width in (80, 160):
        text = printed(
            *plan_report(plan("qwen3-235b-a22b", Regime(ep_size=8, attention_dp=True), device="cpu")), width=width
        )
        table = text[text.index("rows") : text.index("ep, tp")]
        assert "…" not in table.replace("needs up to …", "").replace("… MiB allowed", "")
        assert "65,536" in table


def test_a_plan_with_typical_rows_has_one_line_a_bucket_in_80_columns():
    regime = Regime(ep_size=8, dispatch="alltoall", layout="deduplicated", ladder="vllm")
    planned = plan("qwen3-235b-a22b", regime, device="cpu")
    assert any(bucket.met_rows != bucket.rows for bucket in planned.buckets)
    rows = rows_of(printed(*plan_report(planned), width=80))
    for bucket in planned.buckets:
        assert any(re.match(rf"{bucket.rows:,} {bucket.met_rows:,} \S+ .*[MG]$", row) for row in rows), bucket.rows


def test_a_plan_without_a_dispatch_has_no_wire():
    text = printed(*plan_report(plan(LAYER, Regime(ladder="8"), device="cpu"), wire=True))
    assert "before the exchange" not in text


def test_a_plan_says_which_buckets_a_pool_cannot_have():
    regime = Regime(ep_size=4, dispatch="alltoall", layout="pool", ladder="1,2,4")
    assert "left out, because a pool has 4 equal blocks: 1, 2 rows" in printed(*plan_report(plan(LAYER, regime)))


def test_a_plan_says_why_tactics_are_unknown():
    layer = MoELayer(**{**dict(LAYER), "precision": "nvfp4"})
    assert "number of tactics (ways to run the kernel): torch does not compute this layer" in printed(
        *plan_report(plan(layer, REGIME, "torch"))
    )


def test_a_skewed_plan_shows_the_asked_and_the_achieved_skew():
    regime = Regime(ep_size=8, dispatch="allgather", distribution="zipf:1", ladder="64,1024")
    text = " ".join(printed(*plan_report(plan("qwen3-30b-a3b", regime, device="cpu", rank="fullest"))).split())
    assert "numbers are means for the shares of zipf:1 through the model's routing rule, in closed form" in text
    asked = "asked 18.03 effective experts of 128, busiest 23.6 × the mean; achieved 18.03, busiest 16 × the mean"
    assert f"skew over all experts: {asked}" in text
    assert re.search(r"this rank: [12]\.\d+ × the mean load of a rank; \d\.\d+ effective experts of 16, busiest", text)
    assert "in draws of 1,024 rows" in text


def test_a_plan_of_random_logits_shows_no_skew():
    assert "skew" not in printed(*plan_report(plan(LAYER, Regime(ladder="8"), device="cpu")))


def test_a_narrow_plan_breaks_no_number_and_names_the_columns_that_are_left_out():
    regime = Regime(ep_size=8, attention_dp=True, dispatch="alltoall", layout="deduplicated", ladder="vllm")
    planned = plan("qwen3-235b-a22b", regime, device="cpu")
    lines = printed(plan_table(planned), width=60).splitlines()
    assert max(map(len, lines)) <= 60
    assert "left out at this width: bytes back, bytes in, activ. bytes" in " ".join(lines)
    rule = next(at for at, line in enumerate(lines) if line.startswith("──"))
    rows = [line.split() for line in lines[rule + 1 :] if line[:1].isspace() or line[:1].isdigit()]
    assert [row[0].replace(",", "") for row in rows] == [str(bucket.rows) for bucket in planned.buckets]

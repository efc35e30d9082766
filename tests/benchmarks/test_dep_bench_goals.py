import sys
from pathlib import Path

import pytest
from planted_points import arm, document, point

from moetune.dep_bench.result import PartTime

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from dep_bench_goals import faster_arms, main, missed, table, wire_table


def parts(quantize_us, dispatch_us):
    found = [PartTime(part="dispatch", fastest_us=dispatch_us, slowest_us=3 * dispatch_us)]
    return ([PartTime(part="quantize", fastest_us=quantize_us, slowest_us=quantize_us)] if quantize_us else []) + found


def test_an_arm_is_faster_beyond_its_bounds_and_the_noise_only():
    assert faster_arms(point()) == ["pure_ep"]
    assert faster_arms(point(noise=0.03)) == []
    assert faster_arms(point(arms=(arm("engine", 392.0, 0.98, 0.95, 1.01), arm("dispatcher", 400.0)))) == []


def test_missed_goals_are_named():
    found = missed(document(point(), point(tokens=256, fidelity_by_rank=(1.2, 1.0))), [128])
    assert found == [
        "random, 128 tokens: slower than pure_ep",
        "random, 256 tokens: slower than pure_ep",
        "kernel ÷ dummy 1.053 (geometric mean)",
        "kernel ÷ dummy 1.200 at worst",
    ]
    slower = point(arms=(arm("engine", 412.0, 1.03, 1.02, 1.04), arm("dispatcher", 400.0)))
    assert missed(document(slower), [128]) == [
        "random, 128 tokens: +3.0 % ahead of the engine's choice".replace(" %", "%")
    ]
    assert missed(document(slower), [256]) == []


def test_the_table_has_a_row_for_each_point():
    *_, row = table(document(point()))
    ahead = "+60.0% (+55.0% … +65.0%) | +5.0% (+4.0% … +6.0%) | -2.0% (-3.0% … -1.0%)"
    assert row == f"| random | 128 | 250–256 | 320,000 | {ahead} | 0.12% | 1.012 | same |"


def test_quantizing_pays_from_where_it_pays_ever_after():
    plain = document(
        *(point(tokens=t, received_bytes=4 * t, parts=parts(0, us)) for t, us in ((8, 10), (64, 20), (512, 90)))
    )
    fp4 = document(
        *(point(tokens=t, received_bytes=t, parts=parts(8, us)) for t, us in ((8, 5), (64, 10), (512, 30))),
        wire="fp4", wire_routing="packed_topk",
    )  # fmt: skip
    lines = list(wire_table([plain, fp4]))
    assert lines[2].endswith("| 4.00× | 2.00× | 0.77× |")
    assert lines[4].endswith("| 4.00× | 3.00× | 2.37× |")
    assert lines[-1] == "fp4 + packed_topk: pays from 64 tokens a rank on"
    late = document(point(tokens=8, parts=parts(8, 5)), wire="fp4")
    assert list(wire_table([plain, late]))[-1] == "fp4 + logits: does not pay"


@pytest.mark.parametrize(("noise", "code"), [(0.001, 1), (0.03, 0)])
def test_the_exit_code_says_whether_a_goal_is_missed(tmp_path, monkeypatch, capsys, noise, code):
    path = tmp_path / "dep.json"
    path.write_text(document(point(noise=noise)).model_dump_json())
    monkeypatch.setattr("sys.argv", ["dep_bench_goals.py", str(path), "--named", "128"])
    assert main() == code
    assert capsys.readouterr().out.startswith("### qwen3-30b-a3b, planted, allgather, 2 ranks\n")

from planted_points import arm, document, point

from moetune.dep_bench.report import dep_bench_report


def shown(*points, **changed):
    from rich.console import Console

    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for each in dep_bench_report(document(*points, **changed)):
        console.print(each)
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_a_row_has_the_speed_of_each_arm_and_how_far_the_profile_is_ahead():
    lines = shown(point())
    assert "backend planted on planted; 2 ranks, bf16 and logits on the wire" in lines
    assert "random routing, tokens/s per GPU of the slowest rank" in lines
    ahead = "+60.0 % (+55.0 … +65.0) +5.0 % (+4.0 … +6.0) -2.0 % (-3.0 … -1.0) 0.12 %"
    assert f"128 250–256 200,000 304,762 326,531 320,000 {ahead}" in lines


def test_collectives_have_the_fastest_ranks_time_and_the_planned_bytes_beside_them():
    lines = shown(point())
    assert "128 50.0 310.0 2.00 MB 2.50 MB 50.0 1.012 same" in lines
    assert any(line.startswith("counts, dispatch and combine: the fastest rank's time") for line in lines)


def test_a_line_sums_up_how_near_the_dummy_is():
    lines = shown(point(), point(tokens=256, fidelity_by_rank=(0.9, 1.05)))
    wanted = "of all ranks and batch sizes 0.992 (geometric mean), 0.900 at worst"
    assert [line for line in lines if line.startswith("kernel ÷ dummy: ") and line.endswith(wanted)]


def test_arms_with_the_same_tactics_have_no_distance():
    lines = shown(point(arms=(arm("default", 400.0), arm("dispatcher", 400.0))))
    assert "128 250–256 320,000 320,000 same tactics 0.12 %" in lines


def test_one_process_has_no_wire_and_no_dummy():
    lines = shown(point(plan_bytes=0, received_bytes=0, fidelity=None, fidelity_by_rank=(), dummy_agrees=None), ranks=1)
    assert "backend planted on planted; one rank of 2, without the wire" in lines
    assert "128 50.0 310.0" in lines


def test_the_notes_say_what_is_missing():
    lines = shown(
        point(eager="its shapes depend on the routing"), point(routing="zipf:1"),
        missing={"engine": "no engine tunes the kernels of torch"}, left_out=((256, "zipf:1"),),
    )  # fmt: skip
    assert "engine's: none, because no engine tunes the kernels of torch" in lines
    assert "timed without a CUDA graph: its shapes depend on the routing" in lines
    assert "not measured for lack of time: 256 tokens under zipf:1" in lines
    assert "zipf:1 routing, tokens/s per GPU of the slowest rank" in lines

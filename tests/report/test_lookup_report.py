import pytest
from shown import printed

from moetune.export.engine_log import parsed_log
from moetune.export.lookup import ChosenKernels, LookedUpRow, Lookup, Table
from moetune.export.near_misses import NearMiss, Part
from moetune.report.lookup import log_report, lookup_report

NAME = "E=16,N=1536,device_name=NVIDIA_H200.json"
TRITON = ChosenKernels(name="Triton", reads="yes", why="vLLM chooses Triton for bf16 experts on this GPU.")


def made(*rows, file=f"/tuned/{NAME}", engine="vllm", **fields):
    table = {key: fields.pop(key) for key in ("near_misses", "down_file") if key in fields}
    tables = (Table(name=NAME, looked_in=(f"/tuned/{NAME}",), file=file, rows=rows, **table),)
    hit = all(row.hit for row in rows)
    return Lookup(engine=engine, device="NVIDIA H200", hit=hit, kernels=TRITON, tables=tables, **fields)


def test_a_hit_shows_the_file_and_each_key():
    text = printed(
        *lookup_report(made(LookedUpRow(rows=8, hit=True, key=8), LookedUpRow(rows=4096, hit=True, key=2048)))
    )
    assert f"vLLM looks for {NAME}\nfile: /tuned/{NAME}\nkernels: Triton. vLLM chooses Triton" in text
    assert text.count(f"/tuned/{NAME}") == 1
    assert "4,096  2,048  hit" in text
    assert text.endswith("hit: all 2 row counts")


def test_a_miss_shows_its_reason_its_rows_and_the_near_files():
    near = NearMiss(path="/tuned/x.json", differs={"E": Part(wanted="16", found="128")}, meaning="It counts all.")
    rows = (LookedUpRow(rows=8, hit=True, key=8), LookedUpRow(rows=64, hit=False, key=8, reason="No key is near."))
    text = printed(*lookup_report(made(*rows, near_misses=(near,), warnings=("Mind this.",))))
    assert "miss at 64 rows: No key is near.\nnear: /tuned/x.json\n  It counts all.\n\n" in text
    assert text.endswith("warning: Mind this.\nmiss: 1 of 2 row counts")
    one = made(LookedUpRow(rows=64, hit=False, reason="No file."), file=None)
    text = printed(*lookup_report(one))
    assert f"\n  in /tuned/{NAME}\n" in text
    assert "\nmiss: No file.\nmiss: 1 of 1 row counts" in text
    assert "answer" not in text


@pytest.mark.parametrize(
    ("down", "line"),
    [(None, "none, so SGLang takes the first one's rows"), ("/tuned/x_down.json", "/tuned/x_down.json")],
)
def test_sglangs_second_gemm_has_a_line(down, line):
    found = made(LookedUpRow(rows=8, hit=True, key=8), engine="sglang", down_file=down)
    assert f"file of the second GEMM: {line}\n" in printed(*lookup_report(found))


def test_a_log_is_shown_line_by_line():
    text = f"Using TRITON Unquantized MoE backend out of x\nUsing configuration from /tuned/{NAME} for MoE layer.\n"
    log = parsed_log(text, "server.log")
    lines = f"the log server.log says that the engine:\n  chooses TRITON\n  reads /tuned/{NAME}"
    assert printed(*log_report(log)) == lines
    assert lines in printed(*lookup_report(made(LookedUpRow(rows=8, hit=True, key=8), log=log)))
    assert "names no tuned file" in printed(*log_report(parsed_log("", "server.log")))
    deterministic = parsed_log("Deterministic inference is enabled, using default MoE kernel config.")
    assert "runs its default, because inference is deterministic" in printed(*log_report(deterministic))
    plugin = parsed_log("moetune: Triton experts E=16, N=1536: profile of x under y, 2 buckets")
    assert "takes the configurations of E=16, N=1536 from a profile" in printed(*log_report(plugin))

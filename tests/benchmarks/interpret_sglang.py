"""Measures SGLang's module of a pack under Triton's interpreter, and prints the journal's lines as JSON.

TRITON_INTERPRET=1 python tests/benchmarks/interpret_sglang.py PACK OUT
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/engine"))

import interpreted
import sglang_cells
import torch
import triton
import triton.language as tl
from common import Journal
from sglang_cells import Case, Folders
from sglang_sources import _silu_and_mul as silu_and_mul
from sglang_sources import load, version_of
from triton.runtime import interpreter

from moetune.backends.reference import relative_error
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

DEVICE = "NVIDIA H200"
ROW = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
TINY = MoELayer(name="tiny", num_experts=8, top_k=3, hidden_size=64, intermediate_size=32, precision="bf16")


class TinyCase(Case):
    """A layer that the interpreter runs in seconds."""

    @property
    def layer(self):
        return TINY

    @property
    def regime(self):
        return Regime(ep_size=int(self.launch))


def multiply_as_floats():
    """Replaces the interpreter's product of bf16 values, which takes their bits for integers."""
    plain = interpreter.InterpreterBuilder.create_fmul

    def multiply(self, a, b):
        if a.dtype.scalar != tl.bfloat16:
            return plain(self, a, b)
        values = [torch.from_numpy((x.data.astype("uint32") << 16).view("float32")) for x in (a, b)]
        product = (values[0] * values[1]).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(product, a.dtype.scalar)

    interpreter.InterpreterBuilder.create_fmul = multiply


def sorted_error():
    """Returns how far the activation of sorted rows is off, and how many rows it wrote that no GEMM reads."""
    x, out = torch.randn(64, 96).bfloat16(), torch.full((64, 48), 7.0).bfloat16()
    slots = torch.arange(64, dtype=torch.int32)
    slots[10:16] = 40  # padding
    experts = torch.tensor([3, -1, 0, 5], dtype=torch.int32)
    silu_and_mul(
        x, out, experts, 16, sorted_token_ids=slots, num_tokens_post_padded=torch.tensor([48], dtype=torch.int32),
        num_valid_tokens=40,
    )  # fmt: skip
    written = [*range(10), *range(32, 40)]
    gate, up = x[written].float().chunk(2, dim=1)
    left = sorted(set(range(64)) - set(written))
    reference = torch.nn.functional.silu(gate) * up
    return relative_error(out[written], reference), int((out[left] != 7).any(dim=1).sum())


def main(packed, out):
    interpreted.replace_parts_of_the_interpreter()
    multiply_as_floats()
    sglang_cells.ROUNDS = 1
    sglang_cells.num_draws = lambda rows: 2
    module = load(packed, DEVICE)
    journal = Journal(out / "journal.jsonl")
    (out / "empty" / "configs").mkdir(parents=True)
    for case, rows in ((TinyCase("ep1", "1"), (33,)), (TinyCase("ep2", "2"), (34,))):
        name = case.file_name(DEVICE)
        tuned = out / case.name / "configs" / "triton_3_6_0" / name
        tuned.parent.mkdir(parents=True)
        tuned.write_text(json.dumps({"8": ROW, "64": {**ROW, "BLOCK_SIZE_M": 32}}))
        if case.name == "ep2":  # as if SGLang shipped a file, and one for the second GEMM
            shipped = module.shipped / "configs" / "triton_3_4_0"
            shipped.mkdir(exist_ok=True)
            (shipped / name).write_text(json.dumps({"16": {**ROW, "BLOCK_SIZE_N": 64}}))
            (shipped / name.replace(".json", "_down.json")).write_text(json.dumps({"16": {**ROW, "GROUP_SIZE_M": 16}}))
        folders = Folders(out / "empty", module.shipped, tuned.parents[2])
        left = sglang_cells.measure_case(
            case, module, folders, journal, math.inf, where=DEVICE, sglang="0.5.23", rows=rows, device="cpu"
        )
        assert left == 0
    print(json.dumps({"lines": journal.lines, "sorted": sorted_error()}))


if __name__ == "__main__":
    triton.__version__ = "3.6.0"  # by which SGLang sorts its files
    assert version_of(Path(sys.argv[1])) == "0.5.23"
    main(Path(sys.argv[1]), Path(sys.argv[2]))

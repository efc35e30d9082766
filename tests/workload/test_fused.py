import gc
import weakref

import torch

from moetune.workload.fused import Fused


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def failing_compiler(function, **options):
    def compiled(*tensors):
        try:
            raise ValueError("planted")
        except ValueError as error:
            raise RuntimeError("no compiler") from error

    return compiled


def test_a_failed_compiler_keeps_no_tensor_of_the_callers_alive(monkeypatch):
    monkeypatch.setattr(torch, "compile", failing_compiler)
    fused = Fused(doubled)

    def caller():
        held = torch.ones(3)
        assert fused(held).tolist() == [2.0] * 3
        return weakref.ref(held)

    held = caller()
    gc.collect()
    assert str(fused.failure) == "no compiler"
    assert held() is None


def test_on_the_cpu_it_can_be_left_uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", failing_compiler)
    fused = Fused(doubled, on_cpu=False)
    assert fused(torch.ones(2)).tolist() == [2.0] * 2
    assert fused.failure is None


def test_while_torch_compiles_it_is_part_of_what_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", failing_compiler)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    fused = Fused(doubled)
    assert fused(torch.ones(2)).tolist() == [2.0] * 2
    assert fused.failure is None

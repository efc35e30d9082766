"""FlashInfer's real tuner on a host without CUDA: only what needs the device is replaced."""

from __future__ import annotations

import pytest
import torch

from moetune.engine import op_bench as bench
from moetune.measure import clock
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime


@pytest.fixture
def layer():
    return MoELayer(name="tiny", num_experts=16, top_k=2, hidden_size=32, intermediate_size=16)


@pytest.fixture
def regime():
    return Regime(ep_size=4, attention_dp=True, draws=4, ladder="hybrid", tune_max_num_tokens=8)


@pytest.fixture
def tuner(monkeypatch):
    """A fresh `AutoTuner` that times a tactic by running it once and asking the runner how long it took."""
    from flashinfer.autotuner.autotuner import AutoTuner
    from stand_ins import PlantedClock

    def profile(self, runner, inputs, tactic, tuning_config, input_tensor_batches=None, **kwargs):
        runner(inputs, tactic=tactic, **kwargs)
        return runner.last_us / 1e3

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(AutoTuner, "_profile_single_kernel", profile)
    monkeypatch.setattr(AutoTuner, "_get_l2_cache_size_in_bytes", lambda self, *device: 4096)
    monkeypatch.setattr(AutoTuner, "_instance", None)
    monkeypatch.setattr(bench, "SECONDS", 0.001)
    monkeypatch.setattr(clock, "clock_for", lambda device: PlantedClock())
    return AutoTuner.get()


@pytest.fixture
def trtllm(tuner, layer, regime):
    """A trtllm-gen op of one rank of `regime`, to be called as its engine does."""
    from stand_ins import Trtllm

    return Trtllm(layer, regime)

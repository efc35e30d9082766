"""The probe says where a measurement was taken."""

from datetime import datetime
from pathlib import Path

import pytest
import torch

import moetune
from moetune.backends.plain_torch.backend import TorchBackend
from moetune.errors import UnsupportedError, UsageError
from moetune.measure import probe


class WithAVersion(TorchBackend):
    def environment(self) -> dict[str, str]:
        return {"kernels": "1.2.3"}


def test_cpu_environment_is_model_threads_and_torch() -> None:
    environment = probe.environment(TorchBackend(), "cpu")
    assert environment.strict == {
        "cpu": probe.cpu_model(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }
    assert environment.device == probe.cpu_model()
    assert environment.informative["moetune"] == moetune.__version__
    assert datetime.fromisoformat(environment.informative["probed_at"]).tzinfo is not None


def test_two_probes_of_one_machine_have_one_digest_and_threads_make_another() -> None:
    threads = torch.get_num_threads()
    one = probe.environment(TorchBackend(), "cpu")
    assert probe.environment(TorchBackend(), "cpu").digest == one.digest
    torch.set_num_threads(threads + 1)
    try:
        other = probe.environment(TorchBackend(), "cpu")
    finally:
        torch.set_num_threads(threads)
    assert list(one.differing(other)) == ["threads"]
    assert one.digest != other.digest


def test_the_backends_own_fields_are_strict() -> None:
    assert probe.environment(WithAVersion(), "cpu").strict["kernels"] == "1.2.3"


def test_cpu_model_is_read_from_cpuinfo_with_a_way_out(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654 96-Core Processor\nmodel name\t: another\n")
    assert probe.cpu_model(cpuinfo) == "AMD EPYC 9654 96-Core Processor"
    assert probe.cpu_model(tmp_path / "none") != ""


def test_gpu_state_is_empty_where_nvidia_smi_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe.gpu_state("GPU-1") == {}


def test_gpu_state_names_what_nvidia_smi_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '580.95.05, 1980, 3201, 1980, 700.00'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    state = probe.gpu_state("GPU-1")
    assert (state["driver"], state["sm_clock_mhz"], state["power_limit_w"]) == ("580.95.05", "1980", "700.00")


def test_the_requested_device_is_returned_and_a_missing_one_is_an_error() -> None:
    assert probe.device_for("cpu") == "cpu"
    assert probe.device_for(None) == ("cuda" if torch.cuda.is_available() else "cpu")
    for missing in ("cuda:99", "cuda:x", "tpu", ""):
        with pytest.raises(UsageError, match="cpu"):
            probe.device_for(missing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_gpu_environment_is_name_capability_torch_and_cuda() -> None:
    environment = probe.environment(WithAVersion(), "cuda")
    assert environment.device == torch.cuda.get_device_name()
    assert set(environment.strict) == {"compute_capability", "torch", "cuda", "kernels"}
    assert environment.strict["cuda"] == torch.version.cuda


class Lacking(TorchBackend):
    def unavailable(self) -> tuple[str, str] | None:
        return "triton is not installed", "Install it."

    def environment(self) -> dict[str, str]:
        raise ModuleNotFoundError("No module named 'triton'")


def test_a_backend_that_lacks_what_its_fields_are_read_from_says_what() -> None:
    with pytest.raises(UnsupportedError, match=r"torch cannot run here: triton is not installed\. Install it\."):
        probe.environment(Lacking(), "cpu")

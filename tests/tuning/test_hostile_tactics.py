"""Whatever a tactic does, in whatever phase, costs that tactic or nothing. One tune has all of them as candidates."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from planted_hostile import DAEMON, PLANTED, HostileBackend, light, tactic
from processes import children, eventually

from moetune.backends import registry
from moetune.backends.base import Problem
from moetune.cli.main import main
from moetune.measure import child, compiling, spares, worker
from moetune.spec.tactic import Tactic

pytestmark = pytest.mark.slow

QUESTION = ["--experts", 8, "--top-k", 2, "--hidden", 4, "--intermediate", 4, "--precision", "fp32"]


class HangClock:
    """Real time, but while a tactic that hangs runs, each look finds it `STEP_S` later than the look before."""

    STEP_S = 40.0

    def __init__(self):
        self.worker, self.hung_s = None, {}

    def __call__(self):
        status = self.worker._child.channel.noted()
        if not (status.tactic and str(status.tactic["name"]).startswith("hangs")):
            return child.time.monotonic()
        self.hung_s[status] = self.hung_s.get(status, 0.0) + self.STEP_S
        return status.since + self.hung_s[status]


def light_sender(real):
    return lambda self, message: real(self, light(message) if isinstance(message, Problem) else message)


def planted_worker(backend, device, **named):
    clock = HangClock()
    clock.worker = worker_class(backend, device, now_s=clock, **named)
    return clock.worker


worker_class = worker.Worker


def daemons():
    """The processes that the tactics have started and that still run."""
    running = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if DAEMON[2].encode() in path.read_bytes():
                running.append(path)
        except OSError:
            continue
    return running


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The result of the command, and what it left behind."""
    folder, strangers = tmp_path_factory.mktemp("hostile"), children()
    config = folder / "config.json"
    config.write_text(
        '{"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 4,'
        ' "moe_intermediate_size": 4, "hidden_act": "silu", "norm_topk_prob": true, "torch_dtype": "float32"}'
    )
    backend, real = HostileBackend(), registry.backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "backend", lambda name: backend if name == "hostile" else real(name))
        patch.setattr(worker, "Worker", planted_worker)
        patch.setattr(child.Channel, "send", light_sender(child.Channel.send))
        patch.setattr(child, "ENDING_S", 0.5)
        patch.setattr(child, "MESSAGE_S", 1)
        patch.setattr(compiling, "capability_of", lambda device: (9, 0))
        patch.setattr(compiling, "Compilers", partial(compiling.Compilers, timeout_s=4.0))
        for module in (compiling, spares):  # on a busy machine one of a high niceness could miss the time-out
            patch.setattr(module, "NICENESS", 0)
        words = ["tune", "--model", config, "--ladder", "4", "--draws", 2, "--backend", "hostile", "--device", "cpu"]
        words += ["--store", folder / "store", "--json"]
        result = CliRunner().invoke(main, [str(word) for word in words])
    return result, children() - strangers


@pytest.fixture(scope="module")
def document(tuned):
    result, _ = tuned
    assert result.exit_code == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def rejected(document):
    (choice,) = document["choices"]
    return {Tactic(each["tactic"]): each["reason"] for each in choice["rejected"]}


def test_at_least_60_behaviours_are_planted():
    assert len(PLANTED) >= 60


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: ", ".join(planted))
def test_a_hostile_tactic_is_excluded_with_its_reason_or_measured(rejected, planted):
    reason = PLANTED[planted]
    said = rejected.get(tactic(*planted))
    assert (said is None) == (reason is None), said
    assert reason is None or re.search(reason, said), said


def test_the_others_are_measured_and_the_fastest_wins(document):
    (choice,) = document["choices"]
    assert choice["tactic"] == {"name": "fast"}
    assert choice["default_tactic"] == {"name": "default"}


def test_stdout_is_one_document_and_stderr_has_no_traceback(tuned, document):
    result, _ = tuned
    assert document["backend"] == "hostile"
    assert "a line of the backend" in result.stderr
    assert "Traceback" not in result.stderr
    assert "\x1b" not in result.stderr


def test_nothing_outlives_the_tune(tuned):
    _, left = tuned
    assert left == set()
    assert eventually(lambda: not daemons())

"""`MOETUNE_RECORD`: the plugins record what an engine's routers choose, with the engines' own code."""

from __future__ import annotations

import ast
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from engine_code import parts
from recording_files import tokens

from moetune.engine import plugins, record_hook, warmup_end
from moetune.recordings.reading import read_recording

LOGGER = logging.getLogger("test.moetune")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "traffic.npz"


@pytest.fixture
def recording(path):
    made = record_hook.Recording(str(path), LOGGER)
    yield made
    made._close()


class Model(torch.nn.Module):
    """A model of vLLM: runners with a router and a layer's number, and one whose kernel routes itself."""

    def __init__(self, routers: list[Any]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for number, router in enumerate(routers):
            runner = torch.nn.Module()
            runner.router, runner.layer_id = router, number + 3
            runner.is_monolithic = router is None or getattr(router, "monolithic", False)
            self.layers.append(runner)


def vllm_router(source: Path) -> type:
    """vLLM's own `BaseRouter` on ids that are given in place of logits."""
    stand_ins = {"ABC": ABC, "abstractmethod": abstractmethod, "Callable": Callable, "torch": torch}
    base = parts(source, {"BaseRouter"}, {**stand_ins, "FusedMoERouter": SimpleRouter})["BaseRouter"]

    class Router(base):  # type: ignore[misc, valid-type]
        routing_method_type = None

        def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
            return torch.ones(router_logits.shape), router_logits

    return Router


class SimpleRouter:
    """In place of `FusedMoERouter`, whose constructor keeps the state of EPLB."""

    def __init__(self, eplb_state: Any = None) -> None:
        self.eplb_state = eplb_state


@pytest.mark.network
@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_vllms_routers_are_recorded_from_the_end_of_the_warm_up(version, vllm_version_sources, path, recording):
    folder = vllm_version_sources(version) / "vllm" / "model_executor" / "layers" / "fused_moe" / "router"
    router_type = vllm_router(folder / "base_router.py")
    routers = [router_type(4, 16) for _ in range(2)]
    captured: list[int] = []
    routers[1].set_capture_fn(lambda ids: captured.append(len(ids)))  # vLLM's own, --enable-return-routed-experts

    class Worker:
        def get_model(self) -> Model:
            return Model([*routers, None])

        def compile_or_warm_up_model(self) -> str:
            routers[0]._select_experts(None, tokens(9, seed=9))
            return "warm"

    module = SimpleNamespace(Worker=Worker)
    record_hook.hook_worker(module, recording)
    assert module.Worker().compile_or_warm_up_model() == "warm"

    for seed in range(3):
        for router in routers:
            _, ids = router._select_experts(None, tokens(10, seed=seed))
            assert torch.equal(ids, tokens(10, seed=seed))
    recording._close()
    wanted = torch.cat([tokens(10, seed=seed) for seed in range(3)])
    assert torch.equal(read_recording(path, 3).ids, wanted)
    assert torch.equal(read_recording(path, 4).ids, wanted)
    assert captured == [10, 10, 10]


def test_sglangs_routers_are_recorded_from_the_begin_of_the_loop(engine_sources, path, recording):
    source = engine_sources("sglang") / "sglang" / "srt" / "layers" / "moe" / "topk.py"
    no_capturer: dict[str, Any] = {"get_global_experts_capturer": lambda: None}
    found = parts(source, {"capture_routed_experts_if_allowed"}, no_capturer)
    module = ModuleType("topk")
    module.__dict__.update(found)
    scheduler = SimpleNamespace(Scheduler=type("Scheduler", (), {"run_event_loop": lambda self: "loop"}))
    record_hook.hook_router(module, recording)
    record_hook.hook_scheduler(scheduler, recording)
    allowed, draft = (
        SimpleNamespace(allow_routed_experts_capture=allow, top_k=5, num_shared_topk_slots=1) for allow in (True, False)
    )
    module.capture_routed_experts_if_allowed(allowed, 5, tokens(7))  # the warm-up
    assert scheduler.Scheduler().run_event_loop() == "loop"
    shared = torch.full((8, 1), 16)
    module.capture_routed_experts_if_allowed(allowed, 5, torch.cat([tokens(8, seed=1), shared], dim=1))
    module.capture_routed_experts_if_allowed(allowed, layer_id=6, topk_ids=tokens(8, seed=2))
    module.capture_routed_experts_if_allowed(draft, 5, tokens(8, seed=3))
    module.capture_routed_experts_if_allowed(allowed, None, tokens(8, seed=4))
    recording._close()
    assert torch.equal(read_recording(path).ids, torch.cat([tokens(8, seed=1), tokens(8, seed=2)]))
    assert read_recording(path, 6).layers == 1


def test_sglang_captures_no_experts_where_the_kernel_chooses_them(engine_sources):
    """`--enable-return-routed-experts` sees what `select_experts` chooses; a bypassed router passes the logits on."""
    source = engine_sources("sglang") / "sglang" / "srt" / "layers" / "moe" / "topk.py"
    tree = ast.parse(source.read_text())
    (topk,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TopK")
    methods = {node.name: node for node in topk.body if isinstance(node, ast.FunctionDef)}
    bind = ast.unparse(methods["bind_runner_backend"])
    assert "runner_backend.is_flashinfer_trtllm() and _can_bypass_trtllm_routing" in bind
    assert "TopKOutputFormat.BYPASSED" in bind
    assert not any("capture" in ast.unparse(node) for name, node in methods.items() if name.startswith("forward"))
    (bypassed,) = (
        node
        for node in ast.walk(methods["forward_cuda"])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "output_format == TopKOutputFormat.BYPASSED"
    )
    (returned,) = bypassed.body
    assert ast.unparse(returned).startswith("return BypassedTopKOutput(")
    assert "select_experts" not in ast.unparse(returned)
    assert "routing_replay_out" not in source.read_text()


def test_the_variable_hooks_the_engines_modules_when_they_are_imported(path, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(plugins, "_registered", False)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.setenv(record_hook.VARIABLE, str(path))
    waiting = list(sys.meta_path)
    plugins.register(LOGGER)
    added = [finder for finder in sys.meta_path if finder not in waiting]
    monkeypatch.setattr(sys, "meta_path", waiting)
    names = {warmup_end.VLLM.module, record_hook.SGLANG_ROUTER, warmup_end.SGLANG.module}
    assert {vars(finder)["_name"] for finder in added} == names


def test_other_ranks_record_nothing(path, recording, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    recording.begin(2)
    recording.add(0, tokens(4))
    recording._close()
    assert not path.exists()


def test_a_model_without_routers_that_can_be_recorded_is_reported(path, recording, caplog):
    recording.begin(record_hook.bind(Model([SimpleNamespace(set_capture_fn=None), None]), recording))
    assert "no layer's router can be recorded" in caplog.text
    assert not path.exists()


def test_a_layer_whose_kernel_routes_itself_is_left_out(recording):
    bound: list[str] = []
    routers = [
        SimpleNamespace(set_capture_fn=lambda capture: bound.append("own kernel"), monolithic=True),
        SimpleNamespace(set_capture_fn=lambda capture: bound.append("router")),
    ]
    assert record_hook.bind(Model(routers), recording) == 1
    assert bound == ["router"]


def test_nothing_is_recorded_while_torch_compiles_or_a_graph_is_captured(path, recording, monkeypatch):
    recording.begin()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    recording.add(0, tokens(4))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    recording.add(0, SimpleNamespace(is_cuda=True))
    recording._close()
    assert not path.exists()


def test_no_error_reaches_the_engine(path, recording, caplog, tmp_path):
    recording.begin()
    recording.add(0, tokens(4))
    recording.add(0, torch.ones(3))
    recording.add(0, tokens(4))
    assert caplog.text.count("recording ends: UsageError: topk_ids are integers") == 1
    recording._close()
    assert len(read_recording(path).ids) == 4
    unwritable = record_hook.Recording(str(tmp_path / "a.txt"), LOGGER)
    unwritable.begin()
    unwritable.add(0, tokens(4))
    assert "is not used: A recording is written as .npz" in caplog.text


def test_an_engine_whose_objects_are_others_goes_on(recording, caplog):
    """A worker without a model, and another signature of the function that gets the ids."""
    worker = SimpleNamespace(Worker=type("Worker", (), {"compile_or_warm_up_model": lambda self: "warm"}))
    record_hook.hook_worker(worker, recording)
    assert worker.Worker().compile_or_warm_up_model() == "warm"
    assert caplog.text.count("recording ends: AttributeError: 'Worker' object has no attribute 'get_model'") == 1
    router = SimpleNamespace(capture_routed_experts_if_allowed=lambda config, *, ids: ids)
    record_hook.hook_router(router, recording)
    assert router.capture_routed_experts_if_allowed(None, ids=7) == 7
    assert caplog.text.count("recording ends: TypeError") == 1


def test_an_engine_without_these_functions_is_left_alone(recording):
    for module in (SimpleNamespace(), SimpleNamespace(Worker=object, Scheduler=object)):
        before = vars(module).copy()
        record_hook.hook_worker(module, recording)
        record_hook.hook_router(module, recording)
        record_hook.hook_scheduler(module, recording)
        assert vars(module) == before

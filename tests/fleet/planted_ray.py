"""Stands for the package `ray`: actors whose methods return what a test plants, at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest


class RayError(Exception):
    pass


@dataclass(eq=False)
class Ref:
    """A value, or the error that getting it raises."""

    value: Any
    ready: bool = True


@dataclass(eq=False)
class Stream:
    """What a method with `num_returns="streaming"` returns."""

    values: Iterator[Any]
    ready: bool = True

    def __next__(self) -> Ref:
        return Ref(next(self.values))


class Method:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def options(self, **options: object) -> Method:
        assert options == {"num_returns": "streaming"}
        return self

    def remote(self, *arguments: object) -> Any:
        return self.answer(*arguments)


@dataclass
class PlantedRay:
    """`resources`, `free`: GPUs of the cluster. `described`: what each started actor says; `reports`: of each order."""

    gpus: int = 0
    free: int = 0
    machines: int = 1
    described: list[Ref] = field(default_factory=list)
    reports: list[Stream] = field(default_factory=list)
    initialized: list[dict[str, Any]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    killed: list[Any] = field(default_factory=list)
    refusal: Exception | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ray = SimpleNamespace(
            shutdown=lambda: self.initialized.append({}), exceptions=SimpleNamespace(RayError=RayError)
        )
        strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
        for name in ("init", "wait", "get", "remote", "kill", "nodes", "cluster_resources", "available_resources"):
            setattr(ray, name, getattr(self, name))
        modules = {"ray": ray, "ray.util": SimpleNamespace(), "ray.util.scheduling_strategies": strategies}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def init(self, **options: Any) -> None:
        self.initialized.append(options)
        if self.refusal:
            raise self.refusal

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": float(self.gpus)} if self.gpus else {}

    def available_resources(self) -> dict[str, float]:
        return {"GPU": float(self.free)} if self.free else {}

    def nodes(self) -> list[dict[str, Any]]:
        alive = [{"Alive": True, "NodeID": f"node{n}", "Resources": {"CPU": 4.0}} for n in range(self.machines)]
        return [*alive, {"Alive": False, "NodeID": "gone", "Resources": {}}]

    def wait(self, refs: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
        ready = [ref for ref in refs if ref.ready][:num_returns]
        assert ready or timeout is not None, "it would wait for ever"
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def remote(self, kind: type) -> Any:
        ray = self

        class Handle:
            describe = Method(lambda backends: ray.described.pop(0))
            tune = Method(lambda order: ray.reports.pop(0))

        class Actor:
            def options(self, **options: Any) -> Actor:
                ray.options.append(options)
                return self

            def remote(self) -> Handle:
                return Handle()

        return Actor()

    def kill(self, handle: Any) -> None:
        self.killed.append(handle)

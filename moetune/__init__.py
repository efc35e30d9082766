"""moetune measures which kernel tactic is fastest for the MoE load that each expert-parallel rank will really see.

>>> import moetune
>>> layer = moetune.layer("qwen3-235b-a22b")
>>> regime = moetune.Regime(ep_size=8, attention_dp=True)
>>> moetune.realize(layer, regime, rows=64).load.sum().item()  # 64 rows, all 8 slots of each local
512
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetune.compare import tune_all as tune_all
    from moetune.comparison import Comparison as Comparison
    from moetune.engine.warmup import warmup as warmup
    from moetune.inputs.presets import layer as layer
    from moetune.plan import plan as plan
    from moetune.spec.layer import MoELayer as MoELayer
    from moetune.spec.regime import Regime as Regime
    from moetune.spec.tactic import Tactic as Tactic
    from moetune.store.profile import Profile as Profile
    from moetune.tune import load as load
    from moetune.tune import tune as tune
    from moetune.workload.packing import pack_topk as pack_topk
    from moetune.workload.packing import unpack_topk as unpack_topk
    from moetune.workload.routing import Routing as Routing
    from moetune.workload.routing import realize as realize

__version__ = "0.1.0"

_HOMES = {
    "Comparison": "moetune.comparison",
    "MoELayer": "moetune.spec.layer",
    "Profile": "moetune.store.profile",
    "Regime": "moetune.spec.regime",
    "Routing": "moetune.workload.routing",
    "Tactic": "moetune.spec.tactic",
    "layer": "moetune.inputs.presets",
    "load": "moetune.tune",
    "pack_topk": "moetune.workload.packing",
    "plan": "moetune.plan",
    "realize": "moetune.workload.routing",
    "tune": "moetune.tune",
    "tune_all": "moetune.compare",
    "unpack_topk": "moetune.workload.packing",
    "warmup": "moetune.engine.warmup",
}
__all__ = [*_HOMES]


class _Package(ModuleType):
    """Keeps `moetune.tune` the function: an import of the module of that name would otherwise take its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'moetune' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package

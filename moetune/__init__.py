"""moetune measures which kernel tactic is fastest for the MoE load that each expert-parallel rank will really see.

>>> import moetune
>>> layer = moetune.layer("qwen3-235b-a22b")
>>> regime = moetune.Regime(ep_size=8, attention_dp=True)
>>> moetune.realize(layer, regime, rows=64).load.sum().item()  # 64 rows, all 8 slots of each local
512
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moetune._version import __version__ as __version__

if TYPE_CHECKING:
    from moetune.engine.warmup import warmup as warmup
    from moetune.inputs.presets import layer as layer
    from moetune.spec.layer import MoELayer as MoELayer
    from moetune.spec.regime import Regime as Regime
    from moetune.spec.tactic import Tactic as Tactic
    from moetune.store.profile import Profile as Profile
    from moetune.tuning.comparison import Comparison as Comparison
    from moetune.tuning.plan import plan as plan
    from moetune.tuning.tune import load as load
    from moetune.tuning.tune import tune as tune
    from moetune.tuning.tune_all import tune_all as tune_all
    from moetune.workload.packing import pack_topk as pack_topk
    from moetune.workload.packing import unpack_topk as unpack_topk
    from moetune.workload.routing import Routing as Routing
    from moetune.workload.routing import realize as realize

_HOMES = {
    "Comparison": "moetune.tuning.comparison",
    "MoELayer": "moetune.spec.layer",
    "Profile": "moetune.store.profile",
    "Regime": "moetune.spec.regime",
    "Routing": "moetune.workload.routing",
    "Tactic": "moetune.spec.tactic",
    "layer": "moetune.inputs.presets",
    "load": "moetune.tuning.tune",
    "pack_topk": "moetune.workload.packing",
    "plan": "moetune.tuning.plan",
    "realize": "moetune.workload.routing",
    "tune": "moetune.tuning.tune",
    "tune_all": "moetune.tuning.tune_all",
    "unpack_topk": "moetune.workload.packing",
    "warmup": "moetune.engine.warmup",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """The public name, imported when it is first asked for (PEP 562): a bare `import moetune` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moetune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

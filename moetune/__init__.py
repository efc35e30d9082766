"""moetune measures which MoE kernel tactic is fastest for the load that an expert-parallel rank really sees.

>>> import moetune
>>> deployment = moetune.from_launch("vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel")
>>> deployment.regime.slug
'ep8-tp1-dp-allgather-random'
>>> layer = moetune.layer("qwen3-235b-a22b")
>>> regime = moetune.Regime(ep_size=8, attention_dp=True)
>>> moetune.realize(layer, regime, rows=64).load.sum().item()  # 64 rows; all 8 slots of each are local
512

`plan` shows what a rank's kernel receives, `tune` and `tune_all` measure, `load` looks a stored profile up,
`Profile.tactic` returns the tactic for a row count, and `check` measures whether a profile is still good. Every error
is a `MoetuneError` with a `hint`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moetune._version import __version__ as __version__

if TYPE_CHECKING:
    from moetune.engine.warmup import warmup as warmup
    from moetune.errors import CheckFailedError as CheckFailedError
    from moetune.errors import MissError as MissError
    from moetune.errors import MoetuneError as MoetuneError
    from moetune.errors import NoResultError as NoResultError
    from moetune.errors import NotSavedError as NotSavedError
    from moetune.errors import StoreError as StoreError
    from moetune.errors import UnsupportedError as UnsupportedError
    from moetune.errors import UsageError as UsageError
    from moetune.export import export_profile as export_profile
    from moetune.inputs.deployment import Deployment as Deployment
    from moetune.inputs.deployment import from_launch as from_launch
    from moetune.inputs.deployment import regime as regime
    from moetune.inputs.presets import layer as layer
    from moetune.recordings.recorder import Recorder as Recorder
    from moetune.recordings.recorder import record as record
    from moetune.spec.ladder import Ladder as Ladder
    from moetune.spec.layer import MoELayer as MoELayer
    from moetune.spec.regime import Regime as Regime
    from moetune.spec.tactic import Tactic as Tactic
    from moetune.store.profile import Choice as Choice
    from moetune.store.profile import Profile as Profile
    from moetune.store.reading import load_profile as load_profile
    from moetune.store.store import Store as Store
    from moetune.tuning.check import check as check
    from moetune.tuning.checked import Check as Check
    from moetune.tuning.comparison import Comparison as Comparison
    from moetune.tuning.plan import Plan as Plan
    from moetune.tuning.plan import plan as plan
    from moetune.tuning.tune import load as load
    from moetune.tuning.tune import tune as tune
    from moetune.tuning.tune_all import tune_all as tune_all
    from moetune.workload.packing import pack_topk as pack_topk
    from moetune.workload.packing import unpack_topk as unpack_topk
    from moetune.workload.routing import Routing as Routing
    from moetune.workload.routing import realize as realize

_HOMES = {
    "Check": "moetune.tuning.checked",
    "CheckFailedError": "moetune.errors",
    "Choice": "moetune.store.profile",
    "Comparison": "moetune.tuning.comparison",
    "Deployment": "moetune.inputs.deployment",
    "Ladder": "moetune.spec.ladder",
    "MissError": "moetune.errors",
    "MoELayer": "moetune.spec.layer",
    "MoetuneError": "moetune.errors",
    "NoResultError": "moetune.errors",
    "NotSavedError": "moetune.errors",
    "Plan": "moetune.tuning.plan",
    "Profile": "moetune.store.profile",
    "Recorder": "moetune.recordings.recorder",
    "Regime": "moetune.spec.regime",
    "Routing": "moetune.workload.routing",
    "Store": "moetune.store.store",
    "StoreError": "moetune.errors",
    "Tactic": "moetune.spec.tactic",
    "UnsupportedError": "moetune.errors",
    "UsageError": "moetune.errors",
    "check": "moetune.tuning.check",
    "export_profile": "moetune.export",
    "from_launch": "moetune.inputs.deployment",
    "layer": "moetune.inputs.presets",
    "load": "moetune.tuning.tune",
    "load_profile": "moetune.store.reading",
    "pack_topk": "moetune.workload.packing",
    "plan": "moetune.tuning.plan",
    "realize": "moetune.workload.routing",
    "record": "moetune.recordings.recorder",
    "regime": "moetune.inputs.deployment",
    "tune": "moetune.tuning.tune",
    "tune_all": "moetune.tuning.tune_all",
    "unpack_topk": "moetune.workload.packing",
    "warmup": "moetune.engine.warmup",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Imports a public name on its first use (PEP 562), so that a bare `import moetune` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moetune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

"""A tune of the planted backend."""

from planted import LAYER

from moetune.spec.regime import Regime
from moetune.tuning.tune import tune

REGIME = Regime(ep_size=2, attention_dp=True, ladder="4,8", draws=4)


def tune_planted(regime=REGIME, **options):
    return tune(LAYER, regime, "planted", device="cpu", **{"isolate": False, **options})

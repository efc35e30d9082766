"""Tunes a small layer with the torch backend, on any machine, and looks a tactic up.

python examples/tune_and_look_up.py
"""

import tempfile

import moetune

layer = moetune.MoELayer(name="small", num_experts=16, top_k=2, hidden_size=64, intermediate_size=32, precision="fp32")
regime = moetune.Regime(ep_size=4, attention_dp=True, ladder="8,32")

with tempfile.TemporaryDirectory() as folder:
    store = moetune.Store(folder)  # leave it out to use your own store
    profile = moetune.tune(layer, regime, backend="torch", store=store, device="cpu")
    for choice in profile.choices:
        print(f"{choice.rows:3} rows: {choice.tactic}, {choice.time_us:.1f} µs, {choice.gain:.2f}× the default")

    print("20 rows use", profile.tactic(rows=20))

    again = moetune.load(layer, regime, backend="torch", store=store, device="cpu")  # measures nothing
    assert again == profile

    try:
        moetune.load(layer, moetune.Regime(ep_size=8, attention_dp=True), backend="torch", store=store, device="cpu")
    except moetune.MissError as miss:
        print("another EP size is a miss:", miss.message)

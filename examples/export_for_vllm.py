"""Writes a packaged profile as the file that vLLM reads. Needs no GPU.

python examples/export_for_vllm.py [FOLDER]
"""

import sys
from pathlib import Path

import moetune

layer = moetune.layer("qwen3-235b-a22b")
regime = moetune.regime("vllm:allgather_reducescatter", layer, ep_size=8)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tuned")

for _, profile in moetune.Store().profiles():
    if isinstance(profile, moetune.Profile) and profile.layer == layer and profile.regime in (regime, regime.coarser):
        for path, state in moetune.export_profile(profile, "vllm", folder).items():
            print(f"{state}: {path}")
        print(f"export VLLM_TUNED_CONFIG_FOLDER={(folder / regime.slug).resolve()}")
        break
else:
    sys.exit(
        "No profile. Tune one: moetune tune --model qwen3-235b-a22b --ep 8 --dispatch vllm:allgather_reducescatter"
    )

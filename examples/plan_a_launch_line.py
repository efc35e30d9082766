"""Shows what one rank's kernel receives in a deployment. Needs no GPU.

python examples/plan_a_launch_line.py
"""

import moetune

LINE = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel --moe-backend triton"

deployment = moetune.from_launch(LINE)
for warning in deployment.warnings:
    print(f"warning: {warning}")

plan = moetune.plan(deployment.layer, deployment.regime, deployment.backend)
print(f"{plan.layer.name} under {plan.regime.slug}: rank {plan.rank} has {plan.num_local_experts} experts")
for bucket in plan.buckets:
    print(
        f"{bucket.rows:5} rows: {bucket.local_slots:7.1f} local slots on {bucket.active_experts:4.1f} experts, "
        f"{bucket.flops / 1e9:6.2f} GFLOP"
    )

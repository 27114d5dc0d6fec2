#!/bin/bash
# Written by: vans manifests vans_8gpu --kind raycluster or launcher
# Sizes, labels and the entrypoint follow the run's configuration: change that and write the file anew (docs/cluster.md).
set -euo pipefail
exec ray job submit --address http://127.0.0.1:8265 --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}' -- python -m pipeline train vans_8gpu out=/shared/runs/vans_8gpu data.train=/shared/data/vans/rl/train data.eval=/shared/data/vans/rl/test --resume-if-any

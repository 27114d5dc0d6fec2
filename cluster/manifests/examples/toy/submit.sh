#!/bin/bash
# Written by: vans manifests toy --kind raycluster or launcher
# Sizes, labels and the entrypoint follow the run's configuration: change that and write the file anew (docs/cluster.md).
set -euo pipefail
exec ray job submit --address http://127.0.0.1:8265 --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}' -- python -m pipeline train toy out=/shared/runs/toy data.train=/shared/data/toy/train data.eval=/shared/data/toy/test --resume-if-any

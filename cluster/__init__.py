"""What the cluster looks like: resources, placement, pool sizes, job submission, manifests. No model code."""

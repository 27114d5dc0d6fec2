"""Group-relative advantages: rewards in, advantages out. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

STD_NORMS = ("group", "batch", "none")


def group_advantages(
    rewards: Sequence[ArrayLike], std_norm: str = "group", eps: float = 1e-4
) -> tuple[list[np.ndarray], int]:
    """Return the advantages of each group, and how many groups have equal rewards throughout.

    A_i = (r_i − mean of the group) / (std + eps), population standard deviation (GRPO, arXiv 2402.03300; eps as in
    ALGORITHM). ``std_norm``: ``group`` divides by the group's own std, ``batch`` by the std of all rewards of the batch
    (Flow-GRPO, arXiv 2505.05470), ``none`` only centres (Dr.GRPO, arXiv 2503.20783).

    Args:
        rewards: one array (G_k,) of total rewards per group, G_k >= 1; groups may differ in size.
        std_norm: ``group``, ``batch`` or ``none``.
        eps: added to the standard deviation, > 0.

    Returns:
        One float64 array (G_k,) per group, in order; exactly 0 for a group whose rewards are all equal. And the number
        of such groups: they carry no gradient.

    Raises:
        ValueError: unknown ``std_norm``, an empty group, or a reward that is not finite (a failed scorer must leave the
            group; nothing is imputed).
    """
    if std_norm not in STD_NORMS:
        raise ValueError(f"std_norm={std_norm!r} is unknown; use one of {', '.join(STD_NORMS)}")
    groups = [np.asarray(group, dtype=np.float64).reshape(-1) for group in rewards]
    for k, group in enumerate(groups):
        if group.size == 0:
            raise ValueError(f"group {k} has no rewards; drop it before computing advantages")
        if not np.isfinite(group).all():
            raise ValueError(
                f"group {k} has a reward that is not finite: {group.tolist()}; leave the member out instead"
            )
    batch_std = float(np.concatenate(groups).std()) if groups else 0.0
    advantages: list[np.ndarray] = []
    zero_std = 0
    for group in groups:
        if np.ptp(group) == 0.0:  # exact, so that rounding of the mean never leaks in as a gradient
            zero_std += 1
            advantages.append(np.zeros_like(group))
            continue
        centred = group - group.mean()
        scale = {"group": group.std() + eps, "batch": batch_std + eps, "none": 1.0}[std_norm]
        advantages.append(centred / scale)
    return advantages, zero_std

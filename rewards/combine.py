"""From component values to one total per member of a group: a weighted sum, optionally of group-normalised components.

Never imputes: a component that is missing or not finite is an error here. Who could not be scored has left the group
before.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewards.errors import RewardError

EPS = 1e-4
"""Added to the standard deviation, as in the advantage (ALGORITHM.md: GRPO, common to both stages)."""


def combine_rewards(
    values: Mapping[str, ArrayLike], weights: Mapping[str, float], *, normalise: bool = False
) -> NDArray[np.float64]:
    """Return the totals (G,) of one group: Σ weight · component.

    ``values``: component → (G,) of one group; components without a weight are ignored. With ``normalise`` each
    component is standardised within the group first, (x − mean) / (std + 1e-4) with the population std, so that its
    weight and not its spread decides its influence; a component that is constant in the group then contributes 0.
    Raises RewardError for no weights, a missing component, unequal lengths, or a non-finite value or weight.
    """
    if not weights:
        raise RewardError("no reward weights: name at least one component, e.g. {'rouge_l': 1.0}")
    missing = [name for name in weights if name not in values]
    if missing:
        raise RewardError(f"no values for the weighted components {missing}; there are {sorted(values)}")
    arrays = {name: np.asarray(values[name], dtype=np.float64) for name in weights}
    lengths = {name: a.shape for name, a in arrays.items()}
    if len(set(lengths.values())) != 1 or next(iter(arrays.values())).ndim != 1:
        raise RewardError(f"every component needs one value per member of the group, got the shapes {lengths}")
    for name, weight in weights.items():
        if not np.isfinite(weight):
            raise RewardError(f"the weight of {name!r} is {weight}; it must be finite")
        if not np.isfinite(arrays[name]).all():
            bad = np.flatnonzero(~np.isfinite(arrays[name])).tolist()
            raise RewardError(
                f"component {name!r} is not finite for the members {bad} of the group; they should have left it"
            )
    if normalise:
        arrays = {name: (a - a.mean()) / (a.std() + EPS) for name, a in arrays.items()}
    total = np.zeros(next(iter(arrays.values())).shape)
    for name, weight in weights.items():
        total += weight * arrays[name]
    return total

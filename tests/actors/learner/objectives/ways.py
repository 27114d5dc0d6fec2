"""The ways to learn that a configuration offers, what each must go together with, and which pairs it refuses.

``docs/objectives.md`` shows :data:`WAYS` × :data:`PROPERTIES` as a table; ``test_pairs`` proves the pairs and compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.learner.objectives.settings import ObjectiveSection
from pipeline.config import RunConfig, load_config


@dataclass(frozen=True)
class Way:
    """One way to learn: the stage that may, and the keys of the stage that choose it."""

    stage: str
    keys: tuple[str, ...]

    @property
    def overrides(self) -> list[str]:
        """Its keys, as overrides of a run."""
        return [f"{self.stage}.{key}" for key in self.keys]

    def config(self, *more: str) -> RunConfig:
        """Return the toy run that learns by it, a short one: 4 denoising steps, of which the first 3 may be stochastic."""
        short = ["stage2.render.steps=4", "stage2.sde.window_range=[0, 3]"]
        return load_config("toy", [*short, *self.overrides, *more])

    def learning(self, config: RunConfig) -> ObjectiveSection:
        """Return its settings in ``config``."""
        found: ObjectiveSection = getattr(config, self.stage).learning
        return found


WAYS = {
    "stage 1 `grpo`": Way("stage1", ("objective=grpo", "grpo.kl_beta=0.1")),
    "stage 1 `grpo`, `sequence_mask`": Way(
        "stage1", ("grpo.old_logprobs=rollout", "grpo.rollout_correction=sequence_mask", "grpo.importance_cap=3.0")
    ),
    "stage 1 `gspo`": Way("stage1", ("objective=gspo", "gspo.kl_beta=0.1")),
    "stage 1 `cispo`": Way("stage1", ("objective=cispo", "cispo.kl_beta=0.1")),
    "stage 2 `grpo`": Way("stage2", ("objective=grpo", "grpo.kl_beta=0.1")),
    "stage 2 `grpo`, a window per prompt, `rectify`": Way(
        "stage2", ("sde.window_per=prompt", "sde.window_size=1", "grpo.step_balance=rectify")
    ),
    "stage 2 `grpo`, `ratio_norm`": Way(
        "stage2", ("grpo.step_balance=ratio_norm", "grpo.clip_low=1e-5", "grpo.clip_high=1e-5")
    ),
    "stage 2 `nft`": Way("stage2", ("objective=nft", "nft.kl_beta=0.1", "nft.behaviour_decay=0.5")),
    "stage 2 `awm`": Way("stage2", ("objective=awm", "awm.kl_beta=0.1")),
}
ARTISTS = [name for name, way in WAYS.items() if way.stage == "stage2"]

PROPERTIES = {
    "resume": ("deterministic=true", "pools.vdm.channels_last=false", "pools.vdm.max_embed=1"),
    "staleness": ("{stage}.rollout.max_staleness=1",),
    "2 ranks": ("learner.ranks=2",),
    "LoRA": ("{stage}.lora.rank=4",),
    "full weights": ("{stage}.lora.rank=0",),
    "colocated rest": ("learner.offload=all", "pools.vlm.rest=true", "pools.vdm.rest=true", "cluster.layout=colocated"),
    "embed pool": ("pools.embed.workers=1",),
    "`micro_steps`": ("learner.micro_steps=1",),
    "all-in-one": ("training=all_in_one",),
}
"""Each with the keys that ask for it."""
OF_THE_ARTIST = {"embed pool", "`micro_steps`"}
"""Those that stage 1 has nothing to do with."""
REFUSED = {(name, what) for name in ("stage 2 `nft`", "stage 2 `awm`") for what in ("staleness", "all-in-one")}
"""The pairs that the configuration refuses."""


def holding(what: str) -> list[str]:
    """Return the ways that go together with the property."""
    names = ARTISTS if what in OF_THE_ARTIST else list(WAYS)
    return [name for name in names if (name, what) not in REFUSED]


def asked(name: str, what: str) -> list[str]:
    """Return the overrides that ask for the property in a run that learns so."""
    return [key.format(stage=WAYS[name].stage) for key in PROPERTIES[what]]

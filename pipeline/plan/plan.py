"""A run on given GPUs, before anything starts: who stands where, whether it fits, how long a step takes, what would be better.

Pure but for reading the models' configurations. ``vans plan`` prints it (``pipeline.plan.report``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actors.architectures import cost as costs
from actors.vdm.settings import SAMPLERS_SHARE
from cluster.errors import ConfigError, PlacementError
from cluster.hardware import GIB, Hardware, Rates
from cluster.layout import ClusterView, PlacementPlan, shortfall
from cluster.packing import Gpu, Member, pack
from pipeline.config import RunConfig
from pipeline.config.load import apply_override, parse_config
from pipeline.fleet.kinds import key_of, kinds_of, section_of
from pipeline.fleet.models import SHARERS, require_shareable
from pipeline.fleet.open import LEARNER, placement_plan, pool_sections
from pipeline.plan.balance import Split, StageDemand, best_split, shared_split, standing
from pipeline.plan.demands import PUBLISH_BANDWIDTH, stage_demands
from pipeline.plan.measured import Measured
from pipeline.plan.memory import CONTEXT, USABLE, VLLM_BATCH_TOKENS, Process, processes, sequences_in_cache
from pipeline.plan.models import Models
from pipeline.plan.work import CAPTION_TOKENS

_PLENTY = 1e6  # of CPUs and custom resources, which --gpus does not tell
RESTING = ("pools.vlm.rest=true", "pools.vdm.rest=true", "learner.offload=all")
SWITCH_BANDWIDTH = 25e9
"""Assumed bytes per second between a GPU and its host's memory (PCIe 4.0 x16 has 32)."""
CPU_FLOPS = 5e10
"""Assumed float32 FLOP/s of a core, for roles without a GPU."""


@dataclass(frozen=True)
class Problem:
    """Why the run cannot start, or would die; ``cure``: overrides after which this plan finds nothing against it."""

    what: str
    cure: str = ""


@dataclass(frozen=True)
class Plan:
    """What ``vans plan`` says of a run."""

    config: RunConfig
    hardware: Hardware
    placement: PlacementPlan | None
    gpus: tuple[Gpu, ...]
    """All GPUs and who stands on each; empty where the run finds no room."""
    processes: tuple[Process, ...]
    peaks: Mapping[tuple[int, int], float]
    """Bytes at the largest moment of each GPU (node, index)."""
    stages: tuple[StageDemand, ...]
    workers: Mapping[str, float]
    """GPUs (of the vlm role: engines) of each role, as configured, that a demand is divided by."""
    splits: tuple[Split, ...]
    """The best with GPUs of their own, and all shared; those of them that fit into memory."""
    problems: tuple[Problem, ...]
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against starting the run."""
        return not self.problems

    @property
    def colocated(self) -> bool:
        """Whether roles share GPUs, so that they work one after another; scorers, and what stands with them, hardly count."""
        return any(len({standing(member.role) for member in gpu.members} - {"reward"}) > 1 for gpu in self.gpus)

    def step_s(self, stage: StageDemand) -> float:
        """Return the seconds of a step of ``stage`` as configured."""
        return stage.seconds(self.workers, colocated=self.colocated)


def make_plan(
    config: RunConfig, hardware: Hardware, rates: Rates, models: Models, measured: Measured | None = None
) -> Plan:
    """Return the plan of ``config`` on ``hardware``."""
    gib = hardware.gib
    kinds = processes(config, models, gib)
    problems: list[Problem] = []
    placement, gpus = _placed(config, hardware, problems)
    peaks = {(gpu.node, gpu.index): peak(gpu, kinds) for gpu in gpus}
    problems += _context_problems(config, models, kinds)
    problems += _sharing_problems(config)
    if gpus:
        problems += _memory_problems(config, hardware, models, gpus, kinds)
    stages = stage_demands(config, models, rates, measured)
    workers = _workers(config, placement)
    slowed = tuple(_on_cpu(config, stage, rates) for stage in switching(stages, kinds))
    splits = splits_of(config, hardware, models, stages)
    if any(p.cure == "split" for p in problems):
        better = min(splits, key=lambda split: split.run_s, default=None)
        cure = overrides(config, better) if better else ""
        problems = [dataclasses.replace(p, cure=cure) if p.cure == "split" else p for p in problems]
    return Plan(
        config,
        hardware,
        placement,
        gpus,
        kinds,
        peaks,
        slowed,
        workers,
        splits,
        tuple(problems),
        tuple(_assumptions(config, rates, models, measured)),
    )


def peak(gpu: Gpu, kinds: Iterable[Process]) -> float:
    """Return the bytes that are used on ``gpu`` at its largest moment.

    There are two: the pools sample, all of them awake, or the learner learns. What rests meanwhile keeps a little, what does not
    rest keeps all that it once used.
    """
    kinds = list(kinds)

    def of(role: str, size: str) -> float:
        return max((getattr(kind, size) for kind in kinds if kind.role == role), default=0.0)

    pools = sum(of(member.role, "total") for member in gpu.members if member.role != LEARNER)
    resting = sum(of(member.role, "idle") for member in gpu.members if member.role != LEARNER)
    ranks = [member for member in gpu.members if member.role == LEARNER]
    return max(pools + len(ranks) * of(LEARNER, "idle"), resting + len(ranks) * of(LEARNER, "total"))


def switching(stages: Iterable[StageDemand], kinds: Iterable[Process]) -> tuple[StageDemand, ...]:
    """Return ``stages`` with the seconds in which what rests moves off the GPUs and on again, once a step."""
    moved: dict[str, float] = {}
    for kind in kinds:
        moved[kind.role] = max(moved.get(kind.role, 0.0), kind.moved)
    switch_s = 2 * sum(moved.values()) / SWITCH_BANDWIDTH
    return tuple(dataclasses.replace(stage, switch_s=switch_s) for stage in stages)


def overrides(config: RunConfig, split: Split) -> str:
    """Return the overrides with which ``config`` has ``split``."""
    each_on, pools = _gpus_of_a_worker(config), list(pool_sections(config))
    if split.colocated:
        count = split.gpus["vdm"]
        each = [f"{key_of(pool)}.workers={count} {key_of(pool)}.gpus=0.2" for pool in pools]
        stale = [f"{stage}.rollout.max_staleness=0" for stage in ("stage1", "stage2") if _staleness(config, stage)]
        share = f"pools.vlm.gpu_memory_utilization={split.engine_share:g} pools.vlm.kv_cache_mib=null"
        ranks = f"learner.ranks={count} learner.gpus=0.2"
        return " ".join(["cluster.layout=colocated", *each, ranks, *RESTING, *stale, share])
    gpus, together = split.gpus, sum(standing(pool) == "reward" for pool in pools)
    counts = {pool: gpus[standing(pool)] // each_on.get(pool, 1) for pool in pools}
    each = [f"{key_of(p)}.workers={counts[p]} {key_of(p)}.gpus={each_on.get(p, 1 / together):g}" for p in pools]
    return " ".join(["cluster.layout=disaggregated", *each, f"learner.ranks={gpus['learner']} learner.gpus=1"])


def _gpus_of_a_worker(config: RunConfig) -> dict[str, int]:
    """Return on how many GPUs one worker of a pool works, of those that can have several."""
    return {"vlm": config.pools.vlm.tensor_parallel, "vdm": config.pools.vdm.context_parallel}


def _staleness(config: RunConfig, stage: str) -> int:
    return int(getattr(config, stage).rollout.max_staleness)


def with_overrides(config: RunConfig, texts: Iterable[str]) -> RunConfig:
    """Return ``config`` with overrides such as ``learner.ranks=4``."""
    values = config.model_dump(mode="json")
    for text in texts:
        apply_override(values, text)
    return parse_config(values)


# --- where things stand ----------------------------------------------------------------------------------------------


def _placed(
    config: RunConfig, hardware: Hardware, problems: list[Problem]
) -> tuple[PlacementPlan | None, tuple[Gpu, ...]]:
    """Return the placement and the GPUs with who stands on them; what speaks against it goes into ``problems``."""
    try:
        plan = placement_plan(config)
        unlabelled = tuple(dataclasses.replace(ask, labels={}, resources={}) for ask in plan.asks)
        bare = dataclasses.replace(plan, asks=unlabelled)  # what --gpus says nothing of
    except PlacementError as error:
        problems.append(Problem(str(error), "split"))
        return None, ()
    node = {"CPU": _PLENTY, "GPU": float(hardware.per_node)}
    problem = shortfall(bare, ClusterView((node,) * hardware.nodes))
    if problem is None:
        try:
            gpus = pack(bare, hardware.nodes, hardware.per_node)
        except PlacementError as error:
            problem = str(error)
        else:
            crowded = _ranks_together(config, gpus)
            if crowded:
                problems.append(Problem(crowded, "learner.gpus=1"))
            return plan, gpus
    asked = bare.total().get("GPU", 0.0)
    problems.append(
        Problem(f"{_without_cpus(problem)}; in all, the run asks for {asked:g} of {hardware.gpus} GPU(s)", "split")
    )
    return plan, ()


def _without_cpus(text: str) -> str:
    return text.replace(f"CPU {_PLENTY:g}, ", "")


def _ranks_together(config: RunConfig, gpus: Iterable[Gpu]) -> str:
    for gpu in gpus:
        groups = [member.slot // config.learner.ranks for member in gpu.members if member.role == LEARNER]
        if len(groups) > len(set(groups)):
            return (
                f"learner.gpus={config.learner.gpus:g} lets ranks of one group share a GPU, which NCCL refuses; give each a whole one, "
                "or share GPUs between roles with cluster.layout=colocated, which keeps ranks apart"
            )
    return ""


def _workers(config: RunConfig, placement: PlacementPlan | None) -> dict[str, float]:
    """Return how many GPUs work for each role; a role without any counts its workers, on CPUs."""
    counts = {role: section_of(config, role).workers for role in kinds_of(config)}
    counts[LEARNER] = config.learner.ranks * (2 if config.training == "all_in_one" else 1)
    shared = {ask.role for ask in placement.sharing} if placement else set()
    found: dict[str, float] = {}
    for role in counts:
        gpus = _gpus(config, role)
        if role in shared and placement is not None:
            found[role] = min(counts[role], placement.shared_gpus)
        else:
            # Workers with a share of a GPU share its speed.
            found[role] = max(1, math.ceil(counts[role] * gpus)) if 0 < gpus < 1 else counts[role]
    return found


def _gpus(config: RunConfig, role: str) -> float:
    section = config.learner if role == LEARNER else section_of(config, role)
    return float(section.gpus)


def _on_cpu(config: RunConfig, stage: StageDemand, rates: Rates) -> StageDemand:
    """Return ``stage`` with the demands on roles without a GPU as slow as cores are."""

    def slowed(demand):
        if _gpus(config, demand.role) > 0 or demand.source == "measured":
            return demand
        section = config.learner if demand.role == LEARNER else section_of(config, demand.role)
        dtype = getattr(section, "dtype", "float32")
        factor = rates.flops(dtype) / (CPU_FLOPS * max(1.0, section.cpus))
        return dataclasses.replace(
            demand, unit_s=demand.unit_s * factor, fixed_s=demand.fixed_s * factor, source=f"{demand.source}, on CPUs"
        )

    return dataclasses.replace(stage, demands=tuple(slowed(demand) for demand in stage.demands))


# --- what speaks against it ------------------------------------------------------------------------------------------


def _context_problems(config: RunConfig, models: Models, kinds: Iterable[Process]) -> list[Problem]:
    """Return what the VLM's context length and KV cache do not hold."""
    pool = config.pools.vlm
    completion = max(config.stage1.text.max_tokens, config.stage2.text.max_tokens)
    longest = models.prompt.prompt + completion
    if longest > pool.max_model_len:
        room = 256 * math.ceil(longest / 256)
        return [
            Problem(
                f"a prompt of about {models.prompt.prompt} tokens ({models.prompt.video} of the video) and {completion} of its "
                f"completion exceed pools.vlm.max_model_len={pool.max_model_len}",
                f"pools.vlm.max_model_len={room}",
            )
        ]
    engine = next(kind for kind in kinds if kind.role == "vlm")
    if pool.gpus and sequences_in_cache(config, models, engine.parts["KV cache"]) < 1:
        return [
            Problem(
                f"the KV cache of {engine.parts['KV cache'] / GIB:.1f} GiB holds less than one sequence of {longest} tokens",
                "pools.vlm.kv_cache_mib=null pools.vlm.gpu_memory_utilization=0.85",
            )
        ]
    return []


def _sharing_problems(config: RunConfig) -> list[Problem]:
    """Return why the learner's ranks, or a sampler's processes, cannot share the tokens of the artist's clips."""
    found = []
    for key in SHARERS:
        try:
            require_shareable(config, key)
        except ConfigError as error:
            gpus = " pools.vdm.gpus=1" if key == SAMPLERS_SHARE and config.pools.vdm.gpus else ""
            found.append(Problem(str(error), f"{key}=1{gpus}"))
    return found


def _memory_problems(
    config: RunConfig, hardware: Hardware, models: Models, gpus: Iterable[Gpu], kinds: tuple[Process, ...]
) -> list[Problem]:
    """Return one problem for each kind of GPU that is too small for what stands on it."""
    limit = USABLE * hardware.gib * GIB
    found: dict[tuple[str, ...], Problem] = {}
    for gpu in gpus:
        roles = tuple(sorted({member.role for member in gpu.members}))
        need = peak(gpu, kinds)
        if need <= limit or roles in found:
            continue
        largest = max((kind for kind in kinds if kind.role in roles), key=lambda kind: kind.total)
        part, size = max(largest.parts.items(), key=lambda item: item[1])
        if largest.loading >= sum(largest.parts.values()):
            part, size = "weights while it loads, before they are sharded", largest.loading
        who = " + ".join(_crew(gpu.members))
        what = (
            f"a GPU with {who} needs {need / GIB:.1f} GiB, and {limit / GIB:.1f} of {hardware.gib:g} GiB can be used; most of it is "
            f"the {largest.does}: {largest.total / GIB:.1f} GiB, of which {part} {size / GIB:.1f}"
        )
        found[roles] = Problem(what, _cure(config, hardware, models, gpu, largest))
    return list(found.values())


def _crew(members: Iterable[Member]) -> list[str]:
    counts: dict[str, int] = {}
    for member in members:
        counts[member.role] = counts.get(member.role, 0) + 1
    return [f"{count} {role}" if count > 1 else role for role, count in counts.items()]


def _cure(config: RunConfig, hardware: Hardware, models: Models, gpu: Gpu, largest: Process) -> str:
    """Return the first overrides, single or added up, with which ``gpu`` is large enough by this same arithmetic; "" without."""
    limit = USABLE * hardware.gib * GIB
    tried: list[str] = []
    for text in _remedies(config, largest):
        for texts in ([text], [*tried, text]):
            try:
                other = with_overrides(config, texts)
            except ConfigError:
                continue
            if peak(gpu, processes(other, models, hardware.gib)) <= limit:
                return " ".join(texts)
        tried.append(text)
    return ""


def _remedies(config: RunConfig, process: Process) -> list[str]:
    """Return what makes ``process`` smaller, what costs least first."""
    pools, learner = config.pools, config.learner
    halves = [2**k for k in range(10, -1, -1)]
    if process.role == "vlm":
        shares = [f"pools.vlm.gpu_memory_utilization={share}" for share in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)]
        cache = [f"pools.vlm.kv_cache_mib={n * 1024}" for n in (16, 8, 4, 2, 1)]
        return ["pools.vlm.dtype=bfloat16", *(shares if pools.vlm.kv_cache_mib is None else cache)]
    if process.role == "vdm":
        batches = [f"pools.vdm.max_batch={n}" for n in halves if n < pools.vdm.max_batch]
        return ["pools.vdm.dtype=bfloat16", *batches]
    if process.role == LEARNER:
        batches = [f"learner.micro_batch={n}" for n in halves if n < learner.micro_batch]
        completions = [f"learner.micro_completions={n}" for n in halves if n < (learner.micro_completions or 0)]
        return ["learner.dtype=bfloat16", "learner.activation_checkpointing=true", *batches, *completions]
    return []


# --- what would be better --------------------------------------------------------------------------------------------


def splits_of(
    config: RunConfig, hardware: Hardware, models: Models, stages: tuple[StageDemand, ...]
) -> tuple[Split, ...]:
    """Return the best split with GPUs of their own, and all GPUs shared, as far as they fit into memory."""
    found = []
    each, ranks = _gpus_of_a_worker(config) | {LEARNER: config.learner.context_parallel}, 1
    while True:
        try:
            split = best_split(stages, hardware.gpus, least={LEARNER: ranks}, each=each)
        except PlacementError:
            break
        if _roomy(config, hardware, models, split):
            found.append(split)
            break
        ranks = split.gpus[LEARNER] + 1  # fewer ranks hold larger shards, so only more of them can help
    if each["vlm"] == each["vdm"] == 1:
        shared = shared_split(stages, hardware.gpus)
        for percent in range(85, 5, -5):  # the engine takes what it is given; the others need the rest
            shared = dataclasses.replace(shared, engine_share=percent / 100)
            if _roomy(config, hardware, models, shared):
                kinds = processes(with_overrides(config, overrides(config, shared).split()), models, hardware.gib)
                timed = shared_split(switching(stages, kinds), hardware.gpus)
                found.append(dataclasses.replace(timed, engine_share=shared.engine_share))
                break
    return tuple(found)


def _roomy(config: RunConfig, hardware: Hardware, models: Models, split: Split) -> bool:
    """Return whether ``split`` of ``config`` fits into the GPUs' memory, by the same arithmetic."""
    try:
        other = with_overrides(config, overrides(config, split).split())
        gpus = pack(placement_plan(other), hardware.nodes, hardware.per_node)
    except (ConfigError, PlacementError):
        return False
    kinds = processes(other, models, hardware.gib)
    return all(peak(gpu, kinds) <= USABLE * hardware.gib * GIB for gpu in gpus)


# --- what was taken for granted --------------------------------------------------------------------------------------


def _assumptions(config: RunConfig, rates: Rates, models: Models, measured: Measured | None) -> Iterable[str]:
    if measured is None:
        yield f"seconds are FLOPs and bytes over assumed rates, not measurements: {rates.source}"
    else:
        yield f"seconds marked measured are of {measured.run}; the others are over assumed rates: {rates.source}"
    yield (
        "every group at its worst: completions reach max_tokens, all captions of a group differ and are drawn, all anchors pass; "
        f"captions have {CAPTION_TOKENS} tokens, prompts {models.prompt.text} beside the video's"
    )
    if config.cluster.layout == "colocated":
        yield "a step is: think, embed, draw, score, learn, one after another, since they share GPUs"
    elif config.stage1.rollout.max_staleness or config.stage2.rollout.max_staleness:
        yield "with max_staleness > 0 the slowest role sets the pace; without, think, then draw and score together, then learn"
    else:
        yield "a step is: think, then draw and score together (the slower counts), then learn"
    yield f"where roles share GPUs, what rests moves off and on again once a step, at {SWITCH_BANDWIDTH / 1e9:g} GB/s"
    if any(section.lora.rank == 0 for section in (config.stage1, config.stage2) if section.steps):
        yield f"whole models are published at {PUBLISH_BANDWIDTH / 1e9:g} GB/s"
    if parts := costs.rough(models.vlm):
        yield f"the thinker's {' and '.join(parts)}: two operations for each parameter and token, since no formula of its make is known"
    for pool, known in models.judges.items():
        what = "activations and seconds" if isinstance(known, int) else "memory beside the CUDA context, and seconds"
        yield f"reward {pool}: its {what} are not counted" + ("" if isinstance(known, int) else f" ({known})")
    yield "decoding of input video, the network between ranks and between nodes, and checkpoints are not counted"
    yield (
        f"memory: {CONTEXT / GIB:g} GiB of CUDA context per process, vLLM prefills {VLLM_BATCH_TOKENS} tokens at once, allocators' "
        f"fragments take {1 - USABLE:.0%}; activations are estimates"
    )
    if any(count and _gpus(config, role) == 0 for role, count in _workers(config, None).items()):
        yield f"roles without a GPU compute {CPU_FLOPS / 1e9:g} GFLOP/s per reserved core (one at least)"

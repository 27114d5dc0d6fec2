"""Turn a run's configuration into what ``cluster.manifests`` writes down: groups of workers, the entrypoint, the site's paths.

Called as a program it writes the committed examples anew: ``python -m pipeline.commands.manifests`` (``make docs``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.layout import SHARED
from cluster.manifests import Group, Kind, RunShape, Site, group_of, render
from cluster.manifests.shape import ROLE_LABEL
from pipeline.config import RunConfig, load_config
from pipeline.config.load import find_config, override_of, to_yaml
from pipeline.fleet.open import LEARNER, placement_plan, pool_sections

EXAMPLES = Path(__file__).resolve().parents[2] / "cluster" / "manifests" / "examples"
EXAMPLE_RUNS: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    ("vans_1gpu", ("rayjob", "slurm")),
    ("vans_paper", ("rayjob",)),
    ("vans_8gpu", ("rayjob", "rayservice", "slurm", "launcher")),
    ("vans_2node", ("rayjob", "slurm")),
)

_SEPARATE: tuple[Kind, ...] = ("rayjob", "raycluster", "rayservice")
"""Kinds whose nodes differ: each group of workers stands on nodes made for it, found by their label."""


def write_manifests(config: str, overrides: Sequence[str], kind: Kind, out: Path, site: Site) -> list[Path]:
    """Write the files of ``kind`` for a run into ``out`` and return their paths; scripts are made executable.

    Raises ConfigError for a configuration that no run would take, ManifestError for one that cannot lie on such a site.
    """
    shape = service_shape(config, overrides, site) if kind == "rayservice" else run_shape(config, overrides, kind, site)
    files = render(kind, shape, site)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files.items():
        path = out / name
        path.write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            path.chmod(0o755)
        paths.append(path)
    return paths


def run_shape(config: str, overrides: Sequence[str], kind: Kind, site: Site) -> RunShape:
    """Return the run of ``config`` with ``overrides`` as it goes onto a cluster of ``kind``.

    Relative folders of data and output come to lie on the shared storage. Where nodes differ, roles without a label selector
    of their own get one, so that each finds the nodes that were made for it.
    """
    source, name, text = _source(config, kind, site)
    run = load_config(config, overrides)
    placed = list(overrides) + _on_shared_storage(run, site)
    if kind in _SEPARATE:
        placed += _placement(run) + _labels(run)
    run = load_config(config, placed)
    return RunShape(
        name=run.name,
        groups=tuple(_groups(run)),
        entrypoint=("python", "-m", "pipeline", "train", source, *placed, "--resume-if-any"),
        driver_cpus=1.0 + run.data.decoders,
        source=name,
        config_file=text,
    )


def service_shape(config: str, overrides: Sequence[str], site: Site) -> RunShape:
    """Return the server of ``config`` with ``overrides``: a pod for each replica of its two models (``serve.vlm``, ``serve.vdm``)."""
    source, name, text = _source(config, "rayservice", site)
    run = load_config(config, overrides)
    placed = list(overrides) + _on_shared_storage(run, site)  # no replica's size depends on where the folders are
    return RunShape(
        name=run.name,
        groups=tuple(_replicas(run, policy) for policy in ("vlm", "vdm")),
        entrypoint=(),
        source=name,
        config_file=text,
        application={"import_path": "pipeline.serve.build:build", "args": {"config": source, "overrides": placed}},
    )


def _replicas(run: RunConfig, policy: str) -> Group:
    section, pool = getattr(run.serve, policy), getattr(run.pools, policy)
    limits = section.autoscale
    return group_of(
        policy,
        limits.min if limits.enabled else section.replicas,
        {"CPU": pool.cpus, "GPU": section.gpus(pool), **pool.resources},
        most=limits.max if limits.enabled else 0,
    )


def _source(config: str, kind: Kind, site: Site) -> tuple[str, str, str | None]:
    """Return how the cluster finds ``config``, what a file's first line calls it, and its text where it travels along."""
    found = find_config(config)
    if found.stem == config:
        return config, config, None
    if kind in _SEPARATE:
        return site.config_path, found.name, to_yaml(load_config(config))  # whole, whatever other files it builds on
    return str(found.resolve()), found.name, None


def _on_shared_storage(run: RunConfig, site: Site) -> list[str]:
    folders = {"out": run.out, "data.train": run.data.train, "data.eval": run.data.eval, "data.val": run.data.val}
    return [
        override_of(key, f"{site.shared}/{path}")
        for key, path in folders.items()
        if isinstance(path, Path) and not path.is_absolute()
    ]


def _placement(run: RunConfig) -> list[str]:
    """Return overrides that keep STRICT_PACK for the learner alone: a pod is a node to Ray, and a pool has a pod for each worker."""
    strategy = run.cluster.placement
    if strategy != "STRICT_PACK" or run.cluster.layout == "colocated":
        return []
    kept = [] if run.learner.placement else [f"learner.placement={strategy}"]
    return ["cluster.placement=PACK", *kept]


def _labels(run: RunConfig) -> list[str]:
    """Return overrides that give each role without a label selector the label of its group's nodes."""
    plan = placement_plan(run)
    overrides = []
    for ask in plan.asks:
        home = plan.home(ask.role, 0)
        if home is not None and not ask.labels:
            section = LEARNER if ask.role == LEARNER else f"pools.{ask.role}"
            overrides.append(f"{section}.labels.{ROLE_LABEL}={_group_name(home[0])}")
    return overrides


def _groups(run: RunConfig) -> list[Group]:
    most = {}
    for name in pool_sections(run):
        pool = getattr(run.pools, name)
        most[name] = pool.autoscale.max if pool.autoscale.enabled else pool.workers
    return [
        group_of(
            _group_name(room.name),
            len(room.bundles),
            {key: max(bundle.get(key, 0.0) for bundle in room.bundles) for bundle in room.bundles for key in bundle},
            labels=room.labels,
            strategy=room.strategy,
            most=most.get(room.name, 0),
            together=room.name in (LEARNER, SHARED),
        )
        for room in placement_plan(run).reservations()
    ]


def _group_name(reservation: str) -> str:
    return "gpu" if reservation == SHARED else reservation


def write_examples() -> list[Path]:
    """Write ``cluster/manifests/examples`` for the bundled runs, each in a folder of its name, a server in one of its own."""
    return [
        path
        for name, kinds in EXAMPLE_RUNS
        for kind in kinds
        for path in write_manifests(
            name, (), kind, EXAMPLES / (f"{name}_serve" if kind == "rayservice" else name), Site()
        )
    ]


if __name__ == "__main__":
    for written in write_examples():
        print(written.relative_to(EXAMPLES.parent))

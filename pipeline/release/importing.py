"""``vans import-release``: a clone of the authors' repository and two weight files become folders, a run and a report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigError
from pipeline.config import load_config
from pipeline.config.load import run_name
from pipeline.release.artist import Artist, artist_name, plan_artist
from pipeline.release.clone import Release, read_clone
from pipeline.release.run_file import origins, run_values, written
from pipeline.release.tensors import Account, Header, headers, summary
from pipeline.release.thinker import Thinker, belongs, config_of, plan_thinker, thinker_name

RUN, REPORT = "run.yaml", "report.json"


@dataclass(frozen=True)
class Imported:
    """What was written, and what became of every tensor."""

    folder: Path
    accounts: tuple[Account, ...]
    kept: int  # weights of the artist's transformer that are the base's
    models: Mapping[str, str]  # as section models of the run names them


def import_release(
    clone: Path, vlm: Path, vdm: Path, base_vlm: str, base_vdm: str, out: Path, run: str = "vans_paper"
) -> Imported:
    """Write ``out`` from the released files ``vlm`` and ``vdm`` over their bases; returns what was done.

    ``out`` gets ``vlm/`` (or ``vlm_adapter/``, where all adapters are in the language model), ``vdm/``, ``run.yaml`` and
    ``report.json``. ``base_vlm`` and ``base_vdm`` are folders or hub names. ``run`` is the run whose placement and training the YAML
    takes. Everything is compared by names and shapes before anything is written; an import that is interrupted leaves nothing at
    ``out``.

    Raises CheckpointError where ``clone`` is no such clone, a file is none that is safe to read, or a tensor fits nowhere; ConfigError
    where the clone's values make no run.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out {out}: there is something already; choose another folder, or remove it")
    release = read_clone(clone)
    thinkers, artists, replaced = _pooled(headers(vdm, "--vdm"), headers(vlm, "--vlm"))
    _require(
        thinkers,
        vlm,
        "--vlm",
        "the thinker: their names begin with mllmagent.mllm_backbone. or pipe.mllm.mllm_backbone.",
    )
    _require(
        artists, vdm, "--vdm", "the artist: their names are those of Wan's authors, such as blocks.0.self_attn.q.weight"
    )
    thinker = plan_thinker(thinkers, base_vlm, release.lora)
    artist = plan_artist(artists, base_vdm)
    _check_base(thinker.folder, release)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        models = _models(thinker.write(partial, base_vlm), artist.write(partial), out, base_vlm)
        values = run_values(release, models, run, run_name(out.name))
        (partial / RUN).write_text(written(values), encoding="utf-8")
        _load(partial / RUN, clone)
        accounts = (*replaced, *thinker.accounts, *artist.accounts)
        report = _report(clone, release, thinker, artist, accounts)
        (partial / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Imported(out, accounts, artist.kept, models)


def _pooled(*files: Mapping[str, Header]) -> tuple[dict[str, Header], dict[str, Header], list[Account]]:
    """Return the thinker's tensors, the artist's, and what became of those that a later file replaces.

    ``files`` are in the order in which the release loads them. Names are without what the release puts before them.
    """
    thinkers: dict[str, Header] = {}
    artists: dict[str, Header] = {}
    replaced = []
    for name, header in (item for file in files for item in file.items()):
        part, own, found = ("thinker", thinker_name, thinkers) if belongs(name) else ("artist", artist_name, artists)
        before = found.get(own(name))
        if before is not None:
            why = f"{header.name} of {header.file.name} is the same one, and the release loads it after this one"
            replaced.append(Account(before, part, False, why))
        found[own(name)] = header
    return thinkers, artists, replaced


def _require(tensors: Mapping[str, Header], file: Path, option: str, what: str) -> None:
    if not any(header.file == file for header in tensors.values()):
        raise CheckpointError(f"{option}={file} holds no tensor of {what}")


def _check_base(folder: Path, release: Release) -> None:
    """Raise where the thinker's base cuts frames otherwise, takes no video, or cannot write the release's tags."""
    from actors.vlm.loading import load_processor
    from actors.vlm.prompt import check_prompt
    from actors.vlm.settings import PromptSection

    vision = config_of(folder).get("vision_config", {})
    unit = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
    if unit != release.values["multiple"]:
        raise CheckpointError(
            f"--base-vlm: {folder} reads frames in squares of {unit} pixels, the clone's frames are multiples of "
            f"{release.values['multiple']} ({release.where('multiple')}): it is of another model"
        )
    try:
        processor = load_processor(folder)
    except CheckpointError as error:
        raise CheckpointError(f"--base-vlm: {error}") from error
    prompt = PromptSection(system=release.values["system"], think_tag=release.think_tag, answer_tag=release.answer_tag)
    check_prompt(processor.tokenizer, prompt)


def _models(thinker: Path, artist: Path, out: Path, base_vlm: str) -> dict[str, str]:
    """Return section models' keys for folders that were written beside ``out`` and are going to stand in it."""
    folder = Path(base_vlm).expanduser()
    base = str(folder.resolve()) if folder.is_dir() else base_vlm
    whole = {"vlm": str(out / thinker.name)}
    adapted = {"vlm": base, "vlm_adapter": str(out / thinker.name)}
    return {**(whole if thinker.name == "vlm" else adapted), "vdm": str(out / artist.name)}


def _load(file: Path, clone: Path) -> None:
    try:
        load_config(file)
    except ConfigError as error:
        raise ConfigError(f"what {clone} says makes no run: {error}") from error


def _report(
    clone: Path, release: Release, thinker: Thinker, artist: Artist, accounts: tuple[Account, ...]
) -> dict[str, Any]:
    return {
        "clone": str(clone.resolve()),
        "settings": origins(release),
        "bases": {"thinker": str(thinker.folder), "artist": str(artist.folder)},
        "summary": summary(accounts),
        "artist_weights_of_the_base": artist.kept,
        "tensors": [
            {
                "file": str(account.header.file),
                "name": account.header.name,
                "shape": list(account.header.shape),
                "dtype": account.header.dtype,
                "part": account.part,
                "used": account.used,
                "why": account.why,
                "place": account.place,
            }
            for account in accounts
        ],
    }

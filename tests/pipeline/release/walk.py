"""The commands of docs/vans.md, and the tiny folders that they are tried on."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path

from tests.pipeline.release.released import artist_tensors, build_clone, save, thinker_tensors, tuned_thinker

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "vans.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("vans ")
]
"""Arguments of each command, in the order of the page."""


def build_folders(folder: Path, base_vlm: Path, base_vdm: Path, clip: Path, shards: Path) -> None:
    """Make what the page takes for granted, under its names, in ``folder``: clone, weights, bases, CLIP, clips and CSV files."""
    build_clone(folder / "VANS")
    (folder / "checkpoints").mkdir()
    save(thinker_tensors(tuned_thinker(base_vlm)), folder / "checkpoints" / "vlm.safetensors")
    save(artist_tensors()[1], folder / "checkpoints" / "vdm.safetensors")
    shutil.copytree(base_vlm, folder / "Qwen2.5-VL-3B-Instruct")
    shutil.copytree(base_vdm, folder / "Wan2.1-T2V-1.3B-Diffusers")
    shutil.copytree(clip, folder / "clip-vit-large-patch14")
    build_table(folder / "test.csv", folder / "clips", shards / "test", 3)
    build_table(folder / "train.csv", folder / "clips", shards / "train", 4)
    shutil.copy(folder / "clips" / "test_0_in.mp4", folder / "input.mp4")


def build_table(file: Path, clips: Path, shards: Path, rows: int) -> None:
    """Write the first ``rows`` samples of ``shards`` as the release's CSV, with its byte order mark, and their clips."""
    import pyarrow.parquet as pq

    clips.mkdir(exist_ok=True)
    table = pq.read_table(sorted(shards.glob("*.parquet"))[0]).slice(0, rows).to_pylist()
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["output_video_path", "input_video_path", "ENG_Instruction", "ENG_GT_Caption"])
        for number, row in enumerate(table):
            names = [f"{file.stem}_{number}_{end}.mp4" for end in ("out", "in")]
            for name, column in zip(names, ("target_video", "input_video"), strict=True):
                (clips / name).write_bytes(row[column])
            writer.writerow([*names, row["question"], row["caption"]])

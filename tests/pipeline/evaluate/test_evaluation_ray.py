"""``vans evaluate --predictions``: two outside systems in one table, from the command line, on a real reward pool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.data.toy import make_sample
from pipeline.evaluate.predictions import Prediction, write_predictions

pytestmark = [pytest.mark.ray]
COUNT = 6


class Colours(torch.nn.Module):
    """The mean colour of each frame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=[3, 4]).flatten(1)


def test_two_folders_stand_in_one_table_and_are_compared(ray_alone: None, toy_shards: Path, tmp_path: Path) -> None:
    toys = [make_sample(i, "test") for i in range(COUNT)]
    truth = [Prediction(t.id, t.caption, t.answer_text, t.target_frames) for t in toys]
    stills = [Prediction(t.id, t.caption, "", np.repeat(t.input_frames[-1:], 9, axis=0)) for t in toys[1:]]
    write_predictions(tmp_path / "oracle", truth, fps=8.0)
    write_predictions(tmp_path / "b", [Prediction(toys[0].id, ""), *stills], fps=8.0)
    torch.jit.script(Colours()).save(str(tmp_path / "colours.pt"))
    out = tmp_path / "out"
    arguments = ["evaluate", "toy", f"data.eval={toy_shards}/test", f"evaluate.samples={COUNT}", "--out", str(out)]
    # Nothing but scorers is started, so the pair that the configuration names need not be there.
    arguments += ["models.vlm=/no/such/vlm", "models.vdm=/no/such/vdm", "models.vdm_adapter=/no/such/adapter"]
    arguments += ["--predictions", f"still={tmp_path}/b", "--predictions", f"{tmp_path}/oracle"]
    arguments += ["--compare", "still", "oracle", "--fvd-extractor", f"{tmp_path}/colours.pt"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for text in ("FVD[colours] ↓", "oracle − still", "warning FVD[colours] of oracle: not more clips", "alarm still"):
        assert text in result.output
    stored = json.loads((out / "table.json").read_text())
    assert list(stored["systems"]) == ["still", "oracle"] and stored["samples"]["all"] == COUNT
    differences = stored["comparison"]["differences"]["all"]
    assert differences["clip_v"]["low"] > 0.1 and differences["frechet"]["high"] < 0.01
    assert differences["rouge_l"]["differ"] == 1, "the same captions, but for the question left out"
    assert (out / "contact_sheet.png").is_file()

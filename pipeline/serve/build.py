"""The application as a cluster's Ray Serve builds it from a file, with ``import_path: pipeline.serve.build:build`` (docs/serve.md)."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import ConfigError
from cluster.variables import SERVE_TOKEN
from pipeline.config import load_config
from pipeline.serve.app import application
from pipeline.serve.examples import held_out


class BuildArguments(BaseModel):
    """``args`` of the application in the file: a bundled run or a YAML file, and overrides of it, as the commands take them."""

    model_config = ConfigDict(extra="forbid")

    config: str
    overrides: list[str] = []


def build(args: dict[str, Any]) -> Any:
    """Return the application of the run that ``args`` name (:class:`BuildArguments`).

    Raises ConfigError for other arguments, a configuration that no run would take, and where the variable VANS_SERVE_TOKEN is
    empty: on a cluster other machines reach the server. CheckpointError where a model is missing.
    """
    try:
        wanted = BuildArguments.model_validate(args)
    except ValidationError as error:
        raise ConfigError(
            f"the application's args should be config and overrides: {error.errors()[0]['msg']}"
        ) from error
    token = os.environ.get(SERVE_TOKEN, "").strip()
    if not token:
        raise ConfigError(f"{SERVE_TOKEN} is not set; the manifest takes it from a Secret (docs/serve.md)")
    config = load_config(wanted.config, wanted.overrides)
    return application(config, token, None, examples=held_out(config, None))

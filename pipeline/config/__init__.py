"""Configuration: what a user may write (``schema``), how it is read (``load``), and what a resumed run must share (``resume``)."""

from pipeline.config.load import flatten, load_config, parse_config, to_yaml
from pipeline.config.resume import config_digest, differences
from pipeline.config.schema import RunConfig

__all__ = ["RunConfig", "config_digest", "differences", "flatten", "load_config", "parse_config", "to_yaml"]

"""Configuration: what a user may write (``schema``) and how it is read (``load``)."""

from pipeline.config.load import config_digest, flatten, load_config, parse_config, to_yaml
from pipeline.config.schema import RunConfig

__all__ = ["RunConfig", "config_digest", "flatten", "load_config", "parse_config", "to_yaml"]

"""Configuration.

For: what a user may write (``schema``), how it is read (``load``), what a resumed run must share (``resume``).
Not for: settings that an actor owns (they stand beside it).
Begin with ``schema``.
"""

from pipeline.config.load import flatten, load_config, parse_config, to_yaml
from pipeline.config.resume import config_digest, differences
from pipeline.config.schema import RunConfig

__all__ = ["RunConfig", "config_digest", "differences", "flatten", "load_config", "parse_config", "to_yaml"]

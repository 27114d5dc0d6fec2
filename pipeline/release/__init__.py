"""``vans import-release``: VANS as its authors released it, made into folders and a run that every command here takes.

For: reading a clone's settings, converting the two weight files, the report of every tensor, the run's YAML.
Not for: the switches that a released pair needs (``pipeline.config``), its data (``pipeline.data.importers``).
Begin with ``importing``.
"""

from pipeline.release.importing import Imported, import_release

__all__ = ["Imported", "import_release"]

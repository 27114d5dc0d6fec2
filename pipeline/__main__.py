"""``python -m pipeline`` is the same program as ``vans``."""

from pipeline.cli import main

main()

"""Watching a run's pools and changing their sizes while it runs.

For: the monitor in the run, the autoscaler, the client of ``vans status`` and ``vans scale``.
Not for: the pools themselves (``actors.pool``); training never waits for any of it.
Begin with ``monitor``.
"""

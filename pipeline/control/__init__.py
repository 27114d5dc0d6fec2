"""Watching a run's pools and changing their sizes while it runs: snapshots, the autoscaler, ``vans status`` and ``vans scale``.

In the run: ``monitor``, which looks at the pools, decides (``autoscale``), exports (``exporter``) and answers the board, a
small Ray actor (``actors.control``). In another process: ``client`` finds the board by ``record``, ``show`` prints. Training
never waits for any of it.
"""

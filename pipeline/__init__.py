"""The story: configuration, data, the two stages, evaluation, tracking, checkpoints, command line."""

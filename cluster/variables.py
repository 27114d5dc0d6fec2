"""Environment variables that one part of the project writes down and another reads: one place, so that both mean the same."""

from __future__ import annotations

SERVE_TOKEN = "VANS_SERVE_TOKEN"  # noqa: S105 - the variable's name
"""The token that ``vans serve`` wants of whoever asks; a manifest takes it from a Secret."""

"""Scoring answers inside an actor: CLIP features, components by name, the reward worker."""

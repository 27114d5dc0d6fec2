"""Held-out evaluation: predictions of any system, their scores, the table and the contact sheets."""

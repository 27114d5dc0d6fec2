"""Models that are asked over HTTP, as OpenAI's are: chat completions.

For: one ask with its tries, its failures told apart. Not for: what is asked, and what an answer is worth.
Begin with ``client``.
"""

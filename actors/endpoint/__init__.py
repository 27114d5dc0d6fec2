"""Models that are asked over HTTP, as OpenAI's are: chat completions.

For: one ask with its tries, and its failures told apart.
Not for: what is asked, and what an answer is worth.
Begin with ``client``.
"""

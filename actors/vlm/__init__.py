"""The thinker: a vision-language model that writes and learns.

For: prompts and their pixels, the vLLM engine, log-probabilities, its worker.
Not for: what is learnt (``actors.learner.objectives``).
Begin with ``policy``.
"""

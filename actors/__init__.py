"""Everything that runs inside a Ray actor: policies, engines, samplers, scorers, learners, pools."""

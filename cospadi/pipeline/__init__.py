"""A study: its cells, its jobs, what they cost, and the stages that the rules run."""

"""A policy meets an anatomy: the plan, and ways to look at it."""

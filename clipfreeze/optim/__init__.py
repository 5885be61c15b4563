"""Param groups, optimizers by name and schedules, as a plan has them."""

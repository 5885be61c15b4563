"""Data, objective, loop and evaluation: what runs a plan once it is applied."""

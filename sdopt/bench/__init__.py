"""Measure candidates of a bundle: how long each stage takes, what it costs in memory, and what it draws."""

"""Quantisation of a bundle: trajectories, scales, graphs with Q/DQ, and what of them pays."""

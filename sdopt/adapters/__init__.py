"""Adapter files: what they hold, which layers they change, and by how much."""

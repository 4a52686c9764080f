"""A function in another process: typed calls, JSON lines, and no child that outlives who asked for it."""

"""Graphs and weights -> TensorRT plans: which are wanted, the ladder that makes them, and the child that builds one."""

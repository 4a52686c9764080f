"""The torch modules of a pipeline, with the flat named inputs and outputs that graphs and engines have.

Below export and backends, because both need them: the tracer traces them, the torch baseline runs them.
"""

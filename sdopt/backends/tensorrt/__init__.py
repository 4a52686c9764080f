"""TensorRT-RTX and general TensorRT: graph -> network -> audited plan -> session. One Python API, one code path."""

"""ONNX -> ONNX, and what a graph says of itself. A graph here is an `onnx_ir.Model`; weights may be without data."""

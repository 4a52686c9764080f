"""ONNX -> engine -> numbers: one small protocol, one leaf module for each runtime."""

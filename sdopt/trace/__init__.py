"""Component -> ONNX: tracing without weights, the weight file that graphs name, and parity with torch."""

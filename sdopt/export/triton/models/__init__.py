"""Files that are copied into Triton's model repository, where they run with numpy, tokenizers and onnxruntime alone."""

"""What is on disk: files, safetensors, the bundle's manifest, fingerprints and the content-addressed store."""

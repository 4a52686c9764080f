"""Bundle to pictures: real diffusers pipelines whose networks are engine sessions."""

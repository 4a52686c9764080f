"""A bundle as other tools want it: Triton's model repository, ComfyUI's engines, optimum's folder.

`triton_models` is what runs inside Triton, without sdopt, torch or diffusers.
"""

"""Any Stable Diffusion checkpoint -> components: configs and tensors as byte ranges. Nothing is loaded
whole."""

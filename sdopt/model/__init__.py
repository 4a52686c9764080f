"""Pure data: what a Stable Diffusion model is made of and what is asked of it. No torch, no disk, no GPU."""

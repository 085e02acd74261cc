"""Fine-tune, measure, register and serve Stable Diffusion XL on small clinical photo sets."""

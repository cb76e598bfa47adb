"""From a prompt to what a denoiser reads."""

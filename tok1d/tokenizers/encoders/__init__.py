"""Images to latents, one class a file."""

"""Latents to codes, one class a file."""

"""Codes to images, one class a file."""

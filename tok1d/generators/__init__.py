"""Generators of token sequences: autoregressive, masked, flow and bit models on shared parts."""

"""Encoders, quantizers, decoders and length rules, and the tokenizer they compose."""

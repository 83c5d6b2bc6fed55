"""Thin classes on transformers' own decoders."""

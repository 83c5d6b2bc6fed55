"""The classes by their decoders."""

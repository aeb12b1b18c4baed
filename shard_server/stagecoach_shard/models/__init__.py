"""The model families, and their layers in plain torch."""

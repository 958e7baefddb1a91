"""TODO."""

CONVERTERS = {}

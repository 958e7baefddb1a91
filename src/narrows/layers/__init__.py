"""Layers: parameters, initialisation and shapes. The mathematics is in `narrows.ops`."""

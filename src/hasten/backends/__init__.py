"""Backends: what plays a Program. Each is found by name in the entry points of group ``hasten.backends``."""

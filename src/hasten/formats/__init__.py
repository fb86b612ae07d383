"""Formats: how weights lie on disk and in memory, as numpy; the plain meaning of each layout."""

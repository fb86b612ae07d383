"""Compress: transforms, Model → Model, that make a model smaller, and what they are measured by."""

"""Structured pruning: feed-forward units, heads, the residual width or whole blocks go, and what is left is an ordinary, smaller Model."""

"""Transforms that change what attention keeps of each token: fewer heads, a latent row, a window, another layer's keys and values, or no
token by itself but the sum of all."""

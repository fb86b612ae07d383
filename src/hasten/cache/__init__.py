"""Cache: which page holds which tokens of which sequence. Decisions only; a backend has the memory."""

from hasten.cache.cache import Cache, SequencePages
from hasten.cache.groups import PageGroup, StatePages, TokenPages, page_groups
from hasten.cache.pool import PagePool
from hasten.cache.tree import Match, PrefixTree

__all__ = ["Cache", "Match", "PageGroup", "PagePool", "PrefixTree", "SequencePages", "StatePages", "TokenPages", "page_groups"]

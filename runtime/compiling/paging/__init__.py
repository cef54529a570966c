"""Rewrites exported decoder graphs so that keys and values are cached in pages."""

from runtime.compiling.paging.cast import cast
from runtime.compiling.paging.page import PagedGraph, page
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.signature import is_decoder_graph
from runtime.compiling.paging.site import AttentionSite, attending

__all__ = [
    "AttentionSite",
    "NotPageable",
    "PagedGraph",
    "attending",
    "cast",
    "is_decoder_graph",
    "page",
]

"""Optimizers whose states page."""

from .adamw_paged import PagedAdamW, PagedAdamW8bit, PagingReport

__all__ = ["PagedAdamW", "PagedAdamW8bit", "PagingReport"]

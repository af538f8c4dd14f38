"""Optimizers whose states page."""

from .adamw_paged import PagedAdamW, PagedAdamW8bit
from .paging_report import PagingReport

__all__ = ["PagedAdamW", "PagedAdamW8bit", "PagingReport"]

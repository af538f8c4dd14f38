"""Optimizers whose states can be paged out of the device's memory."""

from .adamw_paged import PagedAdamW, PagedAdamW8bit
from .paging_report import PagingReport

__all__ = ["PagedAdamW", "PagedAdamW8bit", "PagingReport"]

"""Applies the fixes of Triton's interpreter under TRITON_INTERPRET=1 before any kernel runs."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import triton_interpreter

    triton_interpreter.install()

"""The C++ library's sets on this kind of processor, the best first, as setup.py names them."""

from __future__ import annotations

import platform

SETS = ("avx512_bf16", "avx512", "avx2", "portable")
INT8_SETS = ("avx512vnni", "avxvnni", "avx2", "portable")
if platform.machine().lower() in ("aarch64", "arm64"):
    SETS = ("neon_bf16", "neon", "portable")
    INT8_SETS = ("neon_i8mm", "neon_dotprod", "neon", "portable")

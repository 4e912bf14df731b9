"""Triton kernels, one file an operator; `configs` holds their tiles, `aot` compiles them all."""

"""What the Triton kernels share: launches, tile helpers, configurations' tables, drivers."""

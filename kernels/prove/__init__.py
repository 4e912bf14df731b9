"""What proves the kernels without a GPU: ahead-of-time builds, index widths, hazards."""

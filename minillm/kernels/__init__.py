"""Fast attention and matrix products, by library, by Triton and by blocks: what a student need not read."""

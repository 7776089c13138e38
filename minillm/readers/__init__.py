"""Text of the real world: files, archives and names in, documents out, with every fault counted."""

"""From files on disk to packed, sharded batches of tokens."""

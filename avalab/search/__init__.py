"""Which parts of a model a machine does not need: alternatives of each block, priced and put together."""

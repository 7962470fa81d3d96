"""A norm and what stands before or behind it: how fuse and fold find, change and prove them."""

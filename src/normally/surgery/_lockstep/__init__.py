"""Micro-batches that go through a model together, layer by layer."""

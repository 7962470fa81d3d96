"""Tests with real processes: what N of them compute is what one computes of all their data."""

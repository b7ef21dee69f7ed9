"""Duplicate removal: URLs, near-duplicate documents by MinHash, repeated lines. Stages on `herdkern.engine`."""

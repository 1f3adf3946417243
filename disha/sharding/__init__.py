"""Sharded and partitioned models: their tensors, tensor-parallel weights, and the ranks."""

"""Measurements that the docs quote. Each is a command: `python -m benchmarks.NAME`."""

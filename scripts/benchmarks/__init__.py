"""The workloads of scripts/benchmark.py, a file for each kind, and how they are measured."""

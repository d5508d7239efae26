"""The workers of a cluster, and the cores and GPUs of each host.

Start with `discovery`.
"""

"""Detects a worker that hangs or gets a signal to end, and ends it.

Start with `stall`.
"""

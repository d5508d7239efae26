"""Notices that a worker hangs or is told to end, and ends it.

`stall` is where to begin.
"""

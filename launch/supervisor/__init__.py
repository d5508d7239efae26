"""The parent process: starts workers, shows their output, names who failed first.

`supervisor` is where to begin.
"""

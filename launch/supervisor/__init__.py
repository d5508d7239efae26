"""The parent process: starts workers, shows their output, reports which failed first.

Start with `supervisor`.
"""

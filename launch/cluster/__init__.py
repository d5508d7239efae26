"""Which workers there are, and what each host has.

`discovery` is where to begin.
"""

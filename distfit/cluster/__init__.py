"""What workers tell each other outside of steps.

`workers` is where to begin: who there is, and how they talk.
"""

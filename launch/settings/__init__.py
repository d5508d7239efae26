"""What a run is told: flags, configuration files, and checks of both.

`configuration` is where to begin.
"""

"""The settings of a run: flags, configuration files, and checks of both.

Start with `configuration`.
"""

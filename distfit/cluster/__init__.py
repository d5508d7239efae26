"""Exchanges between workers outside of steps.

Begin with `workers`: which workers there are, and how they exchange messages.
"""

"""Measurements side by side with what one would use otherwise."""

"""A trace as an interactive page."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

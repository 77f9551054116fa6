"""Mechanisms made for series of measurements."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

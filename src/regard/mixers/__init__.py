"""Token mixers with a structure of their own."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

"""Linear attention: time and memory linear in length."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

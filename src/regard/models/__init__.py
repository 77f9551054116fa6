"""Small host models that a mechanism is put into, and how they are saved."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

"""See attention in a model: what each layer attends to, and analyses of it."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

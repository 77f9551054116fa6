"""How a mechanism knows where tokens stand: parts for the `position` slot."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

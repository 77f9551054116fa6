"""Content-dependent routing: what looks at queries and keys and keeps the pairs worth computing."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

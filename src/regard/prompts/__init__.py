"""What is asked of a language model in words, at any length: needles, variables, words, absences; and scores."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

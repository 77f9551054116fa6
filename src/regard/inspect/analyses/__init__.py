"""What attention maps tell: functions of tensors, each with its paper on a card."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)

"""See attention in a model: what each layer attends to, and analyses of it."""

from regard.inspect.effective import effective_weights
from regard.inspect.trace import LayerTrace, Trace

__all__ = ["LayerTrace", "Trace", "effective_weights"]

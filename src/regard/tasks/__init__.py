"""Data that asks something of an attention mechanism."""

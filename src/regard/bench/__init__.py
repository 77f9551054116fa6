"""Measuring mechanisms against each other: compare, its store and its report."""

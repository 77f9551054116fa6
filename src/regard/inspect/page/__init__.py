"""A trace as an interactive page."""

from regard.inspect.page.render import fragment, render

__all__ = ["fragment", "render"]

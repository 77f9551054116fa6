"""What mkdocs does not do by itself: pages made from the code, outputs of commands, and a look at the result."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from tools import pages, readme  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Add what is made, and name the pages of mechanisms in the navigation."""
    for address, content in pages.all_pages().items():
        files.append(File.generated(config, address, content=content))
    by_family = [
        {family: [{name: f"mechanisms/{name}.md"} for name in names]} for family, names in pages.by_family().items()
    ]
    for part in config.nav:
        if part == {"Mechanisms": "mechanisms/index.md"}:
            part["Mechanisms"] = ["mechanisms/index.md", *by_family]
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Outputs of commands and tables, as they are now."""
    return pages.filled(markdown, readme.run)


def on_post_build(config: Any) -> None:
    """No page may ask the network for anything: the site is read where there is none."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        if found := pages.loaded(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.relative_to(config.site_dir)} loads from elsewhere: {found[0][:200]}")

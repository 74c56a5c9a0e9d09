"""What `make docs` asks of mkdocs beside its settings; mkdocs calls these functions by name.

README.md and CONTRIBUTING.md lie at the top of the repository, where GitHub and pip look for them.
On the site they are pages like the others, so links between them and the pages are rewritten there:
docs/passes.md becomes passes.md.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(root / name).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.file.src_path in PAGES.values():
        markdown = markdown.replace("](docs/", "](")
    for name, target in PAGES.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(name)}", f"]({target}", markdown)
    return markdown


def on_pre_build(config: Any) -> None:
    """Every public name must have a docstring, and a place on the page of names.

    Raises:
        PluginError: naming those that have not.
    """
    root = Path(config.config_file_path).parent
    package = griffe.load("moonfx", search_paths=[str(root)])
    listed = re.findall(r"^::: moonfx\.(?:\w+\.)*(\w+)$", (root / "docs/api.md").read_text(), re.M)
    names = [str(name) for name in package.exports or []]
    missing = [name for name in names if name not in listed]
    bare = [name for name in names if not _documented(package, name)]
    if missing or bare or not names:
        raise PluginError(f"not in docs/api.md: {missing}; without a docstring: {bare}")


def _documented(package: Any, name: str) -> bool:
    """Whether a public name has a docstring where it is defined.

    By the path that it is imported from: moonfx.report is a function, and a folder beside it.
    """
    found = package[package.imports[name].removeprefix("moonfx.")]
    while found.is_alias:
        found = found.final_target
    return bool(found.has_docstring)

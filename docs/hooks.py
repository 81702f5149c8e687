"""What the site needs beyond its pages: the files of the repository that they link to."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[(?P<label>[^\[\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
SHOWN = (".png", ".jpg", ".svg")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take along the files outside of docs/ that are linked, and refuse those that are not there."""
    def linked(found: re.Match[str]) -> str:
        target = found["target"]
        if ":" in target or target.startswith("/"):
            return found[0]
        path = (ROOT / "docs" / page.file.src_uri).parent.joinpath(target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]  # MkDocs checks these
        if not path.exists() or not path.is_relative_to(ROOT):
            raise PluginError(f"{page.file.src_uri}: links to {target}, which is not there")
        inside = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            return found["label"]  # a site has no listing of it
        uri = f"repository/{inside}" if path.suffix in (*SHOWN, ".json", ".txt") else f"repository/{inside}.txt"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=path.read_bytes()))
        up = "/".join([".."] * (len(PurePosixPath(page.file.src_uri).parts) - 1))
        return f"[{found['label']}]({up + '/' if up else ''}{uri})"

    return LINK.sub(linked, markdown)

"""The pages of the documentation as tests see them: blocks of code with what stands before them, links and headings.

A comment right before a block says what a test cannot see, and readers need not:

    <!-- not run: REASON -->       the block is not run
    <!-- file: NAME -->            the block is the content of a file that later blocks use
    <!-- stays: TEXT -->           the block's command stays in the foreground; it is there when it has printed TEXT,
                                   and is ended by Ctrl-C before the next such block, or at the end of the page
    <!-- output differs -->        what a console block shows is of one machine; the commands are run
"""

import dataclasses
import itertools
import re
import subprocess
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]

SHELL = ("sh", "console")
"""Languages of blocks that are commands. In a console block they begin with ``$``; the other lines are their output."""

OTHERS = ("json", "markdown", "math", "mermaid", "python", "sql", "text", "toml", "yaml")
"""Languages of all other blocks; those of Python are run too."""

MARK = re.compile(r"<!-- (not run|file|stays|output differs)(?:: (.+?))? -->\s*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code of a page.

    Attributes:
        page: path of the page below the root.
        line: line of the page it begins at, from 1.
        language: what stands behind the fence; empty for a block without, or one that is indented.
        text: the code.
        mark: what the comment before it says, see above; empty if there is none.
        value: what the comment gives.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str
    value: str

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.page}:{self.line}"

    def list_commands(self) -> list[tuple[str, list[str]]]:
        """Returns the commands of a shell block, each with the lines it is said to print.

        A block of the language ``sh`` is one command. One of the language ``console`` has several, a continued line
        ending in a backslash, a here-document up to its end.
        """
        if self.language == "sh":
            return [(self.text, [])]
        commands: list[tuple[str, list[str]]] = []
        end = ""
        for line in self.text.splitlines():
            if commands and (end or commands[-1][0].endswith("\\\n")):
                commands[-1] = (f"{commands[-1][0]}{line}\n", [])
                end = "" if line == end else end
            elif line.startswith("$ "):
                commands.append((f"{line[2:]}\n", []))
                found = re.search(r"<<'?(\w+)'?", line)
                end = found[1] if found else ""
            else:
                assert commands, f"{self.place} begins with output"
                commands[-1][1].append(line)
        return commands


def list_pages() -> list[str]:
    """Returns the paths of all Markdown files that are or would be committed, below the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def list_documentation() -> list[str]:
    """Returns the paths of the pages whose commands are run."""
    return [page for page in list_pages() if page == "README.md" or page.startswith("docs/")]


def parse_page(page: str) -> list[Token]:
    """Returns the tokens of a page, in order."""
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def read_blocks(page: str) -> list[Block]:
    """Returns the blocks of code of a page, in order."""
    blocks = []
    mark, value = "", ""
    for token in parse_page(page):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            blocks.append(
                Block(
                    page=page,
                    line=token.map[0] + 1,
                    language=token.info.strip(),
                    text=token.content,
                    mark=mark,
                    value=value,
                )
            )
        found = MARK.fullmatch(token.content) if token.type == "html_block" else None
        mark, value = (found[1], found[2] or "") if found else ("", "")
    return blocks


def list_links(page: str) -> list[str]:
    """Returns the targets of the links and pictures of a page."""
    inline = [child for token in parse_page(page) for child in token.children or []]
    found = [str(child.attrs[name]) for child in inline for name in ("href", "src") if name in child.attrs]
    html = [token.content for token in parse_page(page) if token.type == "html_block"]
    html += [child.content for child in inline if child.type == "html_inline"]
    return found + re.findall(r'(?:src|href|srcset)="([^"]+)"', "\n".join(html))


def list_anchors(page: str) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    anchors: set[str] = set()
    tokens = parse_page(page)
    for token, content in itertools.pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(child.content for child in content.children or [] if child.type in ("text", "code_inline"))
            base = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            anchor, number = base, 0
            while anchor in anchors:
                number += 1
                anchor = f"{base}-{number}"
            anchors.add(anchor)
    return anchors

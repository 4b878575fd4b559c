"""The documentation: its code runs, its links lead somewhere, its pictures are whole."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvz import cli
from support import DOCS, run_page

PAGES = sorted(DOCS.glob("*.md"))
WITH_CODE = [page for page in PAGES if "\n```python\n" in page.read_text("utf-8")]
#: Their code wants a model of another library: it runs in test_transformers_cache.py and
#: test_mlx_lm.py.
WITH_A_MODEL = ("howto-transformers.md", "howto-mlx.md")


@pytest.mark.parametrize(
    "page",
    [page for page in WITH_CODE if page.name not in WITH_A_MODEL],
    ids=lambda page: page.name,
)
def test_the_code_of_a_page_runs(page: Path) -> None:
    run_page(page.name, {})


def test_commands_print_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "command-line.md").read_text("utf-8")
    shown = re.findall(r"^```console\n\$ kvz (.*?)\n(.*?)^```", text, re.M | re.S)
    assert len(shown) == 2
    for command, output in shown:
        assert cli.main(command.split()) == 0
        assert capsys.readouterr().out == output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    targets += re.findall(r"^```\{(?:figure|literalinclude)\} (\S+)", text, re.M)
    for target in targets:
        if not re.match(r"https?://", target):
            assert (DOCS / target).exists(), target


def test_every_page_is_in_the_contents() -> None:
    """A page that no list names is not found."""
    index = (DOCS / "index.md").read_text("utf-8")
    lists = re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.M | re.S)
    named = {line for text in lists for line in text.splitlines() if re.fullmatch(r"[\w-]+", line)}
    assert named == {page.stem for page in PAGES} - {"index"}


@pytest.mark.parametrize("picture", sorted(DOCS.glob("pictures/*.svg")), ids=lambda p: p.name)
def test_pictures_are_whole_and_named(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    assert root.attrib["viewBox"]
    assert root.find("{http://www.w3.org/2000/svg}title") is not None

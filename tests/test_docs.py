"""The pages: links lead somewhere, commands and flags exist, the table of settings is the fields'."""

import argparse
import re
from pathlib import Path

import pytest

from macs.config import settings
from macs_tools import settings_page
from macs_tools.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", TEXT[page])
    missing = [one for one in links if "://" not in one and not ((ROOT / page).parent / one).exists()]
    assert missing == []


@pytest.mark.parametrize("page", TEXT)
def test_commands_exist(page):
    told = re.findall(r"(?:^|`|\$ )(?:\w+=\S+ )*macs ([a-z]+)(?: ([a-z-]+))?", TEXT[page], re.MULTILINE)
    words = {first for first, _ in told} & {name.split()[0] for name in COMMANDS}
    assert {first for first, _ in told} - words <= {"paper", "default", "fast", "safe"}  # titles of a table
    for first, second in told:
        if first == "bench" and second:
            assert f"bench {second}" in COMMANDS, (page, second)
    scripts = re.findall(r"\b((?:examples|tools)/[\w/]+\.(?:py|sh|sbatch|yaml|json|png))", TEXT[page])
    assert [one for one in scripts if not (ROOT / one).exists()] == []


def test_flags_exist():
    arguments = pytest.importorskip("megatron_macs.options", reason="megatron-core is not installed")
    parser = arguments.add_macs_args(argparse.ArgumentParser())
    known = {*parser._option_string_actions, "--moe-macs-calibrate", "--moe-macs-record"}
    for page, text in TEXT.items():
        if page != "CHANGELOG.md":
            assert set(re.findall(r"--moe-macs[a-z-]*[a-z]", text)) <= known, page


def test_the_table_of_settings_is_the_fields(tmp_path):
    assert settings_page.main(["--check"]) == 0
    page = tmp_path / "settings.md"
    page.write_text(settings_page.PAGE.read_text().replace("| 0.2 | number", "| 0.3 | number"))
    assert settings_page.main(["--check", "--page", str(page)]) == 1
    assert settings_page.main(["--page", str(page)]) == 0
    assert page.read_text() == settings_page.PAGE.read_text()


def test_every_setting_has_what_defends_it():
    rows = TEXT["docs/settings.md"].split("What defends each")[1].split("## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", rows, re.MULTILINE)
    defended = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert defended == {field.name for field in settings()}


def test_the_first_page_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 110
    assert max(map(len, TEXT["README.md"].splitlines())) <= 120


def test_the_manual_is_short():
    pages = [page for page in TEXT if page.startswith("docs/")] + ["CONTRIBUTING.md"]
    texts = [
        re.sub(r"<!-- (table|generated).*?<!-- end -->", "", TEXT[page], flags=re.DOTALL) for page in pages
    ]
    assert sum(len(re.findall(r"\S*\w\S*", text)) for text in texts) <= 12_000


def sentences(page: str) -> list[str]:
    """Sentences of a page's prose: no code, tables, headings or comments; addresses of links left out."""
    text = re.sub(
        r"```.*?```|<!--.*?-->|^(\||#|!|    ).*?$", "\n\n", TEXT[page], flags=re.DOTALL | re.MULTILINE
    )
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"^ *([-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE))
    return [one for block in text.split("\n\n") for one in re.split(r"(?<=[.:;?!])[*)\]]*\s", block)]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_sentences_are_short(page):
    found = sentences(page)
    assert len(found) > 20
    assert [one for one in found if len(one.split()) > 30] == []


BANNED = re.compile(
    r"what is told|who stays|has a say|left alone|the ways in|heeding|it is said|told by|straggler|"
    r"busiest|damage|mend(?:ed|s)\b|one's own",
    re.IGNORECASE,
)
"""Words that the field does not use: load and KL have one name each."""


@pytest.mark.parametrize("page", TEXT)
def test_pages_speak_the_fields_words(page):
    assert BANNED.findall(TEXT[page]) == []

"""The documents name only files, flags and settings that there are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
# What a reader makes, or what is somebody else's.
NOT_OURS = {"bench.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return listed.stdout.splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_every_file_that_is_named_is_there(document: Path, tracked: list[str]) -> None:
    """`folder/…/name.py` leaves out what lies between; `name.py` alone may be anywhere."""
    missing = []
    for named in re.findall(r"`([\w./…*-]+\.(?:py|c|proto|md|toml))`", document.read_text(encoding="utf-8")):
        parts = [re.escape(part) for part in named.replace("*", "…").split("…")]
        pattern = re.compile(r"(?:^|.*/)" + r".*".join(part.strip("/") for part in parts) + r"$")
        if not any(pattern.match(path) for path in tracked):
            missing.append(named)
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_every_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = document if not path else (document.parent / path)
        assert linked.exists(), f"{target} in {document.name}"
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target} in {document.name}"

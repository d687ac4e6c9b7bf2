"""Documents keep their length, their links lead somewhere, and they name nobody's machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"work_dirs", "build", "dist", "shared"}
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in GENERATED for part in path.relative_to(ROOT).parts)
)
EXAMPLES = sorted((ROOT / "integration" / "examples").glob("[!_]*.py"))

DEFINITION = re.compile(r"^\[([^\]]+)\]:\s*(\S+)", re.MULTILINE)
INLINE = re.compile(r"\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"\]\[([^\]]+)\]")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
MACHINE = re.compile(r"(?<![\w.])(?:/(?:home|root|Users|work|tmp|mnt|opt)/|[A-Z]:\\)")


def identified(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose_of(path: Path) -> str:
    return CODE.sub("", path.read_text())


def anchors_of(path: Path) -> set[str]:
    """Names that a heading can be reached by: lower case, words joined by hyphens."""
    headings = re.findall(r"^#+ +(.+)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(path: Path) -> list[str]:
    text = prose_of(path)
    defined = dict(DEFINITION.findall(text))
    found = [f"[{name}]" for name in REFERENCE.findall(text) if name not in defined]
    for target in [*INLINE.findall(text), *defined.values()]:
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = path.parent / place if place else path
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            found.append(target)
    return found


def test_the_documents_are_there() -> None:
    names = {identified(path) for path in DOCUMENTS}
    hosts = {f"repapq_plugin/hosts/{name}/README.md" for name in ("nncf", "openmmlab", "pt2e", "torch_ao")}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "integration/bench/README.md"} | hosts <= names


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    first = DEFINITION.search(text)
    assert first is not None
    assert len(text[: first.start()].split()) <= 900


@pytest.mark.parametrize("path", DOCUMENTS, ids=identified)
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page, so named\n\n[a](page.md) [b](#a-page-so-named) [c][known] `[code](nowhere)` [d](https://example.org)\n"
        "[e](nowhere.md) [f](#nowhere) [g][unknown]\n\n[known]: page.md#a-page-so-named\n"
    )
    assert dead_links(page) == ["[unknown]", "nowhere.md", "#nowhere"]


@pytest.mark.parametrize("path", [*DOCUMENTS, *EXAMPLES], ids=identified)
def test_no_document_names_a_machine(path: Path) -> None:
    assert [line for line in path.read_text().splitlines() if MACHINE.search(line)] == []


@pytest.mark.parametrize("path", [path for path in EXAMPLES if not path.stem.startswith("test_")], ids=identified)
def test_an_example_has_at_most_40_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40

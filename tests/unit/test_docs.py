"""README, docs/ and the other pages: what they link to, name and show exists and works."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from simpo.recipe import KEYS, load_recipe
from simpo.recipe.aliases import ALIASES, INPUT_KEYS

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
PAGES = {
    str(path.relative_to(REPO)): path.read_text(encoding="utf-8")
    for path in (
        *REPO.glob("*.md"),
        *DOCS.glob("*.md"),
        *REPO.glob("examples/*/README.md"),
        REPO / "benchmarks/README.md",
    )
}
each_page = pytest.mark.parametrize("page", PAGES)


def blocks(text: str, language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The fragments that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@each_page
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        name, _, fragment = target.partition("#")
        path = (REPO / page).parent / name if name else REPO / page
        assert path.exists(), target
        assert not fragment or fragment in anchors(path.read_text(encoding="utf-8")), target


@each_page
def test_files_that_are_named_exist(page: str):
    for name in re.findall(r"(?:recipes|tests|benchmarks|examples|docs)/[\w./-]*\w", PAGES[page]):
        assert (REPO / name).exists() or (REPO / f"{name}.yaml").exists(), name


@each_page
@pytest.mark.filterwarnings("ignore")  # Megatron's, when it is imported
def test_python_that_is_shown_compiles_and_its_names_can_be_imported(page: str):
    for block in blocks(PAGES[page], "python"):
        compile(block, page, "exec")
        for module, names in re.findall(r"^from (simpo[\w.]*) import (.*)$", block, re.MULTILINE):
            if "megatron" in module:  # an optional engine
                pytest.importorskip("megatron.core")
            found = importlib.import_module(module)
            assert all(hasattr(found, name.strip()) for name in names.split("#")[0].split(",")), (module, names)


@each_page
def test_recipes_that_are_shown_are_recipes(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(PAGES[page], "yaml"):
        if "my_losses:" in block:  # the module that the page shows next
            (tmp_path / "my_losses.py").write_text(blocks(PAGES[page], "python")[0], encoding="utf-8")
        (tmp_path / "shown.yaml").write_text(block, encoding="utf-8")
        load_recipe("shown.yaml", {} if "model_name_or_path" in block else {"model_name_or_path": "any"})


@each_page
def test_options_of_simpo_train_that_are_shown_are_keys(page: str):
    for line in re.findall(r"simpo train (.*)", PAGES[page]):
        for key in re.findall(r"--(\w+)", line.split("#")[0].split("`")[0]):
            assert key == "model" or key in KEYS or key in ALIASES or key in INPUT_KEYS, line


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_every_page_of_the_site_is_in_its_navigation():
    text = (REPO / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"[\w-]+\.md", text[text.index("nav:") :])) == {path.name for path in DOCS.glob("*.md")}


def test_every_seam_is_where_the_page_says():
    seams = re.findall(r"`([\w/]+\.py):(\w+)`", PAGES["docs/seams.md"])
    assert len(seams) > 25
    for file, name in seams:
        source = (REPO / "src" / "simpo" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b|^{name}\b", source, re.MULTILINE), (file, name)


def test_rooms_that_are_described_are_the_rooms_there_are():
    rooms = {path.name for path in (REPO / "src" / "simpo").iterdir() if path.is_dir() and path.name != "__pycache__"}
    table = PAGES["docs/seams.md"].partition("## Rooms")[2]
    tree = (
        PAGES["README.md"]
        .partition("## The tree")[2]
        .partition("## ")[0]
        .partition("src/simpo/")[2]
        .partition("recipes/")
    )
    assert set(re.findall(r"^\| `(\w+)/`", table, re.MULTILINE)) == rooms
    assert set(re.findall(r"^  (\w+)/", tree[0] + tree[1], re.MULTILINE)) == rooms

"""What the documentation names exists, and nothing tracked tells of a machine or a key."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_stage

JUST = Path(sys.executable).with_name("just")
README = (ROOT / "README.md").read_text()
BOOK = (ROOT / "axolotl_configs/README.md").read_text()
JUSTFILE = (ROOT / "Justfile").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "axolotl_configs/README.md",
    )
    if path.name != "CHANGELOG.md"  # it names what is gone
} | {"Justfile": JUSTFILE}
PACKAGES = ("common", "prompts", "data_prep", "training", "inference", "eval")  # as imports point
MADE_BY_RUNNING = ("data/", "outputs/", "models/", ".venv")
STAGES = sorted(
    p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for folder in ("prompts", "data_prep", "training", "inference", "eval", "demo")
    for p in (ROOT / folder).rglob("*.py")
    if "def main()" in p.read_text()
)


def recipes() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*)(?: [^:\n]*)?:(?!=)", JUSTFILE, re.MULTILINE))


def named_paths(text: str) -> set[str]:
    """Paths of this repo inside backticks, links, or anywhere in a code block or recipe."""
    found = re.findall(r"(?<![\w/.$])[\w.-]+(?:/[\w.-]+)*/?", text)
    roots = {p.name for p in ROOT.iterdir()}
    return {f.rstrip(".") for f in found if f.split("/")[0] in roots and ("/" in f or "." in f)}


@pytest.mark.parametrize("page", PAGES)
def test_every_path_named_exists(page):
    paths = {p for p in named_paths(PAGES[page]) if not p.startswith(MADE_BY_RUNNING)}
    missing = [p for p in paths if not (ROOT / p).exists()]
    assert not missing
    if page == "README.md":
        assert len(paths) > 10


@pytest.mark.parametrize("page", PAGES)
def test_every_recipe_named_exists(page):
    pattern = r"(?:`|^ +|^|&& |\.\.\. )just ([a-z][\w-]+)"
    named = set(re.findall(pattern, PAGES[page], re.MULTILINE))
    assert not named - recipes()
    if page == "README.md":
        assert len(named) > 10
    for name in re.findall(r"just bench\s+([a-z]\w*)", PAGES[page]):
        assert (ROOT / f"benchmarks/{name}.py").is_file(), name


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", PAGES[page], re.MULTILINE)
    for link in ("".join(pair) for pair in links):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text()), link


def test_every_config_named_exists():
    pattern = r"(?<![\w.-])[\w.-]+-(?:dpo|sft|ipo|orpo|simpo)[\w-]*lora\b"
    found = re.findall(pattern, "".join(PAGES.values()))
    assert len(found) > 10
    for name in found:
        assert (ROOT / f"axolotl_configs/{name.removeprefix('title-')}.yaml").is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_module_named_exists(page):
    for module in re.findall(rf"-m ((?:{'|'.join(PACKAGES)}|demo|axolotl)\.[\w.]+)", PAGES[page]):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_defaults_and_the_docstring_the_line_that_runs_it(stage):
    text = run_stage(stage, "--help").stdout
    source = (ROOT / (stage.replace(".", "/") + ".py")).read_text()
    assert f"python -m {stage}" in source.split('"""')[1]
    if "default=" in source.split("def main()")[1]:
        assert "(default:" in text


def test_the_recipes_are_listed_in_groups_with_a_line_each():
    listed = subprocess.run([JUST, "--list"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [line for line in listed.splitlines()[1:] if line.strip() and "[" not in line[:6]]
    assert {line.split()[0] for line in lines} == recipes() - {"default", "_demo_models"}
    assert all(" # " in line for line in lines)


@pytest.mark.slow
def test_options_reach_the_scripts_as_they_were_typed_and_errors_stand_alone():
    result = subprocess.run(
        [JUST, "scores", "nowhere", "--record", "two words"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: no run or config named nowhere")
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def test_recipes_work_in_a_clone_whose_folder_has_a_space_in_its_name(tmp_path):
    clone = tmp_path / "My Projects" / "repo"
    left_out = (".git", ".venv", ".just", "data", "outputs", "models")
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*left_out))
    (clone / ".venv").symlink_to(ROOT / ".venv")
    command = [JUST, "new-task", "two words"]
    result = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert result.stderr.startswith("error: two words is no name for a task"), result.stderr
    result = subprocess.run([*command[:2], "headline"], cwd=clone, capture_output=True, text=True)
    assert result.returncode == 0 and (clone / "prompts/headline/task.yaml").is_file()


def modules(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    later = [*PACKAGES[PACKAGES.index(package) + 1 :], "demo", "benchmarks", "tests"]
    back = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(later)})\b", re.MULTILINE)
    assert not [path for path in modules(package) if back.search(path.read_text())]


def test_no_machine_path_or_key_is_tracked():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in tracked.split():
        text = (ROOT / name).read_text(errors="replace")
        assert str(ROOT.parent) + "/" not in text, name
        assert not re.search(r"\bhf_[A-Za-z0-9]{20,}|\btgp_v1_\w+", text), name

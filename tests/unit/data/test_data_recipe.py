"""Recipes: strict keys, locators, globs, order and overlap of files."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.data.file_globs import find_files
from ddk_ds.data.recipe import list_files, load_recipe
from ddk_ds.errors import ConfigError, DataError


def recipe_of(root: Path, text: str) -> Path:
    path = root / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "domains: {a: {sources: [x.txt], max_byte: 3}}",
            "domains.a.max_byte: unknown key, did you mean 'max_bytes'",
        ),
        ("domains: {a: {sources: [{path: x, formt: text}]}}", "did you mean 'format'"),
        ("domains: {a: {sources: [x], max_bytes: many}}", "domains.a.max_bytes: .*'many'"),
        ("domains: {a: {sources: [x], min_chars: 0}}", "domains.a.min_chars: .*got 0"),
        ("domains: {a: {sources: []}}", "domains.a.sources: .*at least 1"),
        ("domains: {}", "domains: .*at least 1"),
        ("domains: {../a: {sources: [x]}}", r"domains: '\.\./a': it names a directory: use letters a-z"),
        ("domains: {数学: {sources: [x]}}", "domains: '数学': it names a directory: use letters a-z"),
        ("domains: {a: {sources: [{path: x, format: docx}]}}", "'docx'"),
        ("domains: {a: [", "cannot be read as YAML"),
        ("- a", "recipe.yaml"),
    ],
)
def test_wrong_recipes_name_the_key_and_the_value(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_of(tmp_path, text))


def test_an_error_of_an_override_names_it(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "domains: {a: {sources: [x], max_bytes: 0}}")
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, ["domains.a.min_chars=few"])
    assert "override domains.a.min_chars=few: " in str(caught.value)
    assert f"recipe {recipe}: domains.a.max_bytes: " in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_files_are_sorted_excluded_and_relative_to_the_root(tmp_path: Path) -> None:
    touch(tmp_path / "text", "b/2.txt", "a/1.txt", "a/tests/3.txt", "c.md")
    path = recipe_of(
        tmp_path, "root: text\ndomains: {a: {sources: [{path: '**/*.txt', exclude: ['*/tests/*']}, c.md]}}"
    )
    found = list_files(load_recipe(path))["a"]
    assert [file.name for file in found] == ["a/1.txt", "b/2.txt", "c.md"]
    assert found[0].path == (tmp_path / "text/a/1.txt").resolve()


def test_a_capped_domain_reads_a_sample_of_the_tree_in_the_same_order_everywhere(tmp_path: Path) -> None:
    names = [f"{number:02}.txt" for number in range(40)]
    orders = []
    for machine in ("one", "two"):
        touch(tmp_path / machine, *names)
        path = recipe_of(tmp_path / machine, "domains: {a: {sources: ['*.txt'], max_bytes: 10}}")
        orders.append([file.name for file in list_files(load_recipe(path))["a"]])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == names != orders[0]


def test_a_file_in_two_domains_is_refused_in_any_spelling(tmp_path: Path) -> None:
    touch(tmp_path, "d/x.txt")
    path = recipe_of(tmp_path, f"domains: {{a: {{sources: ['d/*']}}, b: {{sources: ['{tmp_path}/d/x.txt']}}}}")
    with pytest.raises(DataError, match="in two domains, 'a' and 'b'"):
        list_files(load_recipe(path))


def test_a_source_without_files_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "d/x.txt")
    with pytest.raises(DataError, match=r"domain 'a': source 'd' matches no file"):
        list_files(load_recipe(recipe_of(tmp_path, "domains: {a: {sources: [d]}}")))


def test_links_are_followed_as_find_does_and_loops_end(tmp_path: Path) -> None:
    """`find -L` gives the right value: 40 files in place, 400 behind links, of which it names the loop."""
    touch(tmp_path / "text", *(f"a/{number}.txt" for number in range(40)))
    touch(tmp_path / "disk", *(f"deep/{number}/x.txt" for number in range(200)), *(f"{n}.txt" for n in range(200)))
    (tmp_path / "text/b").symlink_to(tmp_path / "disk")
    (tmp_path / "text/a/up").symlink_to(tmp_path / "text")
    (tmp_path / "disk/itself").symlink_to(tmp_path / "disk/itself")
    (tmp_path / "disk/deep/round").symlink_to(tmp_path / "disk/deep/5")
    found = subprocess.run(["find", "-L", tmp_path / "text", "-name", "*.txt"], capture_output=True, text=True)
    assert "loop" in found.stderr
    files = list_files(load_recipe(recipe_of(tmp_path, "root: text\ndomains: {a: {sources: ['**/*.txt']}}")))["a"]
    assert {file.path.resolve() for file in files} == {Path(name).resolve() for name in found.stdout.splitlines()}
    assert len(files) == 440
    for path in ("b/**/*.txt", "b/deep/*/x.txt", "**/deep/**/x.txt"):
        recipe = load_recipe(recipe_of(tmp_path, f"root: text\ndomains: {{a: {{sources: ['{path}']}}}}"))
        assert len(list_files(recipe)["a"]) == (400 if path == "b/**/*.txt" else 200)


@pytest.mark.parametrize(
    "glob", ["*.txt", "**/*.txt", "a/**/[bc]*", "**/b/?.txt", "a/../d.txt", "**", "*", "none/**/*"]
)
def test_globs_match_what_pathlib_matches_where_there_are_no_links(tmp_path: Path, glob: str) -> None:
    touch(tmp_path, "d.txt", ".e.txt", "a/b/c.txt", "a/c.txt", "a/b/b/d.txt", ".a/b/e.txt")
    wanted = {path for path in tmp_path.glob(glob) if path.is_file()}
    assert {path for path in find_files(tmp_path, glob) if path.is_file()} == wanted


def test_what_cannot_be_read_or_is_too_little_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "d/1.txt", "d/2.txt", "d/old/3.txt")
    source = "{path: 'd/**/*.txt', min_files: 3, exclude: ['d/old/*']}"
    with pytest.raises(DataError, match=r"'d/\*\*/\*\.txt' matches 2 files \(1 more are excluded\), min_files is 3"):
        list_files(load_recipe(recipe_of(tmp_path, f"domains: {{a: {{sources: [{source}]}}}}")))
    (tmp_path / "d/old/gone.txt").symlink_to(tmp_path / "nothing")
    recipe = load_recipe(recipe_of(tmp_path, "domains: {a: {sources: ['d/**/*.txt']}}"))
    with pytest.raises(DataError, match=r"gone\.txt is a link to nothing: restore its file, or exclude it"):
        list_files(recipe)
    (tmp_path / "d/old/gone.txt").unlink()
    listed = os.scandir

    def scandir(path: Path) -> Any:
        if path.name == "old":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root, which runs tests in containers, may list everything
    with pytest.raises(DataError, match=r"d/old cannot be listed \(Permission denied\)"):
        list_files(recipe)


def test_locators_find_what_is_installed(tmp_path: Path) -> None:
    path = recipe_of(
        tmp_path,
        "domains:\n"
        "  a: {sources: ['stdlib:json/*.py']}\n"
        "  b: {sources: ['package:numpy/linalg/*.py']}\n"
        "  c: {sources: ['site-packages:numpy-*.dist-info/METADATA']}\n",
    )
    files = list_files(load_recipe(path))
    assert "json/decoder.py" in [file.name for file in files["a"]]
    assert "linalg/__init__.py" in [file.name for file in files["b"]]
    assert [file.path.name for file in files["c"]] == ["METADATA"]


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, "domains: {a: {sources: ['package:no_such_package/*.py']}}")
    with pytest.raises(DataError, match=r"'no_such_package' .* is not installed"):
        list_files(load_recipe(path))


def test_the_demo_recipe_finds_its_domains_and_names_no_machine() -> None:
    path = Path(__file__).parents[3] / "configs/data/demo.yaml"
    recipe = load_recipe(path)
    files = list_files(recipe)
    assert len(files) >= 6
    assert all(len(found) > 20 for found in files.values())
    for domain in recipe.domains.values():
        assert all(source.path.startswith(("stdlib:", "package:", "site-packages:")) for source in domain.sources)

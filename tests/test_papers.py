"""docs/PAPERS.md: its commands parse, no two of them share a folder, and no table or figure of the papers is left out."""

import json
import re
import shlex

import pytest
from conftest import ROOT

import adadfq
import autorecon
import gdfq
import mixmix
import qimera
from common import pretrain

PAGE = (ROOT / "docs" / "PAPERS.md").read_text()
METHODS = {method.__name__: method for method in (gdfq, autorecon, qimera, adadfq, mixmix)}
MODULES = {"common.pretrain": pretrain}  # python -m
COUNTS = {"autorecon": (5, 2), "qimera": (5, 6), "adadfq": (3, 6), "mixmix": (8, 5)}  # tables and figures of each paper


def commands():
    """Every command as (script, arguments). In a table's cell, or in a paragraph, a flag after a command changes that one."""
    found = []
    for part in re.split(r"\n\n|\|", PAGE):
        base = None
        for text in re.findall(r"`([^`]+)`", part):
            if text.startswith("python "):
                base = shlex.split(text)[1:]
                found.append((base[0], base[1:]))
            elif text.startswith("--") and base:
                found.append((base[0], [*base[1:], *shlex.split(text)]))
    return found


def test_every_command_parses_and_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "found-cifar100").mkdir(parents=True)  # what one of the commands leaves for another
    (tmp_path / "runs" / "found-cifar100" / "genotype.json").write_text(
        json.dumps({"edges": autorecon.read_genotype("random")})
    )
    folders, given, taken = {}, set(), set()
    assert len(commands()) > 200
    for script, arguments in commands():
        shown = shlex.join(["python", script, *arguments])
        try:
            module = MODULES[arguments.pop(0)] if script == "-m" else METHODS[script.removesuffix(".py")]
            cfg = module.parse_args(arguments)
        except Exception as error:
            pytest.fail(f"{shown}: {error}")
        taken.update(argument for argument in arguments if argument.startswith("runs/") and argument != cfg.out)
        if "--analyze" not in arguments:
            given.add(cfg.out)
            assert folders.setdefault(cfg.out, cfg) == cfg, f"{shown}: another command has {cfg.out}"
    assert taken and taken <= given  # what a command reads, another one has made


@pytest.mark.parametrize("name", METHODS)
def test_every_table_and_figure_is_there(name):
    section = next(part for part in re.split(r"^## ", PAGE, flags=re.M) if f"(`{name}.py`)" in part.partition("\n")[0])
    listed = "\n".join(line for line in section.splitlines() if line.startswith(("### ", "| Figure", "| Table")))
    tables, figures = COUNTS.get(name, (0, 0))  # GDFQ's own are not numbered on the page, which says why
    wanted = [f"Table {i + 1}" for i in range(tables)] + [f"Figure {i + 1}" for i in range(figures)]
    assert [one for one in wanted if not re.search(rf"\b{one}\b", listed)] == []
    assert f"`python {name}.py " in section

"""docs/RESULTS.md is what its files say, the README has no other figures, and those of a table are computed anew."""

import json
import re

import numpy as np
from conftest import ROOT

import adadfq
import gdfq
import qimera
from common import results

DOCS = ROOT / "docs"


def test_the_page_is_what_its_files_make():
    assert results.page(DOCS / "results") == (DOCS / "RESULTS.md").read_text("utf-8")
    assert not [file for file in (DOCS / "results").glob("*.jsonl") if '"/' in file.read_text()]  # a path of somebody's machine


def test_commands_on_the_page_still_stand_for_what_was_run():
    """A default that has changed since would have to be among a run's flags."""
    runs = [json.loads(line) for file in (DOCS / "results").glob("*.jsonl") for line in file.read_text("utf-8").splitlines()]
    assert len(runs) > 200
    of_the_tests = {"--synthesis", *results.MACHINE}  # which have defaults of their own here
    of_the_tests |= {"--mapped-dim"}  # had another default where --variant released left the mapping out
    for run in runs:
        flags = {flag for flag in results.changed_flags(run["arguments"]) if flag.split(" ")[0] not in of_the_tests}
        assert flags <= set(run["flags"])


def test_every_figure_of_the_readme_is_on_a_page():
    section = (ROOT / "README.md").read_text("utf-8").partition("\n## Results\n")[2].partition("\n## ")[0]
    shown = {figure for line in section.splitlines() if line.startswith("|") for figure in re.findall(r"\d+\.\d+", line)}
    known = "".join((DOCS / page).read_text("utf-8") for page in ("RESULTS.md", "MEASUREMENTS.md"))
    assert len(shown) > 20 and shown - set(re.findall(r"\d+\.\d+", known)) == set()


def write_run(folder, cfg, top1, calibrated=70.0, machine=None):
    """The folder of a finished run, its first 12 epochs, of 10 seconds each."""
    folder.mkdir()
    config = {"arguments": vars(cfg), "versions": {"torch": "2.14.1"}} | ({"machine": machine} if machine else {})
    figures = {"fp_top1": 92.41, "calibrated_top1": calibrated, "last_top1": top1, "best_top1": top1 + 1, "images": 2000}
    about = {"wbits": cfg.wbits, "abits": cfg.abits, "bytes_quantized": 2048, "seconds": 120.0, "test_set": "/home/me/cifar"}
    lines = [{"epoch": epoch, "seconds": 10.0} | ({"top1": top1} if epoch == 11 else {}) for epoch in range(12)]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(figures | about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_a_row_names_the_flags_that_make_it_again():
    """--no-se also sets --k and --p, which may not be given beside it."""
    arguments = vars(qimera.parse_args(["--no-se", "--noise", "before"]))
    assert results.changed_flags(arguments | {"out": None}) == ["--noise before", "--no-se"]


def test_a_table_from_run_folders(tmp_path, fails):
    argv = "--bits 3 --epochs 40 --iters 200 --batch-size 16 --data-dir /home/me/cifar --seed".split()
    top1, machine, runs = [87.0, 88.5, 88.1], {"processor": "avx2", "threads": 2}, []
    for seed, accuracy in enumerate(top1):
        runs.append(write_run(tmp_path / f"g{seed}", gdfq.parse_args([*argv, str(seed)]), accuracy, machine=machine))
    runs.append(write_run(tmp_path / "no-ce", gdfq.parse_args([*argv, "0", "--no-ce"]), 80.0, None, machine))
    runs.append(write_run(tmp_path / "a", adadfq.parse_args([*argv, "0"]), 90.0, machine=machine))  # whose batch is 16 anyhow
    out, mean = tmp_path / "docs" / "RESULTS.md", np.mean(top1)
    results.main([*runs, "--out", str(out)])
    page = out.read_text("utf-8")
    (file,) = (tmp_path / "docs" / "results").glob("*.jsonl")
    assert "/home/me" not in file.read_text() + page
    assert json.loads(file.read_text().splitlines()[0])["curve"] == [[4, 40, 70.0], [12, 120, 87.0]]
    assert "2,000 test images; full precision: 92.41 %; machine: avx2, threads: 2" in page and "As in Table 2 of Qimera" in page
    command = re.search(r"python gdfq.py .*", page)[0].split()[2:]
    assert vars(gdfq.parse_args(command)) == vars(gdfq.parse_args([*argv, "0"])) | {"data_dir": "DIR"}
    spread = " | ".join(f"{mean + plus:.2f} ± {np.std(top1, ddof=1):.2f}" for plus in (0, 1))
    drops = f"{92.41 - mean:.2f} | {93.89 - 75.11:.2f} | {93.89 - 88.11:.2f}"
    assert f"| 3 | GDFQ | 0, 1, 2 | 70.00 ± 0.00 | {spread} | {drops} | 2.0 ± 0.0 | 2 |" in page
    for row in ("GDFQ `--no-ce` | 0 |  | 80.00 |", "AdaDFQ | 0 | 70.00 | 90.00 | 91.00 | 2.41 | 9.00 |"):
        assert f"| 3 | {row}" in page
    lost = 92.41 - np.array([*top1, 86.6])
    assert f"| 3 | GDFQ |  | {lost[:3].mean():.2f} ± {np.std(lost[:3], ddof=1):.2f} (3) |  | 18.78 | 5.78 |" in page
    before = file.read_text()
    results.main([runs[0], "--out", str(out)])  # in the place of itself
    assert (file.read_text(), out.read_text("utf-8")) == (before, page)
    elsewhere = gdfq.parse_args([*argv, "0", "--capture", "none"])  # another table, the same row of the overview
    results.main([write_run(tmp_path / "gpu", elsewhere, 86.6, machine={"processor": "gpu", "threads": 1}), "--out", str(out)])
    assert f"| 3 | GDFQ |  | {lost.mean():.2f} ± {np.std(lost, ddof=1):.2f} (4) |  | 18.78 | 5.78 |" in out.read_text("utf-8")
    without = write_run(tmp_path / "agreement", gdfq.parse_args([*argv, "0"]), 1.0)
    (tmp_path / "agreement" / "result.json").write_text('{"fp_top1": null}')
    assert "agreement holds no accuracy on test images" in fails(results.main, without, "--out", out)
    assert "is not the folder of a finished run" in fails(results.main, tmp_path, "--out", out)

"""The command line: what is read from it, what is refused, and that its tables are those of the layers behind."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from autopar.arguments import read_cluster
from autopar.console import options
from autopar.console.options import Options, parse_options
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.models.catalog import DEFAULT_BATCH, MODELS
from autopar.passes.capture import COMPUTE_DTYPE, BatchNorm, Head
from autopar.passes.costs import OPTIMIZERS
from autopar.passes.modes import MODES
from autopar.solver.model import SOLVERS


@pytest.mark.parametrize(("mine", "behind"), [
    (options.MODES, MODES), (options.OPTIMIZERS, OPTIMIZERS), (options.PRECISIONS, COMPUTE_DTYPE),
    (options.SOLVERS, SOLVERS), (options.HEADS, get_args(Head)), (options.BATCH_NORMS, get_args(BatchNorm)),
])
def test_tables_are_those_of_the_layers_behind(mine: tuple[str, ...], behind: object) -> None:
    assert set(mine) == set(behind)  # type: ignore[call-overload]


def test_defaults() -> None:
    assert parse_options(["--model", "gpt2"]) == Options(
        "gpt2", None, None, "bf16-mixed", "adamw", None, None, "auto", None, "cbc", None, False, False)


def test_everything_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    given = ("--model m.py:f --batch 64 --seq 1024 --precision fp32 --optimizer sgd --cluster 2x4xH100 "
             "--memory-budget 20GiB --mode 1d --mesh 4x2 --solver highs --out a/plan.json --json --verbose "
             "--head chunked --batch-norm micro-batch")
    assert parse_options(given.split()) == Options(
        "m.py:f", 64, 1024, "fp32", "sgd", Cluster.preset("2x4xH100"), 20 * 2**30, "1d", (4, 2), "highs",
        Path("a/plan.json"), True, True, head="chunked", batch_norm="micro-batch")


@pytest.mark.parametrize(("given", "said"), [
    ("", "--model"), ("--model gpt5", "unknown model 'gpt5'"), ("--model gpt2 --mode 4d", "'4d'.*auto"),
    ("--model gpt2 --solver gurobi", "'gurobi'.*cbc"), ("--model gpt2 --precision int8", "'int8'.*bf16"),
    ("--model gpt2 --optimizer lion", "'lion'.*adamw"), ("--model gpt2 --batch 0", "--batch: '0'.*above 0"),
    ("--model gpt2 --batch -3", "--batch"), ("--model gpt2 --seq 1.5", "--seq: '1.5'.*whole number"),
    ("--model gpt2 --mesh 4by2", "mesh '4by2' is not of the form 4x2"), ("--model gpt2 --mesh 0", "mesh"),
    ("--model gpt2 --memory-budget lots", "memory 'lots' is not of the form 20GiB"),
    ("--model gpt2 --cluster 8xB200", "unknown device type 'B200'"), ("--model gpt2 --cluster a/b.json", "cannot read"),
    ("--model gpt2 --clus cpu:2", "unrecognized arguments: --clus"), ("--model gpt2 extra", "unrecognized.*extra"),
    ("--model", "--model: expected one argument"), ("--model gpt2 --out none/p.json", "there is no folder none"),
    ("--model gpt2 --out .", "it is a folder"), ("--model gpt2 --out /proc/plan.json", "cannot write /proc/plan.json"),
    ("--model gpt2 --batch 1000000001", "whole number above 0 and at most 1000000000"),
    ("--model gpt2 --cluster cpu:99999", "the most that can be planned for"), ("--model gpt2 --mesh 16385", "mesh is"),
    ("--model gpt2 --memory-budget 1e30", "memory budget is '1e30'"), ("--model gpt2 --pin =RR", "pin '=RR' is not"),
    ("--model gpt2 --ppranks [[0,1],[2,x]]", r"'\[\[0,1\],\[2,x\]\]' are no lists of devices"),
])
def test_mistakes_are_refused_with_what_was_found(given: str, said: str) -> None:
    with pytest.raises(AutoparError, match=said) as refusal:
        parse_options(given.split())
    assert "\n" not in str(refusal.value)


def test_help_states_models_defaults_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert all(name in text for name in MODELS)
    assert text.count("(default: ") == 18  # of every option but --model and the two switches
    assert f"(default: {DEFAULT_BATCH}, or" in text and "(default: bf16-mixed)" in text and "less 8 %)" in text
    assert "autopar-solve --model gpt2 --cluster 8xA100-80GB --batch 64 --seq 1024" in text


@pytest.mark.parametrize("name", ["cluster.json", "sub/cluster", "cluster"])
def test_a_file_is_a_cluster(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    cluster = Cluster.preset("2x2xA100-80GB")
    cluster.save(name)
    assert read_cluster(name) == cluster
    assert read_cluster("2x2xA100-80GB") == cluster

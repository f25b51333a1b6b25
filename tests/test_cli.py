"""`autopar-solve`: what it prints, its exit status, and one clear line when it can't do what was asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autopar import cli
from autopar.cli import main
from autopar.console import command
from autopar.core.cluster import Cluster
from autopar.plan import Plan

SOURCE = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 4)
    def forward(self, x):
        return self.down(self.up(x).relu())

class Branchy(Net):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x).sum()
        return x.sum()

class Masked(Net):
    def forward(self, x):
        return x[x > 0].sum()

class Flagged(Net):
    def forward(self, x):
        return super().forward(x).sum() * x.max().item()

class Wrong(Net):
    def forward(self, x):
        return self.down(x).sum()

def build(batch=64):
    print("building")
    return Net(), (torch.zeros(batch, 16), torch.zeros(batch, dtype=torch.long)), nn.functional.cross_entropy

def raises():
    raise ValueError("no such width")

def branchy():
    return Branchy(), torch.zeros(64, 16)

def masked():
    return Masked(), torch.zeros(64, 16)

def flagged():
    return Flagged(), torch.zeros(64, 16)

def wrong():
    return Wrong(), torch.zeros(64, 16)

def empty():
    return Net(), (torch.zeros(0, 16), torch.zeros(0, dtype=torch.long)), nn.functional.cross_entropy

def other_loss():
    return Net(), (torch.zeros(64, 16), torch.zeros(64)), lambda output: output.sum()

def no_loss():
    return Net(), torch.zeros(64, 16)
"""
LINE_OF = {text: SOURCE[:SOURCE.index(text)].count("\n") + 1
           for text in ("raise ValueError", "if x.sum()", "x[x > 0]", "x.max().item()", "self.down(x).sum()")}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with factories."""
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(SOURCE)
    return path


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240,
                          cwd=Path(__file__).parents[1])


def test_text_in_order(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", f"{own}:build", "--cluster", "4xA100-80GB", "--mesh", "4", "--mode", "ddp"]) == 0
    out, err = capsys.readouterr()
    assert err == "building\n"
    status, graph, *ops, blank, place = out[:out.index("\nparameters at rest")].splitlines()
    assert re.fullmatch(r"ILP Status: Optimal  Objective: 0\.\d{6} s  Time: \d+\.\d\d s", status)
    assert re.fullmatch(r"#nodes: \d+, #edges: \d+", graph)
    assert {"up                  S0R = S0R X RR", "down                S0R = S0R X RR"} <= set(ops)
    assert blank == "" and place == "mesh: 4 of 4xA100-80GB, mode ddp, bf16-mixed, adamw"
    assert re.search(r"^step: .* ms \(compute .*\), gap 0\.00 %$", out, re.MULTILINE)


def test_edge_costs_come_first_when_verbose(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", f"{own}:build", "--cluster", "2xA100-80GB", "--verbose"]) == 0
    out, err = capsys.readouterr()
    costs, rest = out[:out.index("ILP Status")], out[out.index("ILP Status"):]
    assert costs.startswith("Edge costs in microseconds")
    assert re.search(r"^up\.weight -> up  \(into \S+\)\n +.*RR.*\n +RR +", costs, re.MULTILINE)
    assert re.search(r"^up -> relu ", costs, re.MULTILINE)
    assert " -> " not in rest
    assert all(word in err for word in ("importing torch", "building", "tracing", "solving", "mesh 2: "))


def test_json_is_all_there_is_on_stdout(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    given = ["--model", f"{own}:build", "--batch", "32", "--cluster", "2xA100-80GB", "--json", "--out", str(out)]
    assert main(given) == 0
    found, plan = json.loads(capsys.readouterr().out), Plan.load(out)
    parts = [found[name] for name in ("compute_s", "inline_s", "exposed_s", "optimizer_s")]
    assert found["step_time_s"] == pytest.approx(sum(parts)) == plan.seconds.step
    assert plan.memory.around and plan.memory.moment  # told from the code that runs
    assert sum(found["memory_bytes"].values()) == pytest.approx(
        3 * plan.memory.total + 2 * plan.memory.around)  # and peak, and device
    assert found["peak_at"] == plan.memory.moment
    assert (found["status"], found["gap"], tuple(found["mesh"]), found["mode"]) == ("Optimal", 0.0, plan.mesh, "auto")
    assert [(op["name"], op["strategy"], op["segment"]) for op in found["ops"]] == \
        [(op.name, op.strategy, op.segment) for op in plan.ops if op.strategy]
    assert 0 < found["solve_s"] < found["total_s"]


def test_without_a_cluster_this_machine_is_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", f"{own}:build"]) == 0
    name = command.this_machine().name
    assert capsys.readouterr().out.endswith(f"\ncluster: {name} is what this machine has; --cluster names another\n")


@pytest.mark.parametrize(("given", "said"), [
    ("", "--model"),
    ("--model gpt5", "unknown model 'gpt5'; known: bert-base, .*path/to/file.py:factory"),
    ("--model resnet18 --cluster 8xB200", "unknown device type 'B200'; known: A100-40GB"),
    ("--model resnet18 --cluster many", "cluster 'many' is not of the form"),
    ("--model resnet18 --cluster none.json", "cannot read none.json"),
    ("--model resnet18 --mode fast", "'fast'.*auto.*ddp.*zero3.*1d"),
    ("--model resnet18 --cluster cpu:4 --mesh 3x2", "mesh 3x2 has 6 devices, cluster cpu:4 has 4"),
    ("--model resnet18 --seq 128", "resnet18 takes images"),
    ("--model none.py:build", "cannot read none.py"),
    ("--model OWN:lost --cluster cpu:2", "mine.py has no 'lost'; needed is a function or class, found are Net"),
    ("--model OWN:raises --cluster cpu:2", f"raised at \\S+mine.py:{LINE_OF['raise ValueError']}: ValueError: no such"),
    ("--model OWN:branchy --cluster cpu:2", f"can't be exported at \\S+mine.py:{LINE_OF['if x.sum()']} "),
    ("--model OWN:no_loss --cluster cpu:2", "none is a scalar loss"),
    ("--model OWN:no_loss --cluster cpu:2 --batch 5", "takes no batch"),
    ("--model OWN:build --cluster cpu:4 --batch 7 --mode ddp", "batch of 7 does not divide over 4"),
    ("--model OWN:build --cluster cpu:2 --out OWN/plan.json", "cannot write .*mine.py/plan.json"),
    ("--model OWN:build --cluster cpu:2 --memory-budget 1", "needs .* a device on mesh 2, the budget is 1 bytes"),
    ("--model OWN:masked --cluster cpu:2", f"Masked can't be planned at \\S+mine.py:{LINE_OF['x[x > 0]']} in forward"),
    ("--model OWN:flagged --cluster cpu:2", f"can't be .* at \\S+mine.py:{LINE_OF['x.max().item()']} in forward: "),
    ("--model OWN:wrong --cluster cpu:2", f"can't be exported at \\S+mine.py:{LINE_OF['self.down(x).sum()']} in "),
    ("--model OWN:empty --cluster cpu:2", r"shape \(0, 16\), a batch of 0 samples"),
    ("--model OWN:other_loss --cluster cpu:2", "1 positional argument but 2 were given"),
    ("--model resnet18 --cluster cpu:1000000", "cpu:1000000 has 1000000 devices, the most .* 16384"),
    ("--model resnet18 --cluster 2000x8xH100", "with 1 to 1024 nodes"),
    ("--model resnet18 --cluster .", "cluster '.' is not of the form"),
    ("--model resnet18 --cluster ./", "cannot read ./"),
    ("--model OWN --cluster cpu:2", "not of the form path/to/file.py:factory"),
    ("--model resnet18 --cluster OWN", "mine.py is not JSON"), ("--model .:build --cluster cpu:2", "it is a folder"),
    ("--model resnet18 --cluster cpu:4 --mesh 99999999999x1", "more devices than can be planned for"),
    ("--model resnet18 --cluster cpu:32 --mesh 2x2x2x2x2", "has 5 axes, a mesh has 1 to 4"),
    ("--model resnet18 --cluster cpu:8 --mode 2d --mesh 8", "mode 2d wants q x q devices"),
    ("--model resnet18 --batch 99999999999999999999", "--batch: .* at most 1000000000"),
    ("--model gpt2 --seq 2000 --cluster cpu:2", "at most 1024 tokens, asked for are 2000"),
    ("--model resnet18 --memory-budget nan", "memory 'nan' is not of the form"),
    ("--model OWN:build --cluster cpu:2 --pin up=S9", "op up can't be pinned to 'S9' in mode auto; it can be"),
    ("--model OWN:build --cluster cpu:2 --pin op=RR", "no op is called 'op'; near it are up"),
    ("--model OWN:build --cluster cpu:2 --explain op", "no op is called 'op'; near it are up"),
    ("--model resnet18 --cluster cpu:2 --out /proc/plan.json", "cannot write /proc/plan.json"),
])
def test_refusals_are_one_line(given: str, said: str, own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(given.replace("OWN", str(own)).split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(said, err.removeprefix("building\n"))
    assert re.fullmatch(r"autopar-solve: error: [^\n]+\n", err.removeprefix("building\n"))


def test_infeasible_as_json(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", f"{own}:build", "--cluster", "cpu:2", "--memory-budget", "2MB", "--batch", "65536", "--json"]
    assert main(given) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["status"] == "Infeasible" and found["reason"] in err


def test_a_refusal_has_its_traceback_when_verbose(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", f"{own}:raises", "--verbose"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and 'raise ValueError("no such width")' in err
    assert err.splitlines()[-1].startswith("autopar-solve: error: raises raised at ")


def fail(error: BaseException) -> Any:
    """An `answer` that raises."""
    def answer(*arguments: Any) -> str:
        raise error
    return answer


def test_a_fault_of_ours_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "answer", fail(KeyError("one\ntwo")))
    assert main(["--model", "gpt2"]) == 1
    wanted = "autopar-solve: error: KeyError: 'one\\ntwo'; this is a fault of autopar's, --verbose shows where\n"
    assert capsys.readouterr() == ("", wanted)
    assert main(["--model", "gpt2", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")])
def test_too_little_memory_is_no_fault_of_ours(error: Exception, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "answer", fail(error))
    assert main(["--model", "gpt2"]) == 2
    assert capsys.readouterr() == ("", f"autopar-solve: error: {cli.NO_MEMORY}\n")


@pytest.mark.parametrize("given", ["--out", "--emit", "--cluster", "--mesh", "--memory-budget", "--model", "--pin",
                                   "--batch"])
@pytest.mark.parametrize("value", ["", " ", "\0", "\n", "\ud800", "\u2603" * 300, "-1", "nan", "9" * 5000,
                                   "../" * 2000])
def test_whatever_is_given_one_line_comes_back(given: str, value: str, own: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "resnet18", "--cluster", "cpu:2", "--mode", "no such mode", f"{given}={value}"]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"autopar-solve: error: [^\n]+\n", err)
    assert "invalid" not in err or "invalid choice" in err


def test_the_program_of_a_rank_is_written(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", f"{own}:build", "--cluster", "2xA100-80GB", "--emit", str(tmp_path / "step.py")]
    assert main(given) == 0 and "ILP Status" in capsys.readouterr().out
    text = (tmp_path / "step.py").read_text()
    assert "torchrun --nproc-per-node 2 step.py" in text and compile(text, "step.py", "exec")
    assert main([*given[:-1], str(tmp_path / "nowhere" / "step.py")]) == 2
    assert "there is no folder" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["step.py"]


def test_nothing_is_left_where_a_plan_was_to_be_written(own: Path, tmp_path: Path) -> None:
    for name in ("masked", "empty", "no_loss"):
        assert main(["--model", f"{own}:{name}", "--cluster", "cpu:2", "--out", str(tmp_path / "plan.json")]) == 2
    assert list(tmp_path.iterdir()) == []


def cluster_file(folder: Path, **changed: Any) -> str:
    data = json.loads(json.dumps(Cluster.preset("2x2xH100").to_json()))
    for name, value in changed.items():
        data[name] = value
    (folder / "cluster.json").write_text(json.dumps(data))
    return str(folder / "cluster.json")


@pytest.mark.parametrize(("changed", "said"), [
    ({"latency_s": [[1e-6, -1e-6], [1e-6, 1e-6]]}, r"latency_s\[0\]\[1\] is -1e-06, needed is a finite number above 0"),
    ({"latency_s": [[1e-6], [1e-6, 1e-6]]}, r"latency_s has rows of \[1, 2\] entries and 2 rows, needed are 2 of 2"),
    ({"bytes_per_s": [[1e9, 1e9]]}, "bytes_per_s has rows of .* and 1 rows, needed are 2 of 2"),
    ({"bytes_per_s": [[1e9, None], [1e9, 1e9]]}, r"bytes_per_s\[0\]\[1\] is null: that link is missing"),
    ({"bytes_per_s": [[1e9, float("nan")], [1e9, 1e9]]}, r"bytes_per_s\[0\]\[1\] is nan"),
    ({"uplink_bytes_per_s": [1e9]}, "hosts has 4 entries from 0 to 1, needed are 4, one a device, from 0 to 0"),
    ({"devices": []}, "come to 0"), ({"format": "autopar cluster 0"}, "'format' is 'autopar cluster 0'"),
])
def test_cluster_files_that_make_no_sense(changed: dict[str, Any], said: str, own: Path, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    file = cluster_file(tmp_path, **changed)
    assert main(["--model", f"{own}:build", "--cluster", file, "--out", str(tmp_path / "plan.json")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"autopar-solve: error: {re.escape(file)} is not a cluster: .*{said}.*\n", err)
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.json"]


def test_interruption_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "answer", fail(KeyboardInterrupt()))
    assert main(["--model", "gpt2"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("given", ["--help", "", "--model gpt5", "--model gpt2 --cluster 8xB200",
                                   "--model gpt2 --mode x"])
def test_help_and_mistakes_do_not_wait_for_torch(given: str) -> None:
    code = ("import sys; from autopar import cli\n"
            "try: cli.main(sys.argv[1:])\n"
            "finally: print([name for name in ('torch', 'transformers', 'pulp') if name in sys.modules])")
    done = python("-c", code, *given.split())
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_command_does_not_take_apart_what_is_left_when_it_ends() -> None:
    told = f"import atexit, sys; atexit.register(print, 'taken apart'); from {cli.__name__} import main;"
    for call, apart in (("main()", False), ("main(sys.argv[1:])", True)):
        done = python("-c", f"{told} sys.exit({call})", "--model", "absent.py:build")
        assert done.returncode == 2 and ("taken apart" in done.stdout) is apart and "absent.py" in done.stderr


def test_as_a_command_quietly() -> None:
    pytest.importorskip("transformers")
    done = python("-m", cli.__name__, "--model", "gpt2", "--cluster", "2xA100-80GB", "--batch", "16", "--seq", "256",
                  "--mode", "1d")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nattention: causal\n" in done.stdout
    assert "\ntransformer_h_0 to transformer_h_11, 12 layers alike:\n" in done.stdout
    line = r"^transformer_h_0_mlp_c_fc +RS0 = RR X RS0 +weight RS0, bias S0 at rest$"
    assert re.search(line, done.stdout, re.MULTILINE)


def test_a_closed_pipe_is_no_fault(own: Path) -> None:
    started = subprocess.Popen([sys.executable, "-m", cli.__name__, "--model", f"{own}:build", "--cluster", "cpu:2"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert started.stdout is not None and started.stderr is not None
    started.stdout.close()
    assert started.wait(240) == 141
    assert started.stderr.read() == "building\n"
    started.stderr.close()

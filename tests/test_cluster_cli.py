"""`autopar-cluster`: what it prints and writes, its exit status, and one clear line when it can't."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from autopar import cli, cluster_cli
from autopar.cluster_cli import RANKS, main
from autopar.core.cluster import Cluster
from autopar.core.curves import Curve
from autopar.core.measured import Measured
from autopar.launch import LAUNCHERS
from tests.paths import PYTHONPATH, ROOT

COLLECTIVES = (Measured("all_reduce", ((0, 1), (2, 3)), Curve((1e3, 1e6, 1e9), (2e-5, 4e-5, 4e-3), 0.021)),
               Measured("all_gather", ((0, 1, 2, 3),), Curve((1e3, 1e9), (2e-5, 3e-3), 0.004)))
# A rank that dies in the middle of it, by RANK.
MEASURE = """\
import os, sys
from autopar import cluster_cli
from autopar.measure import cluster
from tests.measure.efforts import quick
def die(*_): os._exit(9)
if os.environ["RANK"] == {dying!r}: cluster.{at} = die
with quick(): status = cluster_cli.main()
sys.exit(status)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    cluster = dataclasses.replace(Cluster.preset("2x2xH200"), collectives=COLLECTIVES)
    cluster.save(tmp_path / "cluster.json")
    return str(tmp_path / "cluster.json")


def ranks(count: int, *arguments: str, dying: str = "none", at: str = "devices",
          seconds: float = 200.0) -> list[subprocess.CompletedProcess[str]]:
    """What each of so many ranks that `autopar-cluster` was started on did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
             "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", MEASURE.format(dying=dying, at=at), *arguments]
    started = [subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(count)]
    said = [process.communicate(timeout=seconds) for process in started]
    return [subprocess.CompletedProcess(command, process.returncode, out, err)
            for process, (out, err) in zip(started, said, strict=True)]


def test_show(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", file]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert "2x2xH200 (4 devices on 2 hosts)" in out and "hosts of devices: 0 0 1 1" in out
    assert ["0", "to", "3", "H200", "43.5", "643", "643", "4800", "131.3", "5"] in rows
    assert ["2", "80", "80", "-", "360"] in rows, "the matrix of rates"
    assert ["2", "8", "8", "-", "6"] in rows, "and of latencies"
    assert ["all_reduce", "2", "0,1", "2,3", "20", "4.06", "252", "2", "2.1"] in rows
    assert ["all_gather", "4", "0,1,2,3", "20", "3.05", "252", "1", "0.4"] in rows


def test_json_is_the_file_s(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path(file).read_text())


def test_plot(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["show", file, "--plot", str(tmp_path / "links.png")]) == 0
    assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.json", "links.png"]


@pytest.mark.parametrize(("given", "said"), [
    ("", "the following arguments are required: measure|show"), ("look", "invalid choice: 'look'"),
    ("show none.json", "cannot read none.json"), ("show", "required: CLUSTER.JSON"), ("measure", "required: --out"),
    ("show cpu:2 --plot none/links.png", "there is no folder none"),
    ("show cpu:2 --plot a.txt", "cannot draw to a.txt, needed is a name that ends in .png, .pdf, .svg or .jpg"),
    ("show pyproject.toml", "is not JSON"),
])
def test_mistakes(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("autopar-cluster: error: ") and said in err and err.count("\n") == 1


def test_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", cluster_cli.__name__, "show", "none.json"], capture_output=True,
                          text=True, cwd=ROOT, env=os.environ | {"RANK": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_launchers_are_known() -> None:
    assert set(RANKS) == {names[0] for names in LAUNCHERS.values()}


def test_showing_does_not_wait_for_torch() -> None:
    code = ("import sys; from autopar import cluster_cli\n"
            "try: cluster_cli.main(['--help'])\n"
            "finally: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.dist
def test_a_measured_file_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cluster.json"
    first, second = ranks(2, "measure", "--out", str(out), "--name", "mine")
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), first.stderr + second.stderr
    assert first.stdout.startswith("mine (2 devices on 1 hosts)")
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.json"]
    assert len(Cluster.load(out).collectives) == 4
    assert cli.main(["--model", "resnet18", "--batch", "8", "--cluster", str(out)]) == 0
    assert "of mine, mode auto" in capsys.readouterr().out


@pytest.mark.dist
def test_where_nothing_can_be_written_nothing_is_measured(tmp_path: Path) -> None:
    first, second = ranks(2, "measure", "--out", str(tmp_path / "none" / "cluster.json"), dying="0")
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert "there is no folder" in first.stderr and second.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("at", ["devices", "links", "collectives"])
@pytest.mark.parametrize("dying", ["0", "1"])
def test_a_rank_that_dies_ends_all(at: str, dying: str, tmp_path: Path) -> None:
    """By the collective that fails, status 2, or where none does by the watch over ranks, status 1."""
    done = ranks(3, "measure", "--out", str(tmp_path / "cluster.json"), dying=dying, at=at, seconds=120.0)
    said = {2: "rank {} can't go on measuring", 1: "rank {} ends too"}
    for rank, each in enumerate(done):
        assert (each.returncode == 9) is (str(rank) == dying)
        assert each.returncode == 9 or said[each.returncode].format(rank) in each.stderr
    assert list(tmp_path.iterdir()) == []

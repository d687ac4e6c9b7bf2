"""Peers run in processes and environments of their own, and are judged as all others are."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from repapq_plugin import RepAPQConfig
from repapq_plugin.comparison import compare
from repapq_plugin.comparison.environments import environment_with
from repapq_plugin.comparison.peers import PEERS, PeerOptions
from repapq_plugin.comparison.served import ServedNetwork
from repapq_plugin.errors import ConfigError, HostError
from tests.support.networks import Chain, batches, settle

HERE = Path(sys.executable)


def test_a_peer_quantizes_what_it_is_given_and_is_scored_by_the_same_metric(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, data = settle(Chain((8, 12), 1)), batches(2)
    x = torch.cat(data)
    with torch.no_grad():
        wanted = model(x)

    def snr(network: nn.Module) -> float:
        return float(10 * torch.log10(wanted.pow(2).sum() / (network(x) - wanted).pow(2).sum()))

    peers = PeerOptions(["onnxruntime"], pythons={"onnxruntime": HERE})
    table = compare(model, data, snr, RepAPQConfig(), methods=["adaround"], folder=tmp_path, latency=False, peers=peers)
    row = table.rows[2]
    assert (row.key, row.failed, row.by) == (("onnxruntime:min-max", None), "", "onnxruntime==1.31.1")
    assert 20 < row.simulated["score"] < 60
    assert row.integer["score"] == pytest.approx(row.simulated["score"], abs=1)
    assert (row.peak_bytes or 0) > 30e6 and (row.cpu_seconds or 0) > 0 and (row.size_bytes or 0) > 1000
    assert not list(tmp_path.rglob("calibration.npz"))
    four = RepAPQConfig(weight_bits=4, activation_bits=4)
    refused = compare(model, data, snr, four, methods=["adaround"], runtime="none", peers=peers).rows[2]
    assert refused.impossible and refused.failed.endswith("quantizes to 8 bits, not to 4")


@pytest.mark.parametrize(
    ("peer", "change", "reason"),
    [
        ("esp-ppq", {"weight_bits": 3, "activation_bits": 5}, ""),
        ("nncf", {}, ""),
        ("nncf", {"first_last_bits": None}, ""),
        ("nncf", {"weight_bits": 6, "activation_bits": 6}, "NNCF 3.4.0, quantize quantizes to 8 bits, not to 6"),
        ("esp-ppq", {"target": "tensorrt"}, "esp-ppq 1.3.12 is not told of target='tensorrt' here"),
        ("nncf", {"layer_bits": {"a": (4, 4)}}, "NNCF 3.4.0, quantize is not told of layer_bits here"),
    ],
)
def test_a_scheme_that_a_peer_cannot_do_is_named(peer: str, change: dict[str, object], reason: str) -> None:
    assert PEERS[peer].refuses(RepAPQConfig().replace(**change)) == reason


def test_names_of_peers_and_their_ways_are_checked() -> None:
    options = PeerOptions(["nncf", "esp-ppq:mse", "nncf:default"])
    assert options.chosen() == [("nncf", "default"), ("esp-ppq", "mse")]
    with pytest.raises(ConfigError, match="peer='ncnf' is not allowed; choose from .*nearest: nncf"):
        PeerOptions(["ncnf"]).chosen()
    with pytest.raises(ConfigError, match="choose from nncf:default, nncf:bias-correction"):
        PeerOptions(["nncf:fast"]).chosen()


def test_what_a_peer_prints_and_raises_is_kept_and_told(tmp_path: Path) -> None:
    job = {"calibration": str(tmp_path / "missing.npz")}
    with pytest.raises(HostError, match=r"(?s)ended with code 1: .*missing\.npz"):
        ServedNetwork(HERE, "peer_onnxruntime", job, tmp_path)
    assert b"missing.npz" in (tmp_path / "peer.log").read_bytes()


def package(folder: Path, name: str) -> Path:
    """Write a wheel of one empty module, which needs no other package and no index."""
    wheel, about = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr(f"{name}.py", "")
        made.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        made.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{about}/RECORD", "")
    return wheel


def test_an_environment_is_made_once_and_anew_for_other_packages(tmp_path: Path) -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    one = [str(package(tmp_path, "lonely"))]
    python = environment_with("peer", one, tmp_path / "envs", version)
    subprocess.run([python, "-c", "import lonely"], check=True)
    made = (tmp_path / "envs" / "peer" / "ready.json").stat().st_mtime_ns
    assert environment_with("peer", one, tmp_path / "envs", version) == python
    assert (tmp_path / "envs" / "peer" / "ready.json").stat().st_mtime_ns == made
    with pytest.raises(HostError, match="(?s)The environment of the peer peer could not be made: .*nowhere"):
        environment_with("peer", [str(tmp_path / "nowhere-1.0-py3-none-any.whl")], tmp_path / "envs", version)
    assert not (tmp_path / "envs" / "peer" / "ready.json").exists()


def test_without_uv_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="uv is not installed: pip install uv"):
        environment_with("peer", ["a"], tmp_path / "envs")

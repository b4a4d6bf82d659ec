"""What every test starts from: no network, no Hub, a cache of its own and fixed seeds."""

import ipaddress
import os
import random
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Set before any test module imports a Hugging Face library, which reads them once. The cache is a temporary
# folder, so that nothing made from test data stays behind and nobody's own cache decides a result.
_HF_HOME = tempfile.TemporaryDirectory(prefix="peml-tests-")
os.environ.update(
    HF_HOME=_HF_HOME.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)


def pytest_unconfigure() -> None:
    _HF_HOME.cleanup()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, which is absent")


@pytest.fixture(scope="session")
def shared_path(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """Map a name in ../shared/data to its path; the function skips the test where that is absent."""
    root = pytestconfig.rootpath.parent / "shared" / "data"

    def resolve(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"needs ../shared/data/{name}, which is absent")
        return root / name

    return resolve


@pytest.fixture
def peml(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `peml ARGS` on a wide terminal; returns exit code, output and errors."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        # Not above: the Hugging Face libraries behind it would be imported for every test.
        from peml.cli import main

        monkeypatch.setattr(sys, "argv", ["peml", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse every address but this machine's own, in fixtures of every scope too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _local_only(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", _local_names_only(socket.getaddrinfo))
        yield


def _local_only(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_unless_local(address[0])
        return connect(self, address)

    return guarded


def _local_names_only(getaddrinfo: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(host: str | bytes | None, *args: Any, **kwargs: Any) -> Any:
        _refuse_unless_local(host)
        return getaddrinfo(host, *args, **kwargs)

    return guarded


def _refuse_unless_local(host: str | bytes | None) -> None:
    name = host.decode() if isinstance(host, bytes) else host or ""
    if name in ("", "localhost"):
        return
    try:
        address = ipaddress.ip_address(name)
    except ValueError:  # a name that only a name server could tell
        address = None
    if address is None or not (address.is_loopback or address.is_unspecified):
        raise RuntimeError(f"tests must not use the network (asked for {name})")

"""The machine: whom the tool trusts on it, what it writes and in which order, what it sends where."""

import io
import os
from pathlib import Path
from typing import Dict

import pytest

import merge_contacts as tool
from tests.support import Workplace, organisation_of_pairs

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")


# ----- where the token goes ------------------------------------------------------------------------

TOKEN, URL = "DEVREV_API_TOKEN", "DEVREV_BASE_URL"
OTHER, DEFAULT = "https://gateway.example.com", "https://api.devrev.ai/"
# The environment, `.env` in the current folder, `.env` beside the script; what happens.
DESTINATIONS = [
    ({}, {URL: OTHER, TOKEN: "t"}, {}, "named"),
    ({}, {URL: OTHER}, {TOKEN: "t"}, "refused"),
    ({}, {TOKEN: "t"}, {URL: OTHER}, "refused"),
    ({TOKEN: "t"}, {URL: OTHER}, {}, "refused"),
    ({TOKEN: "t"}, {URL: OTHER, TOKEN: "other"}, {}, "refused"),
    ({TOKEN: "t"}, {URL: "http://127.0.0.1:9"}, {}, "refused"),
    ({URL: OTHER}, {TOKEN: "t"}, {}, "named"),
    ({URL: OTHER, TOKEN: "t"}, {URL: "https://evil.example.com"}, {}, "named"),
    ({TOKEN: "t"}, {URL: DEFAULT}, {}, ""),
    ({TOKEN: "t"}, {}, {}, ""),
    ({TOKEN: "t", URL: "http://localhost:9"}, {}, {}, ""),
    ({}, {URL: OTHER}, {}, "named"),  # and then the token is missing
]


@pytest.mark.parametrize("environment, here, beside, outcome", DESTINATIONS)
def test_a_file_sends_no_token_but_its_own_to_another_host(
    environment: Dict[str, str],
    here: Dict[str, str],
    beside: Dict[str, str],
    outcome: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = tmp_path / "tool" / "merge_contacts.py"
    (tmp_path / "here").mkdir()
    script.parent.mkdir()
    for folder, values in ((tmp_path / "here", here), (script.parent, beside)):
        lines = "".join(f"{name}={value}\n" for name, value in values.items())
        (folder / ".env").write_text(lines, encoding="utf-8")
        (folder / ".env").chmod(0o600)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tool, "__file__", str(script))
    for name in (TOKEN, URL):
        monkeypatch.setenv(name, environment.get(name, ""))
    settings = tool.load_settings(tool.load_environment(), 8)
    console = tool.Console(err=io.StringIO())
    if outcome == "refused":
        with pytest.raises(tool.FatalError) as stopped:
            tool.check_destination(settings, console)
        assert stopped.value.exit_code == 2
        for place in (settings.url_file, settings.token_file or "the environment"):
            assert place in str(stopped.value)
    else:
        tool.check_destination(settings, console)
    named = console.err.getvalue()  # type: ignore[attr-defined]
    assert named == (f"requests go to {OTHER}\n" if outcome == "named" else "")


@pytest.mark.parametrize("mode", ["--check", "--csv", "--export", "--preview --live", "--undo"])
def test_a_foreign_base_url_stops_whatever_makes_requests_and_nothing_else(
    place: Workplace, mode: str
) -> None:
    place.export(organisation_of_pairs(1)[0])
    path = place.folder / ".env"
    path.write_text(f"{URL}={OTHER}\n", encoding="utf-8")
    path.chmod(0o600)
    values = {"--csv": ["contacts.csv"], "--export": ["new.csv"], "--undo": ["backups/x"]}
    options = [*mode.split(), *values.get(mode, [])]
    result = place.run(None, *options, check=2, DEVREV_API_TOKEN="token")
    assert (
        f"DEVREV_BASE_URL is from {path}, and DEVREV_API_TOKEN from the environment" in result.err
    )
    assert not (place.folder / "savepoint.db").exists()
    place.run(None, "--preview", check=0, DEVREV_API_TOKEN="token")


@posix
@pytest.mark.parametrize("mode, warns", [(0o644, True), (0o640, True), (0o600, False)])
def test_an_env_file_that_others_may_read_is_named_with_the_chmod(
    place: Workplace, mode: int, warns: bool
) -> None:
    place.export(organisation_of_pairs(1)[0])
    path = place.folder / ".env"
    path.write_text("DEVREV_TIMEOUT=30\n", encoding="utf-8")
    path.chmod(mode)
    assert place.run(None, "--preview", check=0).err.count(f"chmod 600 {path}") == int(warns)

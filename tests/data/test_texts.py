"""Texts are found by name or path, identified by their hash, and every failure says what to do."""

import hashlib
import http.server
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pydoc_data.topics import topics

import datasets
import huggingface_hub
import pytest

from flatq_cli.data import texts
from flatq_cli.data.texts import load_text
from flatq_cli.errors import UsageError

# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["plain\n", "größer 漢字 🙂\r\nline two\n\n", "\ufeffwith a mark"])
def test_a_file_is_read_as_it_is_and_identified_by_its_bytes(tmp_path, content):
    path = tmp_path / "mine.txt"
    path.write_bytes(content.encode("utf-8"))
    text = load_text(str(path))
    assert text.name == str(path)
    assert text.content == content.removeprefix("\ufeff")
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "place"), [(b"abc\xffdef", "byte 3 is 0xff"), (b"\xef\xbb\xbfab\xe9", "byte 5 is 0xe9")]
)
def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path, content, place):
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(f"{path} is not UTF-8 text: {place}")):
        load_text(str(path))


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(f"{path} is empty")):
        load_text(str(path))


def test_a_missing_file_or_misspelt_name_gets_the_nearest_names(tmp_path):
    (tmp_path / "wiki-calib.txt").write_text("x")
    with pytest.raises(UsageError) as caught:
        load_text(str(tmp_path / "wiki-calb.txt"))
    assert f"did you mean {tmp_path / 'wiki-calib.txt'}" in str(caught.value)
    assert "auto, wikitext2, wikitext2-test, pydoc, pydoc-test" in str(caught.value)
    with pytest.raises(UsageError, match="did you mean wikitext2"):
        load_text("wikitxt2")
    with pytest.raises(UsageError, match=r"no text '/no/such/folder/x\.txt'"):
        load_text("/no/such/folder/x.txt")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is a directory"):
        load_text(str(tmp_path))


# pydoc ---------------------------------------------------------------------------------------------------------------


def test_pydoc_is_the_language_reference_in_the_order_of_its_topics():
    text = load_text("pydoc")
    assert text.name == "pydoc"
    assert text.sha256 == hashlib.sha256(text.content.encode("utf-8")).hexdigest()
    assert text.content.startswith(topics[sorted(topics)[0]].split("\n\n")[0].rstrip())


def test_the_parts_of_pydoc_share_no_paragraph_and_are_the_whole_reference():
    parts = [load_text("pydoc").content.split("\n\n"), load_text("pydoc", evaluation=True).content.split("\n\n")]
    reference = "\n\n".join(topics.values()).split("\n\n")
    assert not set(parts[0]) & set(parts[1])
    assert set(parts[0]) | set(parts[1]) == {paragraph.rstrip() for paragraph in reference if paragraph.strip()}
    assert load_text("pydoc-test") == load_text("pydoc", evaluation=True)
    assert load_text("pydoc-test").name == "pydoc-test"


# The hub, played by a local server ------------------------------------------------------------------------------------


def hub_at(monkeypatch, tmp_path, endpoint):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    hub_at(monkeypatch, tmp_path, endpoint)  # nobody listens there now
    return endpoint


@pytest.fixture
def failing(monkeypatch, tmp_path):
    class Unavailable(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unavailable) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub_at(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.fixture
def cached(tmp_path):
    """WikiText-2 (a few lines of it) in the cache of `datasets`: made by the library, then given the hub's name."""
    files = {}
    for split, lines in {"train": ["= Title =", "", "train text"], "test": ["test text", "more"]}.items():
        files[split] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_dict({"text": lines}).to_parquet(files[split])
    cache = tmp_path / "cache"
    datasets.load_dataset("parquet", name="wikitext-2-raw-v1", data_files=files, cache_dir=str(cache))
    (made,) = cache.glob("parquet/*/*/*/parquet-train.arrow")
    folder = cache / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / "abc123"
    folder.parent.mkdir(parents=True)
    made.parent.rename(folder)
    for split in files:
        (folder / f"parquet-{split}.arrow").rename(folder / f"wikitext-{split}.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"dataset_name": "wikitext", "config_name": "wikitext-2-raw-v1"}
    for split in info["splits"].values():
        split["dataset_name"] = "wikitext"
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.usefixtures("unreachable")
def test_an_unreachable_hub_is_said_at_once_with_the_way_out(capfd, caplog):
    began = time.monotonic()
    with pytest.raises(UsageError) as caught:
        load_text("wikitext2")
    assert time.monotonic() - began < 5  # the library alone retries for 23 s
    message = str(caught.value)
    assert "cannot get Salesforce/wikitext" in message
    assert "Hugging Face hub" in message
    assert "does not answer" in message
    assert "path of a UTF-8 text file" in message
    assert "\n" not in message
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("failing")
def test_a_failing_hub_is_said_with_its_answer():
    with pytest.raises(UsageError, match="the hub answers 503, and the cache does not have it"):
        load_text("wikitext2-test")


def test_a_hub_that_never_answers_is_given_up_soon(monkeypatch, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        hub_at(monkeypatch, tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(texts, "_PROBE_SECONDS", 0.2)
        began = time.monotonic()
        with pytest.raises(UsageError, match="does not answer"):
            load_text("wikitext2")
        assert time.monotonic() - began < 4


@pytest.mark.usefixtures("unreachable", "cached")
def test_a_cached_text_is_used_without_the_hub():
    train = load_text("wikitext2")
    assert (train.name, train.content) == ("wikitext2", "= Title =\n\n\n\ntrain text")
    test = load_text("wikitext2", evaluation=True)
    assert (test.name, test.content) == ("wikitext2-test", "test text\n\nmore")
    assert load_text("wikitext2-test") == test
    assert load_text("auto") == train
    assert load_text("auto", evaluation=True) == test


@pytest.mark.usefixtures("unreachable")
def test_auto_falls_back_to_pydoc_and_says_so():
    warnings = []
    text = load_text("auto", warn=warnings.append)
    assert text == load_text("pydoc")
    assert len(warnings) == 1
    assert "hub" in warnings[0]
    assert "pydoc" in warnings[0]
    assert load_text("auto") == text


@pytest.mark.usefixtures("unreachable")
def test_the_libraries_are_left_as_they_were():
    logger = logging.getLogger("huggingface_hub")
    before = (logger.level, datasets.config.HF_HUB_OFFLINE, datasets.utils.logging.is_progress_bar_enabled())
    load_text("auto")
    assert before == (logger.level, datasets.config.HF_HUB_OFFLINE, datasets.utils.logging.is_progress_bar_enabled())


def test_offline_mode_is_honoured_and_named(tmp_path):
    code = "import sys; from flatq_cli.data.texts import load_text; load_text('wikitext2')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "UsageError: cannot get Salesforce/wikitext" in done.stderr
    assert "offline mode is on (HF_HUB_OFFLINE) and the cache does not have it" in done.stderr

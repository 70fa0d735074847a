"""What a model's own files say of SparseK attention."""

import json
import struct

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dsa import SparseConfig
from mlx_dsa.cli import main
from mlx_dsa.gguf import read_metadata
from mlx_dsa.presets import resolve
from mlx_dsa.rules import sparsek_settings

ALL = dict(sparsek_enable=True, sparsek_topk=512, sparsek_window=32, sparsek_stride=64)
FIELDS = dict(select="sparsek:window=32,stride=64", top_k=512)


def in_gguf(values, arch="llama"):
    return {f"{arch}.sparsek.{key.removeprefix('sparsek_')}": value for key, value in values.items()}


@pytest.mark.parametrize(
    "values, fields",
    [
        (ALL, FIELDS),
        (in_gguf(ALL), FIELDS),
        ({"general.architecture": "qwen2", **in_gguf(ALL, "qwen2")}, FIELDS),
        (dict(ALL, sparsek_enable=1, hidden_size=64), FIELDS),
        (in_gguf({key: mx.array(value) for key, value in ALL.items()}), FIELDS),
        (dict(sparsek_enable=True), dict(select="sparsek")),
        (dict(sparsek_stride=0), dict(select="sparsek:stride=0")),
        (dict(sparsek_topk=9, sparsek_window=0), dict(select="sparsek:window=0", top_k=9)),
        (dict(ALL, sparsek_enable=False), None),
        (dict(ALL, sparsek_topk=0), None),
        (dict(hidden_size=64), None),
        (in_gguf(ALL, "qwen2"), None),
    ],
)
def test_what_a_model_says(values, fields):
    assert sparsek_settings(values) == fields
    if fields:
        assert SparseConfig(n_recent=4, n_sink=1, **fields).select == fields["select"]


@pytest.mark.parametrize("name", ["topk", "window", "stride"])
@pytest.mark.parametrize("value", [-1, 2.5, "64", None, True, [3], mx.array([1, 2])])
def test_a_value_that_is_no_number_is_named(name, value):
    for values in (dict(ALL, **{f"sparsek_{name}": value}), in_gguf({name: value})):
        with pytest.raises(ValueError, match=f"sparsek[_.]{name}' must be a whole number"):
            sparsek_settings(values)


@pytest.mark.parametrize("value", [2, "yes", None, 1.0])
def test_enable_is_true_or_false(value):
    with pytest.raises(ValueError, match="'sparsek_enable' must be true or false"):
        sparsek_settings(dict(ALL, sparsek_enable=value))


def test_a_folder_that_has_them_gives_them_to_sparsek_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(ALL, hidden_size=64)))
    model = str(tmp_path)

    def config(**given):
        made = resolve(None, model=model, **given).config
        return made.top_k, made.select

    assert config(select="sparsek") == (512, "sparsek:window=32,stride=64")
    assert config(select="sparsek:stride=8") == (512, "sparsek:window=32,stride=8")
    assert config(select="sparsek:by_head=true", top_k=700) == (700, "sparsek:window=32,stride=64,by_head=true")
    assert config(select="quest") == (2048, "quest")
    assert config() == (2048, "lightning")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    assert config(select="sparsek") == (2048, "sparsek")
    (tmp_path / "config.json").write_text(json.dumps(dict(ALL, sparsek_topk="many")))
    with pytest.raises(ValueError, match="'sparsek_topk' must be"):
        config(select="sparsek")
    assert config(select="oracle") == (2048, "oracle")


def test_a_small_top_k_of_the_model_lowers_n_recent(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(sparsek_topk=64, sparsek_window=8)))
    with pytest.warns(UserWarning, match="'n_recent' is lowered from 64 to 32"):
        config = resolve(None, model=str(tmp_path), select="sparsek").config
    assert (config.top_k, config.n_recent, config.select) == (64, 32, "sparsek:window=8")


def test_the_command_says_what_is_wrong_with_them_in_a_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(ALL, sparsek_window=-3)))
    result = CliRunner().invoke(main, ["info", "--model", str(tmp_path), "--select", "sparsek"])
    assert result.exit_code and "'sparsek_window' must be a whole number" in result.output
    assert "Traceback" not in result.output


def gguf(pairs, version=3):
    """Return the bytes of a GGUF file without tensors."""
    data = b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs))
    for key, kind, value in pairs:
        data += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    return data


TEXTS = struct.pack("<IQ", 8, 2) + b"".join(struct.pack("<Q", 2) + t for t in (b"ab", b"cd"))
NESTED = struct.pack("<IQ", 9, 1) + struct.pack("<IQ4i", 5, 4, 1, 2, 3, 4)
PAIRS = [
    ("general.architecture", 8, struct.pack("<Q", 5) + b"llama"),
    ("tokenizer.tokens", 9, TEXTS),
    ("nested", 9, NESTED),
    ("llama.sparsek.enable", 7, b"\1"),
    ("llama.sparsek.topk", 4, struct.pack("<I", 512)),
    ("llama.sparsek.window", 5, struct.pack("<i", 32)),
    ("llama.sparsek.stride", 10, struct.pack("<Q", 64)),
    ("llama.eps", 6, struct.pack("<f", 0.5)),
]


def test_metadata_of_a_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf(PAIRS) + b"tensors")
    values = read_metadata(file)
    assert values == {
        "general.architecture": "llama",
        **in_gguf(ALL),
        "llama.eps": 0.5,
    }
    assert resolve(None, model=str(tmp_path), select="sparsek").config.select == FIELDS["select"]
    (tmp_path / "config.json").write_text(json.dumps(dict(sparsek_topk=300)))  # comes first
    config = resolve(None, model=str(tmp_path), select="sparsek").config
    assert (config.top_k, config.select) == (300, "sparsek")


def test_metadata_that_mlx_wrote(tmp_path):
    file = str(tmp_path / "model.gguf")
    said = {"llama.sparsek.topk": mx.array(512), "general.architecture": "llama"}
    mx.save_gguf(file, {"a": mx.zeros((4, 4))}, said)
    assert read_metadata(file) == {"llama.sparsek.topk": 512, "general.architecture": "llama"}


def test_every_cut_of_a_gguf_file_is_told(tmp_path):
    file, whole = tmp_path / "model.gguf", gguf(PAIRS)
    for n in range(4, len(whole)):
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="is damaged"):
            read_metadata(file)
    nested = struct.pack("<IQ", 9, 1) * 5000
    for data, words in (
        (b"GGML" + whole[4:], "not a GGUF file"),
        (gguf(PAIRS, version=9), "version 9"),
        (gguf([("a", 77, b"")]), "is damaged"),
        (gguf([("a", 9, nested)]), "is damaged"),
        (gguf([("a", 8, struct.pack("<Q", 1 << 62))]), "is damaged"),
        (gguf([("a", 9, struct.pack("<IQ", 8, 1 << 60))]), "is damaged"),
        (gguf([("a", 9, struct.pack("<IQ", 10, 1 << 63))]), "is damaged"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            read_metadata(file)

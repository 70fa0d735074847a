"""Search projections of other systems: PyTorch checkpoints and GGUF files, nothing of them executed."""

import collections
import io
import json
import pickle
import struct
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from local_models import write_model
from torch_files import Saved, write_torch

from mlx_dsa.cli import main
from mlx_dsa.convert import read_projections
from mlx_dsa.search import load_projections

DIM, N, LAYERS = 24, 8, (4, 12)


def matrices(seed=0, shape=(N, DIM), dtype=np.float32):
    noise = np.random.default_rng(seed)
    return {(i, w): noise.standard_normal(shape).astype(dtype) for i in LAYERS for w in "QK"}


def state(found, make=Saved, prefix=""):
    return collections.OrderedDict((f"{prefix}projections.{i}.W_{w}s.weight", make(x)) for (i, w), x in found.items())


def assert_read(projections, found):
    assert list(projections) == list(LAYERS)
    for (i, w), expected in found.items():
        own = projections[i].wq if w == "Q" else projections[i].wk
        assert np.array_equal(np.array(own.weight.astype(mx.float32)), expected.astype(np.float32))


# PyTorch


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
def test_a_state_dict(tmp_path, dtype, protocol):
    found = matrices(dtype=dtype)
    assert_read(read_projections(write_torch(tmp_path / "a.pt", state(found), protocol=protocol)), found)


def test_a_checkpoint_of_a_run(tmp_path):
    found = matrices()
    value = {
        "step": 1000,
        "search_module": state(found, prefix="_orig_mod."),
        "optimizer": {"state": {0: {"exp_avg": Saved(np.ones((2, 3), "f4"))}}, "groups": [{"lr": 1e-4}]},
        "config": {"layers": [4, 12], "betas": (0.9, 0.95), "name": None, "big": 1 << 70, "on": True},
    }
    value["search_module"]._metadata = collections.OrderedDict(version=1)
    value["config"]["itself"] = value["config"]
    assert_read(read_projections(write_torch(tmp_path / "a.pt", value, root="search_step_1000")), found)


def test_tensors_of_16_bits_parameters_and_views(tmp_path):
    found = matrices()
    bits = {key: (x.view("u4") >> 16).astype("u2") for key, x in found.items()}
    cut = {key: (x.astype("u4") << 16).view("f4") for key, x in bits.items()}
    assert_read(read_projections(write_torch(tmp_path / "a.pt", state(bits))), cut)
    parameters = state(found, lambda x: Saved(x, parameter=True))
    assert_read(read_projections(write_torch(tmp_path / "b.pth", parameters)), found)

    def view(x):  # columns first, behind other numbers
        flat = np.concatenate([np.full(5, 9, "f4"), x.T.ravel()])
        return Saved(flat, shape=x.shape, strides=(1, N), offset=5)

    assert_read(read_projections(write_torch(tmp_path / "c.bin", state(found, view))), found)


RAN = []


def set_flag():
    RAN.append(True)


class Harmless:
    """Set a flag when it is unpickled."""

    def __reduce__(self):
        return set_flag, ()


class Free(pickle.Unpickler):
    """Python's own, which does whatever a pickle asks for; tensors are nothing to it."""

    def persistent_load(self, told):
        return None

    def find_class(self, module, name):
        return (lambda *_: None) if module.startswith("torch") else super().find_class(module, name)


@pytest.mark.parametrize("where", ["alone", "beside", "inside"])
def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(tmp_path, where):
    tensors = state(matrices())
    value = {
        "alone": Harmless(),
        "beside": {**tensors, "x": Harmless()},
        "inside": {"a": [tensors, (Harmless(),)]},
    }
    file = write_torch(tmp_path / "a.pt", value[where])
    RAN.clear()
    with pytest.raises(ValueError, match="set_flag, which is no tensor. Nothing in it was executed"):
        read_projections(file)
    assert RAN == []
    with zipfile.ZipFile(file) as archive:
        Free(io.BytesIO(archive.read("archive/data.pkl"))).load()
    assert RAN == [True]


def test_what_would_have_run(tmp_path):
    """The same bytes by Python's own pickle do what the refused file asks for."""
    made = tmp_path / "made"
    pickled = b"cos\nmkdir\n(V" + str(made).encode() + b"\ntR."
    with pytest.raises(ValueError, match="holds os.mkdir, which is no tensor"):
        read_projections(write_torch(tmp_path / "a.pt", None, pickled=pickled))
    assert not made.exists()
    pickle.loads(pickled)
    assert made.exists()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "pickled, told",
    [
        (b"cbuiltins\neval\n(V1\ntR.", "holds builtins.eval, which is no tensor"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "holds builtins.eval"),
        (b"\x80\x02cbuiltins\nlist\n)\x81.", "holds builtins.list"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "its pickle uses NEWOBJ"),
        (b"\x80\x02\x82\x01.", "its pickle uses EXT1"),
        (b"(ios\ngetcwd\n.", "its pickle uses INST"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage, which makes no tensor"),
        (b"\x80\x02K\x01)R.", "makes no sense"),
        (b"\x80\x02" + REBUILD + b"K\x01\x85R.", "makes no sense"),
        (b"\x80\x02" + REBUILD + b"}b.", "makes no sense"),
        (b"\x80\x02h\x07.", "makes no sense"),
        (b"\x80\x02t.", "makes no sense"),
        (b"\x80\x02]}s.", "makes no sense"),
        (b"\x80\x02}]K\x01s.", "makes no sense"),
        (b"\x80\x02K\x01Q.", "makes no sense"),
        (b"\x80\x02}", "makes no sense"),
        (b"", "makes no sense"),
        (b"\xff\xff", "makes no sense"),
        (b"\x80\x02}.", "holds no search projections"),
    ],
)
def test_odd_pickles_end_in_one_line(tmp_path, pickled, told):
    file = write_torch(tmp_path / "a.pt", None, pickled=pickled)
    with pytest.raises(ValueError, match=told) as caught:
        read_projections(file)
    assert "\n" not in str(caught.value)


def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path):
    tensors = state(matrices())
    name = "projections.4.W_Qs.weight"
    small = np.ones(N * DIM, "f4")
    for odd in (
        Saved(small, shape=(N, DIM), strides=(DIM, 1), offset=1),
        Saved(small, shape=(N, DIM), strides=(DIM + 1, 1)),
        Saved(small, shape=(N, 1 << 40), strides=(0, 0)),
        Saved(small, shape=(N, 0), strides=(1, 1)),
    ):
        with pytest.raises(ValueError, match="beyond its storage|larger than its storage"):
            read_projections(write_torch(tmp_path / "a.pt", {**tensors, name: odd}))
    with pytest.raises(ValueError, match="makes no sense"):
        odd = Saved(small, shape=(N, DIM), strides=(DIM, -1))
        read_projections(write_torch(tmp_path / "a.pt", {**tensors, name: odd}))


def test_odd_archives_are_refused(tmp_path):
    tensors = state(matrices())
    for how, told in (
        (dict(cut=4), "a storage is cut off"),
        (dict(compression=zipfile.ZIP_DEFLATED), "compressed"),
        (dict(byteorder=b"big"), "big-endian"),
        (dict(root="a/b"), "has no data.pkl"),
    ):
        with pytest.raises(ValueError, match=told):
            read_projections(write_torch(tmp_path / "a.pt", tensors, **how))
    data = write_torch(tmp_path / "a.pt", tensors).read_bytes()
    for end in (10, len(data) // 2, len(data) - 5):
        (tmp_path / "b.pt").write_bytes(data[:end])
        with pytest.raises(ValueError, match="is damaged"):
            read_projections(tmp_path / "b.pt")
    at = data.index(b"projections")  # inside data.pkl, of which the zip knows a checksum
    (tmp_path / "b.pt").write_bytes(data[:at] + b"x" + data[at + 1 :])
    with pytest.raises(ValueError, match="is damaged .Bad CRC"):
        read_projections(tmp_path / "b.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    with pytest.raises(ValueError, match="neither a GGUF file nor a PyTorch checkpoint in zip format"):
        read_projections(tmp_path / "old.pt")


def test_projections_that_are_not_one_matrix_each_are_refused(tmp_path):
    found = matrices()
    deep = {f"projections.4.W_Qs.{n}.weight": Saved(found[4, "Q"]) for n in (0, 3)}
    for change, told in (
        (deep, "not one matrix each"),
        ({"projections.4.W_Qs.bias": Saved(np.ones(N, "f4"))}, "not one matrix each"),
        ({"b.projections.4.W_Qs.weight": Saved(found[4, "Q"])}, "twice"),
        ({"projections.7.W_Qs.weight": Saved(found[4, "Q"])}, "layer 7 .* one for keys"),
        ({"projections.4.W_Qs.weight": Saved(np.ones(N, "f4"))}, "must be a matrix but is"),
        ({"projections.4.W_Qs.weight": Saved(np.full((N, DIM), np.nan, "f4"))}, "not finite"),
    ):
        with pytest.raises(ValueError, match=told):
            read_projections(write_torch(tmp_path / "a.pt", {**state(found), **change}))
    both = {f"projections.4.W_{w}s.weight": Saved(np.ones((4, DIM), "f4")) for w in "QK"}
    with pytest.raises(ValueError, match="layers of .* differ in shape"):
        read_projections(write_torch(tmp_path / "a.pt", {**state(found), **both}))


# GGUF


def write_gguf(path, found, dim=DIM, **more):
    names = {"Q": "proj", "K": "attn_k"}
    arrays = {f"blk.{i}.indexer.{names[w]}.weight": mx.array(x) for (i, w), x in found.items()}
    arrays |= {"token_embd.weight": mx.ones((5, 32)), **more}
    told = {"general.architecture": "qwen3", "words": ["a", "bc"], "numbers": mx.array([1.0, 2.0])}
    if dim:
        told["qwen3.embedding_length"] = mx.array(dim, mx.uint32)
    mx.save_gguf(str(path), arrays, told)
    return path


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_a_gguf_file(tmp_path, dtype):
    found = matrices(dtype=dtype)
    file = write_gguf(tmp_path / "a.gguf", found)
    assert_read(read_projections(file), found)
    loaded = mx.load(str(file))  # by MLX's own reader, another one
    assert mx.array_equal(loaded["blk.4.indexer.attn_k.weight"], read_projections(file)[4].wk.weight)


def raw_gguf(path, tensors, version=3, alignment=64, metadata=()):
    """Write a GGUF file by hand: tensors as (name, shape, type, bytes)."""

    def text(x):
        return struct.pack("<Q", len(x)) + x.encode()

    pairs = [("general.alignment", 4, struct.pack("<I", alignment)), *metadata]
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(pairs))
    head += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    data = b""
    for name, shape, kind, numbers in tensors:
        data += b"\0" * (-len(data) % alignment)
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += numbers
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data)
    return path


def pair_of(shape, kind, data):
    return [(f"blk.0.indexer.{name}.weight", shape, kind, data) for name in ("proj", "attn_k")]


def test_types_of_gguf_tensors(tmp_path):
    x = np.random.default_rng(0).standard_normal((4, 64)).astype("f4")
    bits = (x.view("u4") >> 16).astype("<u2")
    own = read_projections(raw_gguf(tmp_path / "a.gguf", pair_of((4, 64), 30, bits.tobytes())))[0].wq.weight
    assert own.dtype == mx.bfloat16
    assert np.array_equal(np.array(own.astype(mx.float32)), (bits.astype("u4") << 16).view("f4"))

    blocks = x.reshape(-1, 32)
    scales = (np.abs(blocks).max(1) / 127).astype("<f2")
    numbers = np.round(blocks / scales[:, None].astype("f4")).clip(-127, 127).astype("i1")
    data = b"".join(s.tobytes() + n.tobytes() for s, n in zip(scales, numbers))
    own = read_projections(raw_gguf(tmp_path / "a.gguf", pair_of((4, 64), 8, data)))[0].wk.weight
    expected = (scales[:, None].astype("f4") * numbers).reshape(4, 64)
    assert np.abs(np.array(own.astype(mx.float32)) - expected).max() < 2e-3 < np.abs(x).max()
    assert np.abs(expected - x).max() < 0.02

    with pytest.raises(ValueError, match="is of GGUF type 12: known are F32, F16, Q8_0, BF16"):
        read_projections(raw_gguf(tmp_path / "a.gguf", pair_of((4, 256), 12, b"\0" * 576)))


def test_damaged_gguf_files_are_refused(tmp_path):
    data = write_gguf(tmp_path / "a.gguf", matrices()).read_bytes()
    n_refused = 0
    for end in (*range(4, 400, 9), len(data) - 40):
        (tmp_path / "b.gguf").write_bytes(data[:end])
        with pytest.raises(ValueError, match="is damaged or not a GGUF file"):
            read_projections(tmp_path / "b.gguf")
        n_refused += 1
    assert n_refused > 40
    (tmp_path / "b.gguf").write_bytes(data[:4] + struct.pack("<I", 1) + data[8:])
    with pytest.raises(ValueError, match="GGUF of version 1, not 2 or 3"):
        read_projections(tmp_path / "b.gguf")
    # Counts that no file can hold.
    (tmp_path / "b.gguf").write_bytes(data[:8] + struct.pack("<QQ", 1 << 60, 1 << 60) + data[24:])
    with pytest.raises(ValueError, match="is damaged or not a GGUF file"):
        read_projections(tmp_path / "b.gguf")


def test_other_indexers_are_not_taken_for_projections(tmp_path):
    lightning = {"blk.4.indexer.attn_q_b.weight": mx.ones((N, DIM))}
    with pytest.raises(ValueError, match="lightning indexers of a model"):
        read_projections(write_gguf(tmp_path / "a.gguf", matrices(), **lightning))
    with pytest.raises(ValueError, match="holds no search projections"):
        read_projections(write_gguf(tmp_path / "a.gguf", {}))


# Which way round


@pytest.mark.parametrize("dim", [DIM, None])
def test_a_transposed_file_is_asked_about_and_not_guessed(tmp_path, dim):
    found = matrices()
    turned = {key: np.ascontiguousarray(x.T) for key, x in found.items()}
    right = write_gguf(tmp_path / "right.gguf", found, dim)
    wrong = write_gguf(tmp_path / "wrong.gguf", turned, dim)
    with pytest.raises(ValueError, match=r"as \[24, 8\], which is the wrong way round .* 'transposed'"):
        read_projections(wrong)
    assert_read(read_projections(wrong, transposed=True), found)
    assert_read(read_projections(right, transposed=False), found)
    with pytest.raises(ValueError, match="which is not transposed"):
        read_projections(right, transposed=True)
    with pytest.raises(ValueError, match="which is transposed"):
        read_projections(wrong, transposed=False)


def test_a_square_file_fits_both_ways_and_is_asked_about(tmp_path):
    found = matrices(shape=(DIM, DIM))
    file = write_torch(tmp_path / "a.pt", state(found))
    with pytest.raises(ValueError, match="fits both ways round"):
        read_projections(file)
    assert_read(read_projections(file, transposed=False), found)
    assert_read(read_projections(file, transposed=True), {key: x.T for key, x in found.items()})


def test_a_file_of_another_width_than_it_says_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\[8, 24\], which doesn't fit for a hidden state of width 48"):
        read_projections(write_gguf(tmp_path / "a.gguf", matrices(), dim=48))


# The command


def run(*arguments):
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def test_the_command_writes_what_is_loaded(tmp_path):
    found = matrices()
    source = write_torch(tmp_path / "a.pt", state(found))
    result = run(source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "projections of 2 layers (4, 12), 24 to 8" in result.output
    assert "--select projections" in result.output
    assert_read(load_projections(tmp_path / "out"), found)
    about = json.loads((tmp_path / "out" / "run_config.json").read_text())
    assert about == {
        "kind": "projections", "proj_dim": N, "hidden_size": DIM, "layers": [4, 12], "source": "a.pt"
    }  # fmt: skip
    assert run(source, tmp_path / "x.safetensors").exit_code == 0
    assert_read(load_projections(tmp_path / "x.safetensors"), found)


def test_the_command_overwrites_nothing_unasked(tmp_path):
    source = write_torch(tmp_path / "a.pt", state(matrices()))
    other = matrices(seed=1)
    for name in ("indexers.safetensors", "run_config.json"):
        out = tmp_path / name[:3]
        out.mkdir()
        (out / name).write_text("mine")
        result = run(source, out)
        assert result.exit_code == 2 and "exists. Name another place, or give --force" in result.output
        assert (out / name).read_text() == "mine" and len(list(out.iterdir())) == 1
        assert run(write_torch(tmp_path / "b.pt", state(other)), out, "--force").exit_code == 0
        assert_read(load_projections(out), other)
        # What is refused leaves what was there.
        before = {file: file.read_bytes() for file in out.iterdir()}
        assert run(tmp_path / "none.pt", out, "--force").exit_code == 1
        assert before == {file: file.read_bytes() for file in out.iterdir()}


def test_errors_of_the_command_are_one_line_with_its_options(tmp_path):
    turned = {key: np.ascontiguousarray(x.T) for key, x in matrices().items()}
    source = write_gguf(tmp_path / "a.gguf", turned)
    result = run(source, tmp_path / "out")
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == 1 and len(errors) == 1 and "give --transposed" in errors[0]
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out", "--transposed").exit_code == 0
    (tmp_path / "f").write_text("")
    result = run(source, tmp_path / "f" / "out")
    assert result.exit_code == 1 and "is a file" in result.output


def test_a_file_that_needs_converting_says_so(tmp_path):
    source = write_torch(tmp_path / "a.pt", state(matrices()))
    with pytest.raises(ValueError, match="of another system. Convert it first: mlx-dsa convert"):
        load_projections(source)


def test_commands_take_what_was_converted(tmp_path):
    model = write_model(tmp_path / "model")
    found = {(i, w): x for (i, w), x in zip([(0, "Q"), (0, "K")], matrices(shape=(N, 64)).values())}
    assert run(write_torch(tmp_path / "a.pt", state(found)), tmp_path / "out").exit_code == 0
    words = ["--model", model, "--indexer", tmp_path / "out", "--top-k", "16", "--n-recent", "4"]

    def result_of(command, *more):
        return CliRunner().invoke(main, [command, *map(str, (*words, *more))])

    result = result_of("info", "--select", "projections")
    assert result.exit_code == 0, result.output
    assert "1 layers, search projections to 8, 1,024 parameters a layer" in result.output
    prompt = ["--raw", "--prompt", "one two three four five six seven " * 5]
    prompt += ["--max-tokens", "3", "--cache", "full"]
    result = result_of("generate", "--select", "projections", *prompt)
    assert result.exit_code == 0, result.output
    result = result_of("generate", *prompt)
    assert result.exit_code == 1 and "holds search projections" in result.output
    assert "Use --select projections" in result.output

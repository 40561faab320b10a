"""Checks GGUF files against llama.cpp itself: those that `anser convert` writes, and llama.cpp's quantised ones that `anser` reads.

    pip install numpy gguf
    cargo build --release && python tools/llama_roundtrip.py target/release/anser

llama.cpp comes from npm (`@node-llama-cpp/linux-x64`, its C libraries, unpacked into a temporary folder and called through ctypes). Two models:
models/anser-12m.safetensors, and random weights with the World vocabulary. Of each, files of f32, f16, bf16 and q8_0 written by `anser convert` are
loaded by llama.cpp, whose logits over a prompt and then token by token are compared with `anser debug logits` of the same file. llama.cpp rounds
activations as it does weights, so the same values are compared in f32 too, where both compute alike. The World tokenizer in the file is compared with `anser tokenize`. Then llama.cpp quantises the f32 file to Q8_0, Q4_0, Q4_K, Q5_K and Q6_K: what `anser` reads from these must be
to the bit what gguf-py reads, and a q8_0 tensor written by `anser` to the bit llama.cpp's. The outcome goes to fixtures/llama.cpp/roundtrip.json; fixtures/llama.cpp/blocks.*
(random blocks of every type, and the values that gguf-py and llama.cpp give them) are for the tests, one of which compares today's files and logits
with the proven ones.
"""

import ctypes as c
import json
import struct
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

LLAMA = "@node-llama-cpp/linux-x64@3.22.1"
ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures/llama.cpp"
PROMPT, STEPS = 24, 8
FTYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}
BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
TEXT = "User: Grüße, 世界! \t\"it's\" 1+1\n\nAssistant: \U0001f60a\x00 end"


class Opaque(c.Structure):
    """Parameters by value, of which only llama.cpp knows the fields: larger than any of them."""

    _fields_ = [("bytes", c.c_int32 * 256)]


class Batch(c.Structure):
    _fields_ = [("n", c.c_int32), ("pointers", c.c_void_p * 6)]


class Llama:
    def __init__(self, folder):
        subprocess.run(["npm", "pack", "--silent", LLAMA], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        subprocess.run("tar xzf *.tgz", cwd=folder, check=True, shell=True)
        (found,) = Path(folder).glob("package/bins/*")
        load = lambda name: c.CDLL(str(next(found.glob(name))), mode=c.RTLD_GLOBAL)
        self.base, self.ggml, self.lib = load("libggml-base.so"), load("libggml.v*.so"), load("libllama.v*.so")
        self.ggml.ggml_backend_load_all_from_path(str(found).encode())
        self.errors = []
        log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
        self.log = log(lambda level, text, _: self.errors.append(text.decode()) if level == 4 else None)
        self.lib.llama_log_set(self.log, None)
        for name, result, args in [
            ("llama_model_default_params", Opaque, []),
            ("llama_context_default_params", Opaque, []),
            ("llama_model_quantize_default_params", Opaque, []),
            ("llama_model_load_from_file", c.c_void_p, [c.c_char_p, Opaque]),
            ("llama_init_from_model", c.c_void_p, [c.c_void_p, Opaque]),
            ("llama_model_quantize", c.c_uint32, [c.c_char_p, c.c_char_p, c.POINTER(Opaque)]),
            ("llama_batch_get_one", Batch, [c.c_void_p, c.c_int32]),
            ("llama_decode", c.c_int32, [c.c_void_p, Batch]),
            ("llama_get_logits_ith", c.POINTER(c.c_float), [c.c_void_p, c.c_int32]),
            ("llama_model_get_vocab", c.c_void_p, [c.c_void_p]),
            ("llama_vocab_n_tokens", c.c_int32, [c.c_void_p]),
            ("llama_tokenize", c.c_int32, [c.c_void_p, c.c_char_p, c.c_int32, c.c_void_p, c.c_int32, c.c_bool, c.c_bool]),
            ("llama_set_n_threads", None, [c.c_void_p, c.c_int32, c.c_int32]),
            ("llama_free", None, [c.c_void_p]),
            ("llama_model_free", None, [c.c_void_p]),
        ]:
            f = getattr(self.lib, name)
            f.restype, f.argtypes = result, args

    def run(self, path, tokens, text=None):
        """Logits after the prompt and after every later token; the ids of `text`."""
        lib = self.lib
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert model, f"{path}: {self.errors}"
        vocab = lib.llama_model_get_vocab(model)
        context = lib.llama_init_from_model(model, lib.llama_context_default_params())
        assert context, self.errors
        lib.llama_set_n_threads(context, 1, 1)
        ids = []
        if text is not None:
            data, out = text.encode(), (c.c_int32 * 1000)()
            ids = list(out[: lib.llama_tokenize(vocab, data, len(data), out, 1000, False, False)])
        logits = []
        for piece in [tokens[:PROMPT], *([t] for t in tokens[PROMPT:])]:
            array = (c.c_int32 * len(piece))(*piece)
            assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(piece))) == 0, self.errors
            logits.append(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (lib.llama_vocab_n_tokens(vocab),)).copy())
        lib.llama_free(context)
        lib.llama_model_free(model)
        return np.stack(logits), ids

    def quantise(self, path, out, ftype):
        params = self.lib.llama_model_quantize_default_params()
        params.bytes[0], params.bytes[1] = 1, ftype
        assert self.lib.llama_model_quantize(str(path).encode(), str(out).encode(), c.byref(params)) == 0, self.errors

    def dequantised(self, kind, data, n):
        out = (c.c_float * n)()
        getattr(self.base, f"dequantize_row_{kind.lower()}".replace("_k", "_K"))(data, out, c.c_int64(n))
        return np.array(out, np.float32)


def write_safetensors(path, tensors, metadata={}):
    names = {np.dtype("float32"): "F32", np.dtype("uint8"): "U8"}
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": names[t.dtype], "shape": t.shape, "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        for t in tensors.values():
            f.write(np.ascontiguousarray(t).tobytes())


def read_safetensors(path):
    data = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    types = {"F32": np.float32, "U8": np.uint8}
    out = {}
    for name, t in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__":
            start, end = t["data_offsets"]
            out[name] = np.frombuffer(data[8 + n + start : 8 + n + end], types[t["dtype"]]).reshape(t["shape"])
    return out


def random_model(rng, layers=2, width=256, vocab=65536, head=64, ranks={"w": 32, "a": 64, "v": 32, "g": 96}):
    """A RWKV-7 model whose every part has an influence on the logits."""
    normal = lambda *shape, scale=1.0: (rng.standard_normal(shape) * scale).astype(np.float32)
    matrix = lambda o, i: normal(o, i, scale=i**-0.5)
    norm = lambda name: {f"{name}.weight": 1 + normal(width, scale=0.1), f"{name}.bias": normal(width, scale=0.1)}
    t = {"emb.weight": normal(vocab, width), **norm("blocks.0.ln0"), **norm("ln_out"), "head.weight": matrix(vocab, width)}
    for i in range(layers):
        b = {**norm("ln1"), **norm("ln2"), **norm("att.ln_x"), "ffn.x_k": rng.random((1, 1, width), np.float32)}
        b |= {f"att.x_{m}": rng.random((1, 1, width), np.float32) for m in "rwkvag"}
        for m, rank in ranks.items():
            if m != "v" or i > 0:
                b |= {f"att.{m}1": normal(width, rank, scale=width**-0.5), f"att.{m}2": normal(rank, width, scale=rank**-0.5)}
                b |= {f"att.{m}0": normal(1, 1, width)} if m != "g" else {}
        b |= {"att.k_k": 1 + normal(1, 1, width, scale=0.3), "att.k_a": 1 + normal(1, 1, width, scale=0.3)}
        b |= {"att.r_k": normal(width // head, head, scale=0.3)}
        b |= {f"att.{m}.weight": matrix(width, width) for m in ["receptance", "key", "value", "output"]}
        b |= {"ffn.key.weight": matrix(4 * width, width), "ffn.value.weight": matrix(width, 4 * width)}
        t |= {f"blocks.{i}.{name}": v for name, v in b.items()}
    return t


def official(name, values, layers):
    """A tensor that gguf-py reads, as one or more official ones, by the table that the converter of llama.cpp has."""
    table = {"token_embd.weight": "emb.weight", "token_embd_norm": "blocks.0.ln0", "output_norm": "ln_out", "output.weight": "head.weight"}
    for a, b in table.items():
        if name.startswith(a):
            return {name.replace(a, b): values}
    _, i, part = name.split(".", 2)
    part = part.replace("attn_norm_2.", "ln2.").replace("attn_norm.", "ln1.").replace("time_mix_ln.", "att.ln_x.")
    part = part.replace("channel_mix_lerp_k.weight", "ffn.x_k").replace("channel_mix_", "ffn.")
    if "lerp_fused" in part:
        return {f"blocks.{i}.att.x_{m}": values[row].ravel() for row, m in enumerate("rwkvag")}
    if part.startswith("time_mix_"):
        short = part.removeprefix("time_mix_").removesuffix(".weight")
        if short in ("v0", "v1", "v2") and i == "0":
            return {}
        part = f"att.{short}" + (".weight" if short in ("receptance", "key", "value", "output") else "")
        values = values.T if len(short) == 2 and short[1] in "12" else values
    return {f"blocks.{i}.{part}": values}


def anser(program, *args):
    return subprocess.run([program, *map(str, args)], check=True, capture_output=True, text=True).stdout


def compare(ours, theirs):
    """How far two lists of logits are apart, over positions."""
    top = lambda x: np.argsort(-x, kind="stable")[:10]
    pairs = [(top(a), top(b)) for a, b in zip(ours, theirs)]
    return {
        "positions": len(pairs),
        "same_top_1": sum(int(a[0] == b[0]) for a, b in pairs),
        "same_top_10_in_order": sum(int((a == b).all()) for a, b in pairs),
        "same_top_10_as_a_set": sum(int(set(a) == set(b)) for a, b in pairs),
        "error": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - theirs.mean(-1, keepdims=True))),
        "largest_difference": float(np.abs(ours - theirs).max()),
    }


def report(name, what, cases):
    print(f"{name}, {what}: {json.dumps(cases[what])}", flush=True)


def blocks(llama, rng):
    """Blocks of random bits with scales of an ordinary size, and what they stand for."""
    FIXTURES.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(FIXTURES / "blocks.gguf", "rwkv7")
    writer.add_array("a.list", ["x", "yz"])
    values = {}
    for kind in BLOCKS:
        dtype = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[dtype]
        shape = (2, max(block, 64))
        data = rng.integers(0, 256, (2, shape[1] // block, size), np.uint8)
        scales = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(kind, [0])
        for at in scales:
            data[:, :, at : at + 2] = rng.standard_normal((*data.shape[:2], 1)).astype(np.float16).view(np.uint8)
        data = data.reshape(2, -1)
        writer.add_tensor(kind, data, raw_dtype=dtype)
        values[kind] = gguf.dequantize(data, dtype).reshape(shape)
        assert (llama.dequantised(kind, data.tobytes(), values[kind].size) == values[kind].ravel()).all(), kind
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = rng.standard_normal((2, 64)).astype(np.float32)
    plain[1, :32] = 0
    values["rounded"] = plain
    values["rounded.Q8_0"] = gguf.quantize(plain, gguf.GGMLQuantizationType.Q8_0)
    write_safetensors(FIXTURES / "blocks.safetensors", values)


def main(program):
    rng = np.random.default_rng(7)
    result = {"llama.cpp": LLAMA, "gguf": version("gguf"), "prompt": PROMPT, "steps": STEPS, "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        llama = Llama(folder)
        blocks(llama, rng)
        write_safetensors(folder / "random.safetensors", random_model(rng))
        tokens_file = folder / "tokens.json"
        for source, vocab in [(ROOT / "models/anser-12m.safetensors", 4096), (folder / "random.safetensors", 65530)]:
            name = source.stem
            tokens = [int(t) for t in rng.integers(1, vocab, PROMPT + STEPS)]
            if vocab == 4096:
                text = "The old man looked at the sea, and he said that the ship which came in the morning was not the ship of his brother. \"We shall see,\" he said, and went home."
                tokens = [int(t) for t in json.loads(anser(program, "tokenize", text, "--tokenizer", "world-4096", "--json"))["ids"]]
                assert len(tokens) >= PROMPT + STEPS
                tokens = tokens[: PROMPT + STEPS]
            tokens_file.write_text(json.dumps([tokens]))

            def logits(path):
                anser(program, "debug", "logits", "--model", path, "--tokens", tokens_file, "--out", folder / "logits.safetensors")
                return read_safetensors(folder / "logits.safetensors")["logits"][0][PROMPT - 1 :]

            def exactly(path, ours):
                """The same values as f32, so that llama.cpp computes in f32 as `anser debug` does."""
                anser(program, "convert", path, folder / "exact.gguf", "--dtype", "f32")
                theirs, _ = llama.run(folder / "exact.gguf", tokens)
                return compare(ours, theirs)

            cases = result[name] = {}
            written = {}
            for dtype in ["f32", "f16", "bf16", "q8_0"]:
                written[dtype] = folder / f"{name}-{dtype}.gguf"
                anser(program, "convert", source, written[dtype], "--dtype", dtype)
                theirs, ids = llama.run(written[dtype], tokens, TEXT)
                if vocab != 4096:
                    known = json.loads(anser(program, "tokenize", TEXT.replace("\x00", ""), "--json"))["ids"]
                    assert [i for i in ids if i != 1] == known, (ids, known)
                ours = logits(written[dtype])
                cases[f"written as {dtype}"] = {**compare(ours, theirs), "with_llama.cpp_in_f32": exactly(written[dtype], ours)}
                report(name, f"written as {dtype}", cases)
                if vocab == 4096:
                    # What the test of the command line looks for.
                    data = written[dtype].read_bytes()
                    result["files"][written[dtype].name] = {"crc32": zlib.crc32(data), "bytes": len(data)}
                    if dtype == "f32":
                        best = np.argsort(-theirs[-1], kind="stable")[:10]
                        result["tokens"] = tokens
                        result["top_10"] = {"ids": best.tolist(), "logits": [float(x) for x in theirs[-1][best]]}
            for kind, ftype in FTYPES.items():
                quantised = folder / f"{name}-{kind}.gguf"
                llama.quantise(written["f32"], quantised, ftype)
                theirs, _ = llama.run(quantised, tokens)
                ours = logits(quantised)
                case = {**compare(ours, theirs), "with_llama.cpp_in_f32": exactly(quantised, ours)}
                cases[f"quantised by llama.cpp as {kind}"] = case
                anser(program, "convert", quantised, folder / "back.safetensors", "--dtype", "f32")
                back = read_safetensors(folder / "back.safetensors")
                types, expected = {}, {}
                for t in gguf.GGUFReader(quantised).tensors:
                    types[t.tensor_type.name] = types.get(t.tensor_type.name, 0) + 1
                    expected |= official(t.name, gguf.dequantize(t.data, t.tensor_type), 2)
                assert set(expected) == set(back), set(expected) ^ set(back)
                for key, value in expected.items():
                    assert (back[key].ravel() == np.ascontiguousarray(value).ravel()).all(), key
                case["types"], case["tensors_equal_to_the_bit"] = types, len(expected)
                if kind == "Q8_0":
                    ours = {t.name: t for t in gguf.GGUFReader(written["q8_0"]).tensors}
                    same = [t.name for t in gguf.GGUFReader(quantised).tensors if t.tensor_type.name == "Q8_0" and ours[t.name].tensor_type.name == "Q8_0"]
                    assert same and all((ours[t.name].data == t.data).all() for t in gguf.GGUFReader(quantised).tensors if t.name in same)
                    case["q8_0_tensors_written_to_the_bit_like_llama.cpp"] = len(same)
                report(name, f"quantised by llama.cpp as {kind}", cases)
    flat = lambda v: all(isinstance(x, (int, str)) for x in v) if isinstance(v, list) else not isinstance(v, dict)
    lines = []
    for key, value in result.items():
        if flat(value) or key == "top_10":
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
        else:
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
    (FIXTURES / "roundtrip.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


main(sys.argv[1])

"""Checks what `anser convert` writes with the programs it is written for: torch.load and the official `rwkv` package.

    pip install torch numpy rwkv
    cargo build --release && python tools/rwkv_roundtrip.py target/release/anser

For f32, f16 and bf16 it converts fixtures/golden/rwkv7.pth, loads the result with torch.load (weights_only, with and
without mmap), compares every tensor to the bit, and lets the rwkv package compute logits from it, in one call and token
by token. The outcome, with the logits and the checksums of the files that were proven, goes to
fixtures/rwkv-package/roundtrip.json; a test of the command line compares today's files and logits with it.
"""

import json
import os
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path

os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
import torch
from rwkv.model import RWKV

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ROOT = Path(__file__).resolve().parent.parent
TOKENS = [(7 * i * i + 3 * i + 1) % 300 for i in range(40)]


def run(anser, *args):
    return subprocess.run([anser, *map(str, args)], check=True, capture_output=True, text=True).stdout


def main(anser):
    source = ROOT / "fixtures/golden/rwkv7.pth"
    golden = torch.load(source, weights_only=True)
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in TYPES.items():
            out = Path(folder) / f"{name}.pth"
            run(anser, "convert", source, out, "--dtype", name)
            for mmap in (False, True):
                loaded = torch.load(out, weights_only=True, mmap=mmap)
                assert set(loaded) == set(golden)
                for key, value in golden.items():
                    assert loaded[key].dtype == dtype and loaded[key].shape == value.shape, key
                    assert torch.equal(loaded[key], value.to(dtype)), key
            files[name] = {"crc32": zlib.crc32(out.read_bytes()), "bytes": out.stat().st_size}
        # And back: what torch saves, in its own layout, is read the same.
        again = Path(folder) / "torch.pth"
        torch.save(torch.load(Path(folder) / "bf16.pth", weights_only=True), again)
        back = Path(folder) / "back.pth"
        run(anser, "convert", again, back)
        assert all(torch.equal(v, golden[k].to(torch.bfloat16)) for k, v in torch.load(back, weights_only=True).items())

        model = RWKV(model=str(Path(folder) / "f32"), strategy="cpu fp32")
        logits, state = model.forward(TOKENS, None)
        step = None
        for token in TOKENS:
            stepped, step = model.forward([token], step)
        assert torch.allclose(logits, stepped, atol=1e-4)
    result = {
        "torch": version("torch"),
        "rwkv": version("rwkv"),
        "tokens": TOKENS,
        "files": files,
        "logits": [float(x) for x in logits],
        "state_norms": [float(s.float().norm()) for s in state],
    }
    out = ROOT / "fixtures/rwkv-package/roundtrip.json"
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in result.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"torch {result['torch']}, rwkv {result['rwkv']}: three files load to the bit; logits written to {out}")


main(sys.argv[1])

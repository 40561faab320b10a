"""Writes fixtures/huggingface with the real packages: the golden model as a flash-linear-attention RWKV-7, saved in shards.

    pip install torch transformers flash-linear-attention
    python tools/huggingface_fixture.py

The names, shapes, shards and config.json are those that transformers writes; a test loads the folder and compares it with
the same weights in the official layout (fixtures/golden/rwkv7_bf16.pth).
"""

import re
from pathlib import Path

import torch
from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.ln_x": "attn.g_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
}
WHOLE = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}


def renamed(name, value):
    if name in WHOLE:
        return WHOLE[name], value
    if name.startswith("ln_out"):
        return name.replace("ln_out", "model.norm"), value
    layer, part = re.fullmatch(r"blocks\.(\d+)\.(.*)", name).groups()
    low_rank = re.fullmatch(r"att\.([wavg])([012])", part)
    if low_rank:
        which, number = low_rank.groups()
        part = f"attn.{which}_lora.lora." + {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[number]
        value = value.T if number in "12" else value
    else:
        for official, other in PARTS.items():
            part = re.sub(rf"^{re.escape(official)}\.", other + ".", part)
        part = re.sub(r"^att\.", "attn.", part)
    return f"model.layers.{layer}.{part}", value


golden = torch.load(ROOT / "fixtures/golden/rwkv7_bf16.pth", weights_only=True)
ranks = {f"{long}_low_rank_dim": golden[f"blocks.1.att.{short}1"].shape[1] for long, short in
         [("decay", "w"), ("gate", "g"), ("a", "a"), ("v", "v")]}
config = RWKV7Config(hidden_size=128, num_hidden_layers=3, head_dim=64, vocab_size=300, hidden_ratio=4, **ranks)
model = RWKV7ForCausalLM(config).to(torch.bfloat16)
wanted = {name: value.shape for name, value in model.state_dict().items()}
weights = dict(renamed(name, value) for name, value in golden.items())
weights = {name: value.reshape(wanted[name]).contiguous() for name, value in weights.items() if name in wanted}
assert weights.keys() == wanted.keys(), weights.keys() ^ wanted.keys()
model.load_state_dict(weights)
model.save_pretrained(ROOT / "fixtures/huggingface", max_shard_size="900KB")
print(sorted(p.name for p in (ROOT / "fixtures/huggingface").iterdir()))

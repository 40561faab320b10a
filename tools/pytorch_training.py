#!/usr/bin/env python3
"""Trains RWKV-7 with PyTorch by the official trainer's maths, to compare loss curves with `anser train`.

    pip install torch numpy safetensors
    anser train run.toml --set train.steps=1 --set train.lr_init=0 --set train.lr_final=0 --set output.folder=init
    anser train run.toml --set model.load=init/model.safetensors           # its metrics.jsonl has the losses
    python tools/pytorch_training.py --model init/model.safetensors --data books --ctx 512 --rows 16 --steps 200 --total 200

Same initial weights, same data (binidx) in the official order, f32 master weights, bf16 matrix products (or --f32), the official
parameter groups, schedule, clipping and L2Wrap. WKV-7 runs in f32 as products over chunks of 16 tokens, differentiated by
PyTorch: slow, but nobody's kernel. Prints one JSON object with the losses.
"""

import argparse
import json
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def wkv7(r, logits, k, v, a, b, size):
    """r, logits, k, v, a, b: [rows, tokens, channels] to y of the same shape; f32. The state starts at zero."""
    B, T, C = r.shape
    L, H = 16, C // size
    split = lambda x: x.float().view(B, T // L, L, H, size).transpose(2, 3)  # [B, chunks, H, L, N]
    r, logits, k, v, a, b = map(split, (r, logits, k, v, a, b))
    log = -math.exp(-0.5) * torch.sigmoid(logits)
    total = log.cumsum(-2)
    up, before, down = total.exp(), (total - log).exp(), (-total).exp()
    rt, at, kt, bt = r * up, a * before, k * down, b * down
    whole = up[..., -1:, :]
    kh, bh = kt * whole, bt * whole
    inside = torch.ones(L, L, device=r.device).tril()
    strict = inside.tril(-1)
    m = lambda x, y, mask: (x @ y.transpose(-1, -2)) * mask
    inverse = torch.linalg.solve_triangular(
        torch.eye(L, device=r.device) - m(at, bt, strict), torch.eye(L, device=r.device).expand(B, T // L, H, L, L), upper=False)
    from_v = m(at, kt, strict) @ v
    rb, rk = m(rt, bt, inside), m(rt, kt, inside) @ v
    s, out = torch.zeros(B, H, size, size, device=r.device), []
    for c in range(T // L):
        st = s.transpose(-1, -2)
        u = inverse[:, c] @ (from_v[:, c] + at[:, c] @ st)
        out.append(rt[:, c] @ st + rk[:, c] + rb[:, c] @ u)
        s = s * whole[:, c] + v[:, c].transpose(-1, -2) @ kh[:, c] + u.transpose(-1, -2) @ bh[:, c]
    return torch.stack(out, 1).transpose(2, 3).reshape(B, T, C)


def forward(p, ids, dtype):
    """Logits [rows, tokens, vocabulary]; p: f32 master weights under the official names."""
    w = lambda name: p[name].to(dtype)
    layers = 1 + max(int(n.split(".")[1]) for n in p if n.startswith("blocks."))
    heads, size = p["blocks.0.att.r_k"].shape
    norm = lambda x, name: F.layer_norm(x, (x.shape[-1],), w(name + ".weight"), w(name + ".bias"))
    shift = lambda x: F.pad(x, (0, 0, 1, -1)) - x
    x = norm(F.embedding(ids, w("emb.weight")), "blocks.0.ln0")
    B, T, C = x.shape
    first = None
    for i in range(layers):
        name = f"blocks.{i}.att."
        g = lambda n: w(name + n)
        h = norm(x, f"blocks.{i}.ln1")
        d = shift(h)
        xr, xw, xk, xv, xa, xg = (h + d * g("x_" + q) for q in "rwkvag")
        r, k, v = xr @ g("receptance.weight").T, xk @ g("key.weight").T, xv @ g("value.weight").T
        logits = g("w0") + torch.tanh(xw @ g("w1")) @ g("w2")
        if first is None:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(g("v0") + (xv @ g("v1")) @ g("v2"))
        rate = torch.sigmoid(g("a0") + (xa @ g("a1")) @ g("a2"))
        gate = torch.sigmoid(xg @ g("g1")) @ g("g2")
        removal = F.normalize((k * g("k_k")).float().view(B, T, heads, size), dim=-1, eps=1e-12).view(B, T, C).to(dtype)
        k = k * (1 + (rate - 1) * g("k_a"))
        y = wkv7(r, logits, k, v, -removal, removal * rate, size).to(dtype)
        y = F.group_norm(y.view(B * T, C), heads, g("ln_x.weight"), g("ln_x.bias"), 64e-5).view(B, T, C)
        by_head = lambda z: z.view(B, T, heads, size)
        y = y + ((by_head(r) * by_head(k) * g("r_k")).sum(-1, keepdim=True) * by_head(v)).view(B, T, C)
        x = x + (y * gate) @ g("output.weight").T
        name = f"blocks.{i}.ffn."
        h = norm(x, f"blocks.{i}.ln2")
        x = x + torch.relu((h + shift(h) * g("x_k")) @ g("key.weight").T) ** 2 @ g("value.weight").T
    return norm(x, "ln_out") @ w("head.weight").T


class L2Wrap(torch.autograd.Function):
    """Adds 1e-4 max(logits) / tokens to the gradient of each row's largest logit."""

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        top, at = z.max(-1, keepdim=True)
        extra = torch.zeros_like(z).scatter_(-1, at, top * (1e-4 / (z.shape[0] * z.shape[1])))
        return grad, extra * grad


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batches(path, ctx, rows, steps, held_out):
    """The official order over the part of the data that is trained on."""
    tokens = np.fromfile(path + ".bin", dtype=np.uint16)
    tokens = tokens[:len(tokens) - int(len(tokens) * held_out)]
    prime = next(n for n in range(len(tokens) // ctx - 2, 1, -1)
                 if n % 3 == 2 and all(n % d for d in range(2, math.isqrt(n) + 1)))
    factor = int(prime * (math.sqrt(5) - 1) / 2)
    for step in range(steps):
        starts = [factor * (i**3 % prime) % prime * ctx for i in range(1 + step * rows, 1 + (step + 1) * rows)]
        yield torch.from_numpy(np.stack([tokens[s:s + ctx + 1] for s in starts]).astype(np.int64)).to(DEVICE)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--model", required=True)
    a.add_argument("--data", required=True)
    for name, default in (("ctx", 512), ("rows", 16), ("steps", 200), ("total", 200), ("warmup", 10)):
        a.add_argument("--" + name, type=int, default=default)
    for name, default in (("lr-init", 6e-4), ("lr-final", 6e-5), ("weight-decay", 0.01), ("held-out", 0.02)):
        a.add_argument("--" + name, type=float, default=default)
    a.add_argument("--f32", action="store_true")
    a = a.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    p = {n: t.float().to(DEVICE).requires_grad_() for n, t in load_file(a.model).items()}
    group = lambda n: 2 if n.endswith("att.w0") else 0 if p[n].squeeze().dim() >= 2 and ".weight" in n else 1
    groups = [{"params": [p[n] for n in p if group(n) == i], "weight_decay": a.weight_decay if i == 0 else 0.0} for i in range(3)]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-18)
    losses = []
    for step, rows in enumerate(batches(a.data, a.ctx, a.rows, a.steps, a.held_out)):
        progress = min(max((step - a.warmup) / max(a.total - a.warmup, 1), 0), 1)
        f = a.lr_final / a.lr_init
        lr = a.lr_init * (0.5 + f / 2 + (0.5 - f / 2) * math.cos(math.pi * progress))
        lr *= min(1, 0.01 + 0.99 * step / a.warmup) if a.warmup else 1
        for i, g in enumerate(adam.param_groups):
            g["lr"] = lr * (2 if i == 2 else 1)
        logits = forward(p, rows[:, :-1], torch.float32 if a.f32 else torch.bfloat16)
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        L2Wrap.apply(loss, logits).backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}: {losses[-1]:.4f}", file=sys.stderr)
    print(json.dumps({"losses": losses}))


main()

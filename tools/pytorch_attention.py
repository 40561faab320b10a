#!/usr/bin/env python3
"""Times PyTorch's dense causal attention, each backend of scaled_dot_product_attention, on the shapes of `anser bench attention`.

    python3 tools/pytorch_attention.py [--tokens 8192 32768 131072] [--heads 12 40] [--head-size 64]

Prints a JSON line for each backend and shape: milliseconds forward, and forward and backward together, and TFLOP/s by the usual
count (2 products forward, 5 more backward, half of them masked).
"""

import argparse
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def milliseconds(run, rounds=5):
    """Median over rounds, each long enough to hide launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time(passes):
        start.record()
        for _ in range(passes):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / passes

    time(2)
    passes = max(1, min(50, int(50 / time(1))))
    return statistics.median(time(passes) for _ in range(rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=int, nargs="+", default=[12, 40])
    parser.add_argument("--head-size", type=int, default=64)
    args = parser.parse_args()
    for heads in args.heads:
        for tokens in args.tokens:
            torch.manual_seed(0)
            shape = (1, heads, tokens, args.head_size)
            q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            dy = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            flops = 2 * tokens * tokens * args.head_size * heads
            for name, backend in BACKENDS.items():
                line = {"backend": name, "tokens": tokens, "heads": heads, "head_size": args.head_size}

                def forward():
                    with torch.no_grad():
                        scaled_dot_product_attention(q, k, v, is_causal=True)

                def both():
                    y = scaled_dot_product_attention(q, k, v, is_causal=True)
                    torch.autograd.grad(y, (q, k, v), dy)

                try:
                    with sdpa_kernel(backend):
                        line["forward_ms"] = milliseconds(forward)
                        line["both_ms"] = milliseconds(both)
                    line["forward_tflops"] = flops / line["forward_ms"] / 1e9
                    line["both_tflops"] = 3.5 * flops / line["both_ms"] / 1e9
                except RuntimeError as e:
                    line["error"] = str(e).splitlines()[0]
                print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name(), **line}), flush=True)


if __name__ == "__main__":
    main()

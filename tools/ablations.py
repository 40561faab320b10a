#!/usr/bin/env python3
"""Trains variants of a small RWKV-X hybrid, all from one RWKV-7 model, on needles in a text, and tests them alike: docs/hybrids.md.

    anser data build train.jsonl --out text --tokenizer world-4096
    python3 tools/ablations.py --anser anser --model models/anser-12m.safetensors --data text --held-out 0.0043 --text held-books.txt --out docs/hybrids.json

--data is what is trained on; --text, a file that isn't in it, is the haystack of the tests and what bits per byte are measured on. Goes on from --out
if it is there: a variant and seed that has a result is not run again. --gpus and --jobs say how many run at a time; --quick tries everything out on
a CPU with a few tokens; --only many runs the variants with many needles, --only loss those that compare what of a row is learnt.
"""

import argparse
import json
import os
import queue
import subprocess
import tempfile
import threading
import time

# What a variant is, unless it says otherwise: two attention blocks with chunks of 64 tokens, 16 of which are seen; the new blocks alone are trained, on
# samples of 1,024 tokens or more, then all parameters, on samples of 6,000 or more; four rows of five hold needles, of which the answer alone is learnt.
BASE = {
    "layers": 2,
    "chunk": 64,
    "topk": 16,
    "init": "identity",
    "options": [],  # of `anser expand`
    "task": "niah2",
    "tests": {1: [4096, 16384, 32768, 65536, 131072]},
    "answer_only": True,
    "long_ce": False,  # with short contexts of a 16th of a row
    "normalise": False,  # of its weights
    "first": (16384, 200),
    "second": (65536, 600),
}
# Many needles under different names, all of which are asked for in training and one in tests, by lengths for each number of them. First 4 in short
# samples: with 16 at once models learn to say any of the numbers, and no further. (Needles, tokens of a row, rows, steps, first and last rate.)
MANY = {
    "tests": {4: [2048, 8192], 16: [2048, 8192, 16384], 64: [8192]},
    "stages": [(4, 640, 26, 750, 1e-3, 1e-3), (16, 2048, 8, 250, 6e-4, 1e-5)],
}
# The same, and the first test lengths alone, for what of a row is learnt and how it is weighted.
WHAT = {**MANY, "tests": {4: [2048, 8192], 16: [2048, 8192]}}
ALL_TEXT = {**WHAT, "answer_only": False}
MANY_ALONE = {**MANY, "train_only": ["moba.*"], "stages": [(4, 640, 26, 900, 1.5e-3, 1.5e-3), (16, 2048, 8, 250, 6e-4, 1e-5)]}
PASSKEY = {"task": "passkey", "first": (16384, 1000), "second": (65536, 900)}
VARIANTS = {
    "2 blocks": {},
    "rwkv7": {"layers": 0},
    "1 block": {"layers": 1},
    "4 blocks": {"layers": 4},
    "passkey, rwkv7": {**PASSKEY, "layers": 0},
    "passkey, 1 block": {**PASSKEY, "layers": 1},
    "chunks of 16, 64 seen": {"chunk": 16, "topk": 64},
    "chunks of 256, 4 seen": {"chunk": 256, "topk": 4},
    "copies": {"init": "copy"},
    "all text, CE": {"answer_only": False},
    "all text, LongCE": {"answer_only": False, "long_ce": True},
    "chunks of 512, 2 seen": {"chunk": 512, "topk": 2},
    "4 chunks seen": {"topk": 4},
    "options, gated": {"options": ["--gate"]},
    "options, 1 head of keys": {"options": ["--key-heads", 1]},
    "options, first chunk": {"options": ["--sink", 1]},
    "options, window of 4": {"options": ["--window", 4]},
    "many, rwkv7": {**MANY, "layers": 0},
    "many, 2 blocks": MANY,
    "many, 4 blocks": {**MANY, "layers": 4},
    "many, 4 blocks alone trained": {**MANY_ALONE, "layers": 4},
    "loss, answers": WHAT,
    "loss, all text, CE": ALL_TEXT,
    "loss, all text, LongCE": {**ALL_TEXT, "long_ce": True},
    "loss, all text, LongCE, mean of 1": {**ALL_TEXT, "long_ce": True, "normalise": True},
}
# Bounds on what attention keeps, tried with the first seed of a variant: needles, tokens, samples of a depth; tokens kept, how they are chosen, whether
# one by one.
HOWS = [(evict, tokens) for evict in ("recent", "attention", "error") for tokens in (False, True)]
CACHES = {
    "2 blocks": (1, 65536, 3, [(most, *how) for most in (2048, 4096, 8192) for how in HOWS]),
    "many, 2 blocks": (16, 8192, 4, [(256, "recent", False), (1024, "recent", False), *((1024, *how) for how in HOWS[2:])]),
    "many, 4 blocks": (16, 8192, 4, [(256, "recent", False), (1024, "recent", False), (1024, "attention", False)]),
    "many, 4 blocks alone trained": (16, 8192, 4, [(256, "recent", False)]),
}


def run(command, env):
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[1:3]}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


class Job:
    """A variant with a seed, in a folder of its own, on one device."""

    def __init__(self, args, name, seed, folder, env):
        self.args, self.seed, self.folder, self.env = args, seed, folder, env
        self.spec = {**BASE, **VARIANTS[name]}
        if args.quick:
            self.spec.update(first=(512, 1), second=(512, 1), chunk=min(self.spec["chunk"], 32))
            if "stages" in self.spec:
                self.spec["stages"] = [(*stage[:2], 1, 1, *stage[4:]) for stage in self.spec["stages"]]
            self.spec["tests"] = {keys: [300 + 50 * keys, 400 + 50 * keys] for keys in self.spec["tests"]}

    def anser(self, *arguments):
        device = "cpu" if self.args.quick else "cuda"
        return run([self.args.anser, *map(str, arguments), "--device", device, "--json", "--quiet"], self.env)

    def path(self, name):
        return os.path.join(self.folder, name)

    def train(self, load, name, ctx, steps, train_only=(), **fields):
        fields = {
            "model.load": load,
            "model.train_only": list(train_only),
            "data.path": self.args.data,
            "data.order": "shuffled",
            "data.held_out": self.args.held_out,
            "data.seed": self.seed,
            "data.needles": 0.8,
            "data.needle_task": self.spec["task"],
            "data.needle_answer_only": self.spec["answer_only"],
            "train.ctx": ctx,
            "train.rows": 1,
            "train.steps": steps,
            "train.weight_decay": 0.1,
            "output.folder": self.path(name),
            "output.save_every": 0,
            "output.eval_every": steps,
            "output.eval_rows": 1,
            "output.sample_every": 0,
            **fields,
        }
        config = self.path(name + ".toml")
        open(config, "w").close()
        sets = [x for key, value in fields.items() for x in ("--set", f"{key}={json.dumps(value)}")]
        self.anser("train", config, *sets)
        return self.path(name + "/model.safetensors")

    def weighting(self, ctx):
        if not self.spec["long_ce"]:
            return {}
        fields = {f"train.long_ce_{k}": ctx // 16 for k in ("context", "stride", "from")}
        return fields | {"train.long_ce_normalise": self.spec["normalise"]}

    def trained(self):
        """The model of the last stage. RWKV-7 alone has no block to train first, and gets those tokens in its only stage."""
        spec, model = self.spec, self.args.model
        (first_ctx, first), (ctx, steps) = spec["first"], spec["second"]
        if spec["layers"]:
            shape = ["--layers", spec["layers"], "--chunk", spec["chunk"], "--topk", spec["topk"], "--init", spec["init"]]
            start = self.path("start.safetensors")
            self.anser("expand", model, start, *shape, *spec["options"])
        if "stages" in spec:
            model = start if spec["layers"] else model
            for i, (keys, ctx, rows, steps, first_rate, last_rate) in enumerate(spec["stages"]):
                name = "second" if i + 1 == len(spec["stages"]) else "first"
                fields = {"train.rows": rows, "train.lr_init": first_rate, "train.lr_final": last_rate, "train.warmup": min(20, steps)}
                fields |= {"data.needles": 1.0, "data.needle_keys": keys, "data.needle_asked": keys, "data.seed": 100 * i + self.seed}
                fields["data.needle_min"] = 60 + 120 * keys if keys < 8 else 120 * keys
                fields |= self.weighting(ctx)
                model = self.train(model, name, ctx, steps, spec.get("train_only", []), **fields)
            return model
        if spec["layers"]:
            rates = {"train.lr_init": 2e-3 if spec["layers"] == 1 else 1e-3, "train.warmup": min(50, first)}
            rates["train.lr_final"] = rates["train.lr_init"]
            model = self.train(start, "first", first_ctx, first, ["moba.*"], **{"data.needle_min": max(200, first_ctx // 16)}, **rates)
        else:
            steps += first * first_ctx // ctx
        fields = {"train.lr_init": 6e-4, "train.lr_final": 1e-5, "train.warmup": min(20, steps), "data.needle_min": max(200, ctx * 6 // 64)}
        return self.train(model, "second", ctx, steps, **fields | self.weighting(ctx))

    def find(self, model, keys, lengths, count, cache=()):
        """Right answers and questions of each length, where a sample has so many needles."""
        task = ["passkey"] if self.spec["task"] == "passkey" else ["niah", "--task", "2", "--keys", keys, "--text", self.args.text]
        out = self.path(f"test-{keys}-{'-'.join(map(str, cache))}.json")
        options = ["--lengths", ",".join(map(str, lengths)), "--depths", 6, "--count", count, "--seed", 1000 + self.seed, "--out", out]
        self.anser("eval", *task, "--model", model, *options, *cache)
        with open(out) as f:
            runs = json.load(f)["runs"]
        asked = lambda n: [r for r in runs if r["length"] == n]
        return {n: [sum(r["right"] for r in asked(n)), sum(r["asked"] for r in asked(n))] for n in lengths}

    def result(self):
        start = time.time()
        model = self.trained()
        seconds = round(time.time() - start, 1)
        [text] = self.anser("eval", "text", "--model", model, self.args.text)["files"]
        count = 1 if self.args.quick else 8
        right = {keys: self.find(model, keys, lengths, count) for keys, lengths in self.spec["tests"].items()}
        return {"right": right.get(1, right), "text": text["prediction"], "training_seconds": seconds}

    def bounded(self, keys, length, count, most, evict, tokens):
        if self.args.quick:
            length, count, most = self.spec["tests"][keys][0], 1, 128
        cache = ["--cache", most, "--evict", evict, *(["--evict-tokens"] if tokens else [])]
        return {"right": self.find(self.path("second/model.safetensors"), keys, [length], count, cache)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anser", default="anser")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", type=float, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", default="ablations.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gpus", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="at a time on a GPU")
    parser.add_argument("--only", default="", help="variants whose names begin so")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()

    results = {}
    if os.path.exists(args.out):
        with open(args.out) as f:
            results = json.load(f)
    names, lock, work = [n for n in VARIANTS if n.startswith(args.only)], threading.Lock(), queue.PriorityQueue()
    folders = {(name, 1): tempfile.mkdtemp() for name in CACHES}  # of models that are needed again
    bounds = {}
    for name, (keys, length, count, caches) in CACHES.items():
        said = lambda most, evict, t: f"{name}, seed 1, at most {most} by {evict}, {'tokens' if t else 'chunks'}"
        bounds[name, 1] = {said(*cache): (keys, length, count, *cache) for cache in caches}
    for i, name in enumerate(names):
        for seed in range(1, args.seeds + 1):
            key = f"{name}, seed {seed}"
            if key not in results or not bounds.get((name, seed), {}).keys() <= results.keys():
                work.put((i * args.seeds + seed, key, name, seed, None))

    def keep(key, result):
        with lock:
            results[key] = result
            with open(args.out + ".new", "w") as f:
                json.dump(results, f, indent=1)
            os.replace(args.out + ".new", args.out)
            print(key, json.dumps(result), flush=True)

    def worker(gpu):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
        while True:
            try:
                _, key, name, seed, bound = work.get_nowait()
            except queue.Empty:
                return
            job = Job(args, name, seed, folders.get((name, seed)) or tempfile.mkdtemp(), env)
            try:
                if bound:
                    keep(key, job.bounded(*bound))
                    continue
                keep(key, job.result())
                if (name, seed) in bounds:
                    # After the variants that were waiting before most others.
                    for i, (bound_key, bound) in enumerate(bounds[name, seed].items()):
                        if bound_key not in results:
                            work.put((9 * args.seeds + i / 100, bound_key, name, seed, bound))
            except (RuntimeError, OSError, ValueError) as e:
                print(key, "failed:", e, flush=True)

    threads = [threading.Thread(target=worker, args=(gpu,)) for gpu in args.gpus for _ in range(args.jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


if __name__ == "__main__":
    main()

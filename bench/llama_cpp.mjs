#!/usr/bin/env node
// Anser beside llama.cpp on this machine's CPU: the same RWKV-7 of random weights in both, prompt and writing.
//
//   node bench/llama_cpp.mjs [--anser target/release/anser] [--threads 2] [--rounds 5] [--llama f16,Q8_0,Q4_K_M] [--folder DIR]
//
// Installs npm's node-llama-cpp with its prebuilt llama.cpp into a temporary folder (or DIR, which is kept), writes a 0.1B model there, lets `anser
// convert` make GGUF files of it and llama.cpp's own quantiser (through python3) the types that anser does not write. Every round runs the programs one after
// another, so that what else the machine does meets both; the table has medians. A prompt of 256 tokens, then 64 written one by one.

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, openSync, writeSync, closeSync, writeFileSync, rmSync } from "node:fs";
import { loadavg, tmpdir, cpus } from "node:os";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const option = (name, otherwise) => {
  const at = process.argv.indexOf(`--${name}`);
  return at < 0 ? otherwise : process.argv[at + 1];
};
const PROMPT = 256, WRITTEN = 64;
const threads = Number(option("threads", "2")), rounds = Number(option("rounds", "5"));
const anser = resolve(option("anser", "target/release/anser"));
const kept = option("folder");
const folder = kept ? resolve(kept) : mkdtempSync(join(tmpdir(), "anser-llama-"));
mkdirSync(folder, { recursive: true });

// Names and shapes of a RWKV-7 in the official order of axes.
function tensors({ layers, width, vocab, low }) {
  const list = [["emb.weight", [vocab, width]]];
  for (let i = 0; i < layers; i++) {
    const add = (name, ...shape) => list.push([`blocks.${i}.${name}`, shape]);
    for (const norm of i ? ["ln1", "ln2"] : ["ln0", "ln1", "ln2"]) (add(`${norm}.weight`, width), add(`${norm}.bias`, width));
    for (const m of "rwkvag") add(`att.x_${m}`, 1, 1, width);
    for (const m of i ? "wavg" : "wag") {
      if (m != "g") add(`att.${m}0`, 1, 1, width);
      (add(`att.${m}1`, width, low[m]), add(`att.${m}2`, low[m], width));
    }
    (add("att.k_k", 1, 1, width), add("att.k_a", 1, 1, width), add("att.r_k", width / 64, 64));
    for (const m of ["receptance", "key", "value", "output"]) add(`att.${m}.weight`, width, width);
    (add("att.ln_x.weight", width), add("att.ln_x.bias", width), add("ffn.x_k", 1, 1, width));
    (add("ffn.key.weight", 4 * width, width), add("ffn.value.weight", width, 4 * width));
  }
  list.push(["ln_out.weight", [width]], ["ln_out.bias", [width]], ["head.weight", [vocab, width]]);
  return list;
}

// A safetensors file in F16 with noise: a table of it again and again from changing places.
function randomModel(path, dims) {
  const table = new Uint16Array(1 << 20);
  let seed = 1;
  for (let i = 0; i < table.length; i++) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    // A sign, exponents for 0.008 to 0.03, any fraction.
    table[i] = ((seed >>> 16) & 0x8000) | (0x2000 + (((seed >>> 8) & 1) << 10)) | ((seed >>> 20) & 0x3ff);
  }
  const ones = new Uint16Array(1 << 16).fill(0x3c00);
  const header = {};
  let at = 0;
  for (const [name, shape] of tensors(dims)) {
    const bytes = 2 * shape.reduce((a, b) => a * b);
    header[name] = { dtype: "F16", shape, data_offsets: [at, (at += bytes)] };
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (text.length % 8)) % 8);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const file = openSync(path, "w");
  (writeSync(file, length), writeSync(file, text));
  for (const [name, shape] of tensors(dims)) {
    let left = shape.reduce((a, b) => a * b);
    const from = /ln.*\.weight$/.test(name) ? ones : table;
    for (let start = at % 977; left > 0; start = 0) {
      const piece = from.subarray(start, start + left);
      writeSync(file, Buffer.from(piece.buffer, piece.byteOffset, piece.byteLength));
      left -= piece.length;
    }
    at += 7919;
  }
  closeSync(file);
}

const DIMS = {
  "0.1b": { layers: 12, width: 768, vocab: 65536, low: { w: 64, a: 64, v: 32, g: 128 } },
  "1.5b": { layers: 24, width: 2048, vocab: 65536, low: { w: 96, a: 96, v: 64, g: 256 } },
};

// Run once a measurement in a process of its own: `node llama_cpp.mjs --measure FILE`.
async function measure(path) {
  const { getLlama, LlamaLogLevel } = await import(pathToFileURL(join(folder, "node_modules/node-llama-cpp/dist/index.js")));
  const llama = await getLlama({ gpu: false, logLevel: LlamaLogLevel.error, maxThreads: threads, build: "never" });
  const model = await llama.loadModel({ modelPath: path, gpuLayers: 0 });
  const context = await model.createContext({ contextSize: 1024, batchSize: PROMPT, threads: { ideal: threads, min: threads } });
  const sequence = context.getSequence();
  const tokens = Array.from({ length: PROMPT }, (_, i) => 100 + ((i * 37) % 5000));
  await sequence.evaluateWithoutGeneratingNewTokens(tokens.slice(0, 8));
  await sequence.clearHistory();
  const begin = performance.now();
  await sequence.evaluateWithoutGeneratingNewTokens(tokens);
  const read = performance.now();
  let count = 0;
  for await (const _ of sequence.evaluate([99], { temperature: 0, yieldEogToken: true })) if (++count == WRITTEN) break;
  const end = performance.now();
  console.log(JSON.stringify({ prefill: (1e3 * PROMPT) / (read - begin), decode: (1e3 * count) / (end - read) }));
  process.exit(0);
}

const run = (program, args) => execFileSync(program, args, { encoding: "utf8", stdio: ["ignore", "pipe", "pipe"], maxBuffer: 1 << 26 });
const median = (all) => [...all].sort((a, b) => a - b)[all.length >> 1];

// The package has no quantiser of its own, but its library has llama.cpp's; Python can call that.
const QUANTISE = `
import ctypes, glob, os, sys
folder, source, target, kind = sys.argv[1:]
for name in ("libggml-base*", "libggml.*", "libllama.*"):
    for path in sorted(glob.glob(os.path.join(folder, name))):
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
class Parameters(ctypes.Structure):  # begins with the number of threads and the type; the rest is the library's
    _fields_ = [("threads", ctypes.c_int32), ("kind", ctypes.c_int32), ("rest", ctypes.c_uint8 * 504)]
library.llama_backend_init()
library.llama_model_quantize_default_params.restype = Parameters
parameters = library.llama_model_quantize_default_params()
parameters.kind = int(kind)
sys.exit(library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))
`;
const KINDS = { Q4_0: 2, Q8_0: 7, Q4_K_M: 15, Q5_K_M: 17, Q6_K: 18 };

// Whether there is a file of that type now.
function quantise(from, to, type) {
  const libraries = join(folder, "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64");
  try {
    run("python3", ["-c", QUANTISE, libraries, from, to, String(KINDS[type])]);
  } catch (e) {
    rmSync(to, { force: true });
    console.error(String(e.stderr ?? e).split("\n").slice(-3).join("\n"));
  }
  return existsSync(to);
}

async function main() {
  const size = option("size", "0.1b");
  if (!existsSync(join(folder, "node_modules/node-llama-cpp"))) {
    writeFileSync(join(folder, "package.json"), "{}");
    run("npm", ["install", "--prefix", folder, "--no-audit", "--no-fund", "node-llama-cpp"]);
  }
  const source = join(folder, `${size}.safetensors`);
  if (!existsSync(source)) randomModel(source, DIMS[size]);
  if (process.argv.includes("--model-only")) return console.log(source);
  const others = [];
  for (const type of option("llama", "f16,Q8_0,Q4_K_M").split(",")) {
    const file = join(folder, `${size}-${type}.gguf`);
    if (!existsSync(file)) {
      if (["f16", "Q8_0"].includes(type)) run(anser, ["convert", source, file, "--dtype", type.toLowerCase()]);
      else if (!quantise(join(folder, `${size}-f16.gguf`), file, type)) {
        console.error(`${type} is left out: llama.cpp's quantiser could not be called`);
        continue;
      }
    }
    others.push({ name: `llama.cpp ${type}`, prefill: [], decode: [], once: () =>
      JSON.parse(run(process.execPath, [process.argv[1], "--measure", file, "--folder", folder, "--threads", threads]).trim().split("\n").pop()) });
  }
  const own = ["f16", "int8", "q4"].map((dtype) => ({ name: `anser ${dtype}`, prefill: [], decode: [], once: () => {
    const args = ["--model", source, "--dtype", dtype, "--threads", String(threads), "--device", "cpu", "--json"];
    // A token a word; the end of a document, which would stop it, is banned.
    const text = ["--prompt", " the".repeat(PROMPT), "--max-tokens", String(WRITTEN), "--temperature", "0", "--logit-bias", "0=-inf"];
    const r = JSON.parse(run(anser, ["generate", ...args, ...text]));
    if (r.prompt_tokens != PROMPT || r.tokens != WRITTEN) throw new Error(`${r.prompt_tokens} tokens read, ${r.tokens} written`);
    return { prefill: r.prefill_tokens_per_second, decode: r.decode_tokens_per_second };
  } }));
  const load = [];
  for (let round = 0; round < rounds; round++) {
    load.push(loadavg()[0]);
    for (let i = 0; i < Math.max(own.length, others.length); i++) {
      for (const program of [own[i], others[i]].filter(Boolean)) {
        const r = program.once();
        console.error(`${program.name}: prompt ${r.prefill.toFixed(0)}, writing ${r.decode.toFixed(1)}`);
        (program.prefill.push(r.prefill), program.decode.push(r.decode));
      }
    }
    console.error(`round ${round + 1} of ${rounds}`);
  }
  console.log(`${size}, ${threads} threads of ${cpus()[0].model}, ${rounds} rounds, load of the machine ${median(load).toFixed(1)} on ${cpus().length} cores; tokens/s, medians\n`);
  console.log(`| | prompt of ${PROMPT} | writing |\n| --- | --- | --- |`);
  for (const p of [...own, ...others]) console.log(`| ${p.name} | ${median(p.prefill).toFixed(0)} | ${median(p.decode).toFixed(1)} |`);
  console.log();
  own.forEach((a, i) => {
    const b = others[i];
    // Of each round, since both met the same.
    const ratio = (what) => median(a[what].map((v, r) => v / b[what][r])).toFixed(2);
    if (b) console.log(`${a.name} / ${b.name}: prompt ${ratio("prefill")}, writing ${ratio("decode")}`);
  });
}

const measured = option("measure");
if (measured) await measure(measured);
else {
  try {
    await main();
  } finally {
    if (!kept) rmSync(folder, { recursive: true, force: true });
  }
}

#!/usr/bin/env python3
"""Puts `anser serve` under load for minutes and checks that nothing gets lost, mixed up, stuck or larger.

    tools/serve_soak.py target/release/anser [--minutes 5] [--streams 256] [--model M and other arguments of serve]

Each of a number of requests is answered alone first. Then so many streams are read at any time, one of them is cut off every second, and every
one that ends must have the text that it had alone. At the end: after two fifths of the time the server's memory stays within 2%, no stream stood
still, the 99th percentile of the time between tokens is below four times the median, and nothing runs any more.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field

WORDS = "the a of and he she it was had with night river house light old young letter captain whale through fn let mut return".split()
STUCK = 60  # Seconds without a token.


@dataclass
class Soak:
    host: str
    port: int
    pid: int
    requests: list
    expected: list = field(default_factory=list)
    gaps: list = field(default_factory=list)
    firsts: list = field(default_factory=list)
    running: dict = field(default_factory=dict)
    done: int = 0
    killed: int = 0
    tokens: int = 0
    failures: list = field(default_factory=list)
    memory: list = field(default_factory=list)


def requests(count):
    """Prompts of 4 to 300 words and answers of 16 to 160 tokens, by chance."""
    rng = random.Random(1)
    return [
        {
            "prompt": " ".join(rng.choices(WORDS, k=int(4 * 75 ** rng.random()))),
            "max_tokens": rng.randint(16, 160),
            "temperature": 1,
            "top_p": 0.9,
            "seed": i,
            "ignore_eos": True,
            "stream": True,
        }
        for i in range(count)
    ]


async def stream(soak, body, key=None):
    """The text of an answer, or None if it was cut off here."""
    # The end of a response of HTTP 1.0 is that of its connection, and its body is not in chunks.
    reader, writer = await asyncio.open_connection(soak.host, soak.port)
    data = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    killed = False
    if key is not None:

        def kill():
            nonlocal killed
            killed = True
            writer.transport.abort()

        soak.running[key] = kill
    begun, last, text, ended = time.monotonic(), None, "", False
    try:
        status = (await reader.readline()).split()
        while (line := await asyncio.wait_for(reader.readline(), STUCK)) and not killed:
            if status[1] != b"200":
                raise RuntimeError(f"{status} {(await reader.read()).decode()}")
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                now = time.monotonic()
                text += event["choices"][0]["text"]
                if key is not None:
                    (soak.firsts if last is None else soak.gaps).append(now - (begun if last is None else last))
                    soak.tokens += 1
                last = now
        if killed:
            return None
        if not ended:
            raise RuntimeError("the stream ended early")
        return text
    except (ConnectionError, asyncio.IncompleteReadError):
        if killed:
            return None
        raise
    finally:
        if key is not None:
            del soak.running[key]
        writer.close()


async def client(soak, key, rng, until):
    while time.monotonic() < until:
        number = rng.randrange(len(soak.requests))
        try:
            text = await stream(soak, soak.requests[number], key)
        except Exception as e:  # Whatever it is, it is a failure of this stream alone.
            soak.failures.append(f"request {number}: {type(e).__name__} {e}")
            await asyncio.sleep(1)
            continue
        if text is None:
            soak.killed += 1
        elif text == soak.expected[number]:
            soak.done += 1
        else:
            soak.failures.append(f"request {number}: not the text that it has alone: {text!r} {soak.expected[number]!r}")


async def watch(soak, rng, until):
    """Cuts off a stream every second, and notes the server's memory."""
    begin = time.monotonic()
    while time.monotonic() < until:
        await asyncio.sleep(1)
        if soak.running:
            soak.running[rng.choice(sorted(soak.running))]()
        with open(f"/proc/{soak.pid}/status") as f:
            kib = next(int(line.split()[1]) for line in f if line.startswith("VmRSS"))
        soak.memory.append((time.monotonic() - begin, kib * 1024))
        if len(soak.memory) % 30 == 0:
            print(f"{soak.memory[-1][0]:4.0f} s: {soak.done} answered, {soak.killed} cut off, {len(soak.failures)} failed, "
                  f"{soak.tokens} tokens, {kib / 1024:.1f} MiB", file=sys.stderr)


def processor_seconds(pid):
    with open(f"/proc/{pid}/stat") as f:
        user, system = f.read().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def metrics(soak):
    reader, writer = await asyncio.open_connection(soak.host, soak.port)
    writer.write(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("anser_") and "{" not in line}


def quantile(values, share):
    values = sorted(values)
    return values[min(int(share * len(values)), len(values) - 1)] if values else 0.0


async def run(soak, args):
    begin = time.monotonic()
    for body in soak.requests:
        soak.expected.append(await stream(soak, body))
    print(f"{len(soak.requests)} requests alone in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    begin, used = time.monotonic(), processor_seconds(soak.pid)
    until = begin + 60 * args.minutes
    clients = (client(soak, i, random.Random(i), until) for i in range(args.streams))
    await asyncio.gather(watch(soak, random.Random(-1), until), *clients)
    seconds, used = time.monotonic() - begin, processor_seconds(soak.pid) - used
    for _ in range(100):
        # What was cut off last may be noticed a step later.
        counts = await metrics(soak)
        if counts["anser_requests_running"] + counts["anser_requests_waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    # Caches of states and of buffers fill first.
    warm = [size for at, size in soak.memory if at >= 0.4 * soak.memory[-1][0]]
    settled = sum(warm[:10]) / len(warm[:10])
    counted = counts["anser_requests_finished_total"] + counts["anser_requests_cancelled_total"]
    median, high = quantile(soak.gaps, 0.5), quantile(soak.gaps, 0.99)
    checks = {
        "no stream failed, stood still or had another text": not soak.failures and soak.done > 0,
        # What is cut off with its last token may have come to its end.
        "the server counted the same": counted == len(soak.requests) + soak.done + soak.killed and counts["anser_requests_failed_total"] == 0,
        "nothing runs at the end": counts["anser_requests_running"] + counts["anser_requests_waiting"] == 0,
        "memory within 2%": max(abs(size / settled - 1) for size in warm) < 0.02,
        "99% of the gaps below four times the median": high < 4 * median,
    }
    result = {
        "streams": args.streams,
        "seconds": round(seconds, 1),
        "answered_as_alone": soak.done,
        "cut_off": soak.killed,
        "failures": len(soak.failures),
        "tokens_per_second": round(soak.tokens / seconds, 1),
        "cores_used": round(used / seconds, 2),
        "first_ms": {q: round(1e3 * quantile(soak.firsts, s), 1) for q, s in (("p50", 0.5), ("p99", 0.99), ("max", 1))},
        "between_ms": {q: round(1e3 * quantile(soak.gaps, s), 1) for q, s in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1))},
        "memory_mib": {"settled": round(settled / 2**20, 1), "least": round(min(warm) / 2**20, 1), "most": round(max(warm) / 2**20, 1)},
        "checks": checks,
    }
    print(json.dumps(result, indent=1))
    for failure in soak.failures[:5]:
        print(failure[:1000], file=sys.stderr)
    return all(checks.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("anser")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--requests", type=int, default=256, help="how many different ones")
    args, more = parser.parse_known_args()
    # Cached states fill their part of memory while it warms up.
    command = [args.anser, "serve", "--port", "0", "--json", "--slots", str(args.streams), "--cache-memory", "64", *more]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        host, port = json.loads(server.stdout.readline())["address"].rsplit(":", 1)
        good = asyncio.run(run(Soak(host, int(port), server.pid, requests(args.requests)), args))
    finally:
        server.terminate()
    sys.exit(0 if server.wait(timeout=60) == 0 and good else 1)


if __name__ == "__main__":
    main()

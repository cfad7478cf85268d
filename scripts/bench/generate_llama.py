"""The peer of `bench_generate`: llama.cpp's server (PyPI: xllamacpp), the same options and JSON.

    python3 generate_llama.py --model DIR --prompts FILE --batch-size 16 --new-tokens 160 --eos --threads 1

DIR is a folder with model.gguf (llama_gguf.py). The server runs in a process of its own with one
slot per row of the batch; that process's CPU seconds are counted. Prompts are sent as token ids,
longest first, as many at a time as there are slots, and no prompt is cached.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

REQUEST_S = 1800
SERVE = """
import json, sys, time
import xllamacpp
o = json.loads(sys.argv[1])
p = xllamacpp.CommonParams()
p.model.path, p.hostnames, p.port = o["model"], ["127.0.0.1"], o["port"]
p.n_parallel, p.n_ctx = o["slots"], o["slots"] * o["context"]
p.cache_type_k = p.cache_type_v = 0  # f32
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = o["threads"]
server = xllamacpp.Server(p)
print("ready", flush=True)
time.sleep(36000)
"""


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--eos", action="store_true", help="end answers at the model's EOS")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def cpu_seconds(process):
    """User and system seconds of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def answer(url, prompt, args):
    body = {"prompt": prompt, "n_predict": args.new_tokens, "temperature": 0, "cache_prompt": False, "return_tokens": True,
            "ignore_eos": not args.eos}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=REQUEST_S) as reply:
        return json.load(reply)["tokens"]


def main():
    args = parse()
    prompts = json.loads(args.prompts.read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = max(map(len, prompts)) + args.new_tokens + 1
    options = {"model": str(args.model / "model.gguf"), "port": port, "slots": args.batch_size, "context": context,
               "threads": args.threads}
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    cpu, wall, ids = [], [], [None] * len(prompts)
    with subprocess.Popen([sys.executable, "-c", SERVE, json.dumps(options)], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as server:
        try:
            if server.stdout.readline().strip() != "ready":
                sys.exit("generate_llama: the server does not start")
            url = f"http://127.0.0.1:{port}/completion"
            for _ in range(args.repeat):
                start, clock = cpu_seconds(server.pid), time.perf_counter()
                with ThreadPoolExecutor(args.batch_size) as pool:
                    for i, tokens in zip(order, pool.map(lambda i: answer(url, prompts[i], args), order)):
                        ids[i] = tokens
                cpu.append(cpu_seconds(server.pid) - start)
                wall.append(time.perf_counter() - clock)
        finally:
            server.kill()
    print(json.dumps({"ids": ids, "cpu_seconds": cpu, "wall_seconds": wall, "versions": {"xllamacpp": version("xllamacpp")}}))


if __name__ == "__main__":
    main()
